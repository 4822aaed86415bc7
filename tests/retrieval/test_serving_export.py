"""A model that is handed over: in a process that knows nothing of RecGPT, the lists of the recall engine."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.data.hashing import stable_hash, uniform
from recgpt.errors import UserError
from recgpt.model.attention import Layout, offsets_of_lengths
from recgpt.model.export import ModelInfo, save_model
from recgpt.model.gpt import GPT
from recgpt.model.unit_rows import unit
from recgpt.model.users import KnownUsers, UserVectors
from recgpt.retrieval import onnx_encoder
from recgpt.retrieval.recall_model import load_recall, scale_quotas
from recgpt.retrieval.serving_export import write_serving_folder
from recgpt.storage import checksum

SCRIPT = Path(__file__).parents[2] / "docs" / "serving" / "serve.py"
MAX_HISTORY = 6
QUOTAS = (5, 3, 2)
HISTORIES = [[7], [3, 7, 11], [1, 2, 3, 4, 5, 6], list(range(20, 33)), [], [8, 8, 9], [41]]
"""Item ids of seven users, the last two unknown to the dataset; one item, many, overlong, none."""
WIDTH = 8
WRITTEN_WITH = {"torch": ["torch"], "onnx": ["onnx", "onnxruntime"], "faiss": ["faiss"]}
"""The packages of each format; the last one also serves it."""

spec = importlib.util.spec_from_file_location("serve", SCRIPT)
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


def make_gpt(similarity="cosine", kind="none", combine="add", members=1):
    """A GPT with weights large enough that histories tell users apart."""
    torch.manual_seed(0)
    user = UserSettings(kind=kind, combine=combine, buckets=5)
    gpt = GPT(
        ModelSettings(
            width=WIDTH // members,
            layers=2,
            heads=2,
            members=members,
            max_history=MAX_HISTORY,
            similarity=similarity,
            user=user,
        )
    )
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.3)
    if kind == "table":
        gpt.user = UserVectors(torch.randn(5, WIDTH))
    return gpt.eval()


@dataclass
class Model:
    """An exported model, its dataset, and the ids of the users and items of ``HISTORIES``."""

    url: str
    dataset: object
    recall: RecallSettings
    histories: list
    users: list

    def expected(self, quotas):
        """What the recall engine gives: ids, scores and steps of each user."""
        vocabulary = self.dataset.vocabulary()
        known = [pa.array(history, vocabulary.item_ids.type) for history in self.histories]
        items = torch.from_numpy(np.concatenate([vocabulary.encode(history) for history in known])).long()
        offsets = offsets_of_lengths(torch.tensor([len(history) for history in self.histories]))
        popularity_R = torch.from_numpy(np.concatenate([[0], vocabulary.counts]))
        settings = replace(self.recall, k=sum(quotas), quotas=tuple(quotas))
        recall = load_recall(self.url, settings, popularity_R=popularity_R)
        found = recall.recommend(items, offsets, torch.from_numpy(stable_hash(pa.array(self.users))))
        lists = [vocabulary.decode(row.numpy()).to_pylist() for row in found.item_index_BK]
        return lists, found.score_BK.numpy(), found.step_BK.tolist()


@pytest.fixture(scope="module")
def models(write_dataset, tmp_path_factory):
    """Models of both similarities, every kind of user and every continuation; ids are integers or strings."""
    place = tmp_path_factory.mktemp("models")

    def make(name, gpt, id_type, recall):
        histories = [[id_type(item) for item in history] for history in HISTORIES]
        users = [id_type(-3 + 1000 * user) for user in range(len(histories))]
        of_all = dict(zip(users[:-2], histories[:-2], strict=True))
        of_all[id_type(99)] = [id_type(item) for item in range(45)]
        (place / name).mkdir()
        dataset = write_dataset(place / name, of_all)
        table_RD = torch.randn(dataset.num_items + 1, WIDTH)
        if gpt.settings.similarity == "cosine":
            table_RD = unit(table_RD, gpt.settings.members)
        info = ModelInfo(
            dataset.num_items, dataset.manifest.vocabulary_fingerprint, gpt.settings, SplitSettings(), recall
        )
        rest = ()
        if gpt.settings.user.kind == "table":
            known = torch.from_numpy(stable_hash(pa.array(users[:4]))).sort().values
            rest = KnownUsers(known), gpt.user.rows_RD.split(2)
        url = str(place / name / "model")
        save_model(url, info, gpt.state_dict(), table_RD.split(20), *rest)
        return Model(url, dataset, recall, histories, users)

    recall = RecallSettings(sum(QUOTAS), QUOTAS)
    beam = replace(recall, continuation="beam", beam_width=3)
    kept = replace(recall, continuation="sampled", keep_seen=True)
    return {
        "mean": make("mean", make_gpt(), int, recall),
        "best": make("best", make_gpt("dot", "hashed", "gate"), str, replace(recall, continuation="best")),
        "sampled": make("sampled", make_gpt("cosine", "table"), str, kept),
        "beam": make("beam", make_gpt("dot", "hashed"), int, beam),
        "members": make("members", make_gpt("cosine", "hashed", "gate", members=2), int, recall),
    }


def need(format):
    """Skip the test if what a format is written or read with is not installed."""
    for package in WRITTEN_WITH[format]:
        pytest.importorskip(package)


def run(folder, *arguments, text=None):
    """Run Python in a folder, as someone does who has no RecGPT."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call = [sys.executable, *map(str, arguments)]
    return subprocess.run(call, cwd=folder, env=environment, input=text, capture_output=True, text=True)


ASK = """
import json, sys
import serve

answers = {}
for name, folder, histories, users, quotas in json.load(sys.stdin):
    server = serve.Server(folder)
    answers[name] = [server.recommend(histories, users, some) for some in quotas]
heavy = {"recgpt", "ray", "deepspeed", "pyarrow", "pandas", "safetensors", "torch", "onnxruntime", "faiss"}
print(json.dumps([answers, sorted(heavy & set(sys.modules))]))
"""
ONE_STEP, SEVERAL_STEPS = [10], None  # None: the model's own


@pytest.fixture(scope="module", params=list(WRITTEN_WITH))
def served(request, models, tmp_path_factory):
    """For each format: the folders, the lists that serve.py gives by name of the model, what it imports."""
    need(request.param)
    place = tmp_path_factory.mktemp(request.param)
    questions = []
    for name, model in models.items():
        (place / name).mkdir()
        write_serving_folder(str(place / name), request.param, model.url, model.dataset)
        asked = [ONE_STEP, SEVERAL_STEPS]
        questions.append([name, str(place / name), model.histories, model.users, asked])
    finished = run(place / "mean", "-c", ASK, text=json.dumps(questions))
    assert finished.returncode == 0, finished.stderr
    answers, imported = json.loads(finished.stdout)
    return request.param, place, answers, imported


@pytest.mark.parametrize("name", ["mean", "best", "sampled", "beam", "members"])
def test_the_lists_are_those_of_the_recall_engine(served, models, name):
    _, _, answers, _ = served
    for quotas, answer in zip([ONE_STEP, QUOTAS], answers[name], strict=True):
        lists, scores, steps = models[name].expected(quotas)
        assert [one["item_ids"] for one in answer] == lists
        assert [one["steps"] for one in answer] == steps
        np.testing.assert_allclose([one["scores"] for one in answer], scores, rtol=1e-4, atol=1e-4)
    several = [tuple(one["item_ids"]) for one in answers[name][1]]
    assert len(set(several)) == len(several), "users are not told apart"


def test_serving_needs_the_package_of_the_format_alone(served):
    format, _, _, imported = served
    assert imported == [WRITTEN_WITH[format][-1]]


def test_the_manifest_is_true_and_the_readme_names_every_file(served):
    format, place, _, _ = served
    for folder in place.iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["format"] == format
        assert {"recgpt", *WRITTEN_WITH[format]} == set(manifest["releases"])
        data = {file.name for file in folder.iterdir() if file.suffix != ".pyc" and file.is_file()}
        assert set(manifest["files"]) == data - {"manifest.json", "README.txt", "serve.py"}
        for name, said in manifest["files"].items():
            assert said["bytes"] == (folder / name).stat().st_size
            assert said["sha256"] == checksum(str(folder / name))
        readme = (folder / "README.txt").read_text()
        assert all(f"  {name} " in readme for name in manifest["files"])
        assert ("user_vectors " in readme) == (manifest["model"]["user"]["kind"] != "none")
        assert (folder / "serve.py").read_bytes() == SCRIPT.read_bytes()


def test_the_command_line(models, tmp_path):
    need("faiss")
    model = models["best"]
    write_serving_folder(str(tmp_path), "faiss", model.url, model.dataset)
    call = ["--history", *model.histories[1], "nothing", "--user", model.users[1], "--k", "6"]
    finished = run(tmp_path.parent, tmp_path / "serve.py", *call)
    assert finished.returncode == 0, finished.stderr
    assert "serve.py: the model does not know ['nothing']; left out" in finished.stderr
    answer = json.loads(finished.stdout)
    lists, _, steps = model.expected((3, 2, 1))
    assert (answer["item_ids"], answer["steps"]) == (lists[1], steps[1])


def test_lists_end_when_all_items_are_found(models, tmp_path):
    """Forty-five items, of which one user has seen thirteen: thirty-two are left for the two steps."""
    model = models["mean"]
    write_serving_folder(str(tmp_path), "torch", model.url, model.dataset)
    (answer,) = serve.Server(tmp_path).recommend([model.histories[3]], quotas=[30, 20])
    assert answer["steps"] == [1] * 30 + [2] * 2
    assert {*answer["item_ids"], *model.histories[3]} == set(range(45))


def test_a_user_without_an_id_is_an_unknown_one(models, tmp_path):
    model = models["sampled"]
    write_serving_folder(str(tmp_path), "torch", model.url, model.dataset)
    server = serve.Server(tmp_path)
    history, unknown, known = model.histories[1], model.users[-1], model.users[1]
    nobody, of_unknown, of_known = server.recommend([history] * 3, [None, unknown, known], [10])
    assert nobody["item_ids"] == of_unknown["item_ids"] != of_known["item_ids"]


def test_a_damaged_file_is_refused(models, tmp_path):
    model = models["mean"]
    write_serving_folder(str(tmp_path), "torch", model.url, model.dataset)
    path = tmp_path / "item_vectors.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"item_vectors\.npy: not the file that was exported"):
        serve.Server(tmp_path)


def test_a_model_that_diverged_is_refused(models, tmp_path):
    model = models["mean"]
    gpt = make_gpt()
    info = ModelInfo(
        model.dataset.num_items,
        model.dataset.manifest.vocabulary_fingerprint,
        gpt.settings,
        SplitSettings(),
        model.recall,
    )
    table_RD = torch.randn(info.num_items + 1, WIDTH)
    table_RD[17, 3] = float("nan")
    save_model(str(tmp_path / "model"), info, gpt.state_dict(), table_RD.split(10))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="values that are not finite"):
        write_serving_folder(str(tmp_path / "out"), "torch", str(tmp_path / "model"), model.dataset)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_faiss_index_knows_item_indices(models, tmp_path):
    need("faiss")
    import faiss

    model = models["mean"]
    write_serving_folder(str(tmp_path), "faiss", model.url, model.dataset)
    index = faiss.read_index(str(tmp_path / "items.faiss"))
    vectors_VD = faiss.downcast_index(index.index).reconstruct_n(0, index.ntotal)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    assert len(vectors_VD) == model.dataset.num_items
    _, nearest_V1 = index.search(vectors_VD, 1)  # of unit vectors, each is its own nearest
    assert nearest_V1[:, 0].tolist() == list(range(1, model.dataset.num_items + 1))


@dataclass
class Padded:
    """Histories of made-up tokens with padding in all places, and what the GPT says of them."""

    mask_BL: torch.Tensor
    item_BLD: torch.Tensor
    segment_BL: torch.Tensor
    user_BD: torch.Tensor | None
    interest_BD: torch.Tensor


@torch.no_grad()
def padded(gpt):
    torch.manual_seed(1)
    rows = ["xxxxxx", "...xxx", "xxx...", "x....x", ".....x", "x....."]
    mask_BL = torch.tensor([[place == "x" for place in row] for row in rows])
    item_BLD = torch.randn(*mask_BL.shape, WIDTH)
    segment_BL = torch.randint(0, 2, mask_BL.shape)
    user_row_B = torch.tensor([0, 1, 2, 3, 4, 0])
    layout = Layout.from_offsets(offsets_of_lengths(mask_BL.sum(1)))
    interest_TD = gpt(item_BLD[mask_BL], layout, user_row_B, segment_BL[mask_BL])
    user_BD = None if gpt.user is None else gpt.user(user_row_B)
    return Padded(mask_BL, item_BLD, segment_BL, user_BD, interest_TD[layout.offsets[1:] - 1])


KINDS = [("cosine", "none", "add"), ("dot", "hashed", "gate"), ("cosine", "table", "add")]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_in_torch_and_numpy(kind):
    gpt = make_gpt(*kind)
    some = padded(gpt)
    inputs = [some.item_BLD, some.segment_BL, some.mask_BL, some.user_BD]
    settings, weights = vars(gpt.settings), gpt.state_dict()
    by_torch = serve.encode(torch, torch.erf, weights, settings, *inputs)
    torch.testing.assert_close(by_torch, some.interest_BD, rtol=1e-4, atol=1e-4)
    arrays = {name: value.numpy() for name, value in weights.items()}
    inputs = [None if one is None else one.numpy() for one in inputs]
    by_numpy = serve.encode(np, serve.erf, arrays, settings, *inputs)
    np.testing.assert_allclose(by_numpy, some.interest_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most_bytes_inside", [2**30, 0], ids=["one file", "weights beside it"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_in_onnx(kind, most_bytes_inside, monkeypatch, tmp_path):
    need("onnx")
    import onnx
    import onnxruntime

    monkeypatch.setattr(onnx_encoder, "_MOST_BYTES_INSIDE", most_bytes_inside)
    gpt = make_gpt(*kind)
    onnx_encoder.save_encoder(tmp_path, gpt)
    assert (tmp_path / "encoder.onnx.data").exists() == (most_bytes_inside == 0)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    some = padded(gpt)
    inputs = {"item_vectors": some.item_BLD, "segments": some.segment_BL, "mask": some.mask_BL}
    if some.user_BD is not None:
        inputs["user_vectors"] = some.user_BD
    assert [one.name for one in session.get_inputs()] == list(inputs)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    np.testing.assert_allclose(session.run(None, arrays)[0], some.interest_BD, rtol=1e-4, atol=1e-4)
    last = {name: value[-1:] if name == "user_vectors" else value[-1:, :1] for name, value in arrays.items()}
    np.testing.assert_allclose(session.run(None, last)[0], some.interest_BD[-1:], rtol=1e-4, atol=1e-4)
    assert onnx.load(tmp_path / "encoder.onnx").opset_import[0].version == onnx_encoder.OPSET


def test_a_runtime_that_computes_something_else_is_named(monkeypatch, tmp_path):
    need("onnx")
    monkeypatch.setattr(onnx_encoder, "_ROUNDING", 0.0)
    with pytest.raises(UserError, match="interest vectors that are off by 0.00%: pip install -U onnxruntime"):
        onnx_encoder.save_encoder(tmp_path, make_gpt())


@given(st.lists(st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1), min_size=1), st.integers(1, 100))
def test_users_have_the_hashes_of_the_engine(ids, step):
    for one in ids:
        hashed = stable_hash(pa.array([one]))
        assert serve.stable_hash(one) == hashed[0]
        assert serve.uniform(int(hashed[0]), step) == uniform(hashed, step)[0]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 300))
def test_quotas_are_scaled_as_the_engine_does(quotas, k):
    assert serve.scaled(quotas, k) == list(scale_quotas(quotas, k))
