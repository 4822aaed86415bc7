"""Folders with a manifest that are damaged or made to harm: whatever of them is not right is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from benchmarks.fuzzing import goods
from benchmarks.fuzzing.readers import files_of, seal
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from recgpt.model.export import load_model, model_fingerprint
from recgpt.retrieval.approximate_index import StoredIndex
from recgpt.retrieval.candidates import read_candidates
from recgpt.retrieval.user_selection import hash_bounds
from recgpt.training import checkpoint, run_folder

ELSEWHERE = [
    "../outside/{}",
    "/etc/passwd",
    "s3://bucket/{}",
    "..\\outside\\{}",
    "a/../../outside/{}",
    "file:///etc/passwd",
    "",
    "..",
    "{}\0",
]


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def reseal(folder, name):
    """Make the checksum of a changed file fit, as who changed it on purpose would."""
    files = files_of(folder)
    assert seal(files, name)
    for path, data in files.items():
        (folder / path).write_bytes(data)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "dataset").mkdir()
    return goods.write_dataset(tmp_path / "dataset")


def read_all(folder):
    opened = HistoryDataset.open(str(folder))
    opened.vocabulary()
    hash_bounds(opened)
    return [opened.read_row_group(group) for group in opened.row_groups]


@pytest.mark.parametrize("name", ["vocabulary.parquet", "histories/part-00001.parquet"])
def test_a_flipped_bit_in_any_file_of_a_dataset_is_seen_or_changes_nothing(dataset, name):
    """Of histories, pages and footer are checked; what is between them may not even be read."""
    path = Path(dataset.url, name)
    good, expected = path.read_bytes(), read_all(dataset.url)
    seen = 0
    places = range(0, len(good), 13)
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            found = read_all(dataset.url)
        except UserError as error:
            seen += f"{path.name}: damaged" in str(error)
        else:
            assert found == expected
    assert seen > len(places) / 2
    path.write_bytes(good)
    assert read_all(dataset.url) == expected


def test_item_counts_are_checked_too(dataset):
    assert dataset.item_counts().tolist() == dataset.vocabulary().counts.tolist()
    table = pq.read_table(f"{dataset.url}/vocabulary.parquet")
    counts = pa.array([count + 1 for count in table["count"].to_pylist()])
    pq.write_table(table.set_column(2, "count", counts), f"{dataset.url}/vocabulary.parquet")
    with pytest.raises(UserError, match=r"vocabulary.parquet: damaged"):
        dataset.item_counts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(num_users=25), "num_users is 25, what it says further makes 24"),
        (lambda manifest: manifest["files"].append(manifest["files"][0]), "num_users is 24"),
        (
            lambda manifest: manifest["files"][0].update(row_groups=[12]),
            "row groups of .* are not the manifest's",
        ),
        (lambda manifest: manifest.update(time_unit="minutes"), "time_unit"),
        (
            lambda manifest: manifest.update(has_timestamps=False),
            "has_timestamps is False, time_unit is seconds",
        ),
        (lambda manifest: manifest.update(time_quantiles={"0.8": 1}), "time_quantiles are"),
        (lambda manifest: manifest.update(num_items=10**30), "num_items"),
    ],
)
def test_manifests_of_datasets_that_contradict(dataset, change, message):
    change_json(Path(dataset.url, "manifest.json"), change)
    with pytest.raises(UserError, match=message):
        read_all(dataset.url)


LISTS = pa.list_(pa.int32())


@pytest.mark.parametrize(
    ("column", "change", "kind", "message"),
    [
        ("item_indices", lambda items: [99] * len(items), LISTS, "items 99 to 99, of 12 in the vocabulary"),
        ("item_indices", lambda items: [0] * len(items), LISTS, "items 0 to 0"),
        (
            "item_indices",
            lambda items: [None] * len(items),
            LISTS,
            "values of column item_indices are missing",
        ),
        ("item_indices", len, pa.float64(), "column item_indices is double, not list"),
        (
            "timestamps",
            lambda times: [],
            pa.list_(pa.int64()),
            "item_indices and timestamps differ in length",
        ),
        ("user_hash", str, pa.string(), "it does not say the bounds of user_hash"),
    ],
)
def test_histories_that_are_none_under_a_checksum_that_fits(dataset, column, change, kind, message):
    name = "histories/part-00000.parquet"
    table = pq.read_table(f"{dataset.url}/{name}")
    values = pa.array([change(value) for value in table[column].to_pylist()], kind)
    changed = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(changed, f"{dataset.url}/{name}", row_group_size=5)
    reseal(Path(dataset.url), name)
    with pytest.raises(UserError, match=f"part-00000.parquet: damaged .*{message}"):
        read_all(dataset.url)


@pytest.fixture
def model(dataset, tmp_path):
    goods.write_model(tmp_path / "model", dataset)
    return tmp_path / "model"


def test_a_flipped_bit_in_any_file_of_a_model_is_seen(model):
    for path in sorted(model.glob("*.safetensors")):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        for read in (load_model, model_fingerprint):
            with pytest.raises(UserError, match=f"{path.name}: not the file that was written"):
                read(str(model))
        path.write_bytes(good)
    load_model(str(model))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "item_table-00000.safetensors",
            lambda one: {"rows": one["rows"].double()},
            "float32 that model.json",
        ),
        ("item_table-00000.safetensors", lambda one: {"columns": one["rows"]}, r"its rows \[0\] are not the"),
        ("users.safetensors", lambda one: {"hashes": one["hashes"].flip(0)}, "holds no ascending hashes"),
        ("users.safetensors", lambda one: {}, "holds no ascending hashes"),
        ("gpt.safetensors", lambda one: {**one, "extra": torch.zeros(1)}, "extra is .*, not absent"),
        (
            "gpt.safetensors",
            lambda one: {name: value.half() for name, value in one.items()},
            "is torch.float16",
        ),
    ],
)
def test_tensors_that_do_not_fit_under_a_checksum_that_does(model, file, change, message):
    tensors = safetensors.torch.load_file(model / file)
    (model / file).write_bytes(safetensors.torch.save(change(tensors)))
    reseal(model, file)
    with pytest.raises(UserError, match=message):
        load_model(str(model))


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["model"].update(layers=10**9),
        lambda one: one["model"].update(width=2 * 10**9),
        lambda one: one["model"].update(max_history=10**15),
        lambda one: one["item_table"][1].update(first_row=3),
        lambda one: one["item_table"].append({"file": "x"}),
        lambda one: one.update(item_table={"file": 1}, num_items="many"),
        lambda one: one.update(sha256=[]),
    ],
)
def test_descriptions_of_models_that_are_none(model, change):
    change_json(model / "model.json", change)
    with pytest.raises(UserError):
        load_model(str(model))


@pytest.fixture
def candidates(dataset, tmp_path):
    (tmp_path / "candidates").mkdir()
    goods.write_candidates(tmp_path / "candidates", dataset)
    return tmp_path / "candidates"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["files"].append(one["files"][0]), "num_users is 24, what it says further makes"),
        (lambda one: one.update(quotas=[4, 4]), "k is 4, what it says further makes 8"),
        (lambda one: one.update(k=10**30), "k: Input should be less than"),
        (lambda one: one["files"][0].update(rows=3, candidates=12), "num_users is 24"),
    ],
)
def test_manifests_of_candidates_that_contradict(candidates, change, message):
    change_json(candidates / "_manifest.json", change)
    with pytest.raises(UserError, match=message):
        list(read_candidates(str(candidates)))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_name_leads_out_of_its_folder(model, candidates, dataset, tmp_path, name):
    (tmp_path / "outside").mkdir()
    for folder, manifest, key, table, read in (
        (Path(dataset.url), "manifest.json", "path", "files", lambda url: read_all(url)),
        (candidates, "_manifest.json", "path", "files", lambda url: list(read_candidates(url))),
        (model, "model.json", "file", "item_table", load_model),
        (model, "model.json", "file", "user_table", model_fingerprint),
    ):
        for path, data in files_of(folder).items():
            outside = tmp_path / "outside" / path
            outside.parent.mkdir(exist_ok=True)
            outside.write_bytes(data)
        good = (folder / manifest).read_bytes()
        old = json.loads(good)[table][0][key]
        change_json(
            folder / manifest, lambda one, old=old, t=table, k=key: one[t][0].update({k: name.format(old)})
        )
        with pytest.raises(UserError, match=r"names .*, which is no file inside|is not in the manifest"):
            read(str(folder))
        (folder / manifest).write_bytes(good)


@pytest.mark.parametrize("name", ["../../outside/step-0000000010-epoch-00001", "..", "/etc", "s3://b/x", ""])
def test_a_checkpoint_named_by_a_state_lies_in_the_run(tmp_path, name):
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoint.load_dense(str(tmp_path), name)


def test_an_index_of_another_kind_than_it_says(dataset, model, tmp_path):
    pytest.importorskip("faiss")
    goods.write_index(tmp_path / "index", model, "hnsw")
    change_json(tmp_path / "index" / "manifest.json", lambda one: one.update(kind="ivf"))
    with pytest.raises(UserError, match="holds IndexHNSWFlat of 12 items, its manifest says ivf of 12"):
        StoredIndex.open(str(tmp_path / "index"), model_fingerprint(str(model))).load(exact=None)
    change_json(tmp_path / "index" / "manifest.json", lambda one: one.update(effort=0))
    with pytest.raises(UserError, match="damaged, effort"):
        StoredIndex.open(str(tmp_path / "index"), model_fingerprint(str(model)))


@pytest.mark.parametrize("line", ["{", "[]", "1", '{"step": "x"}', "{}", "\x00", "[" * 10**5])
def test_a_line_of_metrics_that_is_damaged_is_named(tmp_path, line):
    run_folder.write_metrics(str(tmp_path), [{"step": 1}, {"step": 3}])
    assert run_folder.read_metrics(str(tmp_path), 2) == [{"step": 1}]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="metrics.jsonl: line 3 is damaged; remove it"):
        run_folder.read_metrics(str(tmp_path), 2)


@pytest.mark.parametrize("text", ["[]", "{}", '{"stages": ["pretrain"]}', "3", "[" * 10**5])
def test_a_manifest_of_a_run_without_stages(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json"):
        run_folder.finished_stages(str(tmp_path))
