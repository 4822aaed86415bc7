"""`recgpt export`: the folder appears whole or not at all, starts no Ray, and says what is missing."""

import json
import subprocess
import sys

import pytest

from ray_jobs.export import run_export
from recgpt import storage
from recgpt.errors import UserError
from tests.ray_jobs.random_model import RECALL, save_random_model

HISTORIES = {f"u{user}": [f"i{(7 * user + day) % 20}" for day in range(9)] for user in range(6)}


@pytest.fixture(scope="module")
def dataset(write_dataset, tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), HISTORIES)


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory):
    return str(save_random_model(tmp_path_factory.mktemp("run"), dataset))


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_verb_needs_no_ray(model, dataset, tmp_path):
    code = "import sys; from ray_jobs import export; export.main(); print('ray' in sys.modules)"
    call = ["--model", model, "--dataset", dataset.url, "--output", "out/torch", "--format", "torch"]
    finished = subprocess.run(
        [sys.executable, "-c", code, *call], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    said, ray = finished.stdout.splitlines()
    assert said.startswith("out/torch: 20 items, 0.0 MB; `python serve.py --history ID ID` there gives")
    assert ray == "False"
    assert names(tmp_path / "out" / "torch") == [
        "README.txt",
        "encoder.safetensors",
        "item_vectors.npy",
        "items.json",
        "manifest.json",
        "serve.py",
        "user_vectors.npy",
    ]


def test_an_output_that_is_there_is_replaced_only_if_asked_for(model, dataset, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        run_export(model, dataset.url, str(output), "torch")
    assert names(output) == ["mine"]
    manifest = run_export(model, dataset.url, str(output), "torch", overwrite=True)
    assert manifest["recall"]["quotas"] == list(RECALL.quotas)
    assert json.loads((output / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert "mine" not in names(output)
    assert names(tmp_path) == ["out"]


def test_what_is_read_from_is_not_written_to(model, dataset):
    with pytest.raises(UserError, match="which is read from"):
        run_export(model, dataset.url, model, "torch", overwrite=True)


def test_the_ids_come_from_the_dataset_of_the_model(model, write_dataset, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_dataset(tmp_path / "other", {"u": ["a", "b"]})
    with pytest.raises(UserError, match="trained on another vocabulary"):
        run_export(model, other.url, str(tmp_path / "out"), "torch")
    assert names(tmp_path) == ["other"]


@pytest.mark.parametrize(
    ("format", "package", "advice"),
    [
        ("onnx", "onnx", "pip install 'recgpt[onnx]'"),
        ("onnx", "onnxruntime", "pip install 'recgpt[onnx]'"),
        ("faiss", "faiss", "pip install 'recgpt[faiss]'"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_read(format, package, advice, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as raised:
        run_export("nothing", "nothing", str(tmp_path / "out"), format)
    assert advice in str(raised.value)


@pytest.mark.parametrize("format", ["torch", "onnx", "faiss"])
def test_an_object_store_holds_the_same_files(format, model, dataset, s3_bucket, tmp_path):
    if format != "torch":
        pytest.importorskip({"onnx": "onnxruntime", "faiss": "faiss"}[format])
    here = run_export(model, dataset.url, str(tmp_path / "out"), format)
    there = run_export(model, dataset.url, f"{s3_bucket}/out", format)
    assert there == here
    assert storage.list_names(f"{s3_bucket}/out") == names(tmp_path / "out")
    for name, said in there["files"].items():
        assert storage.checksum(f"{s3_bucket}/out/{name}") == said["sha256"]
