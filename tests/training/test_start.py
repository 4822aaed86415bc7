"""A run that starts from an older model: its rows and weights to the bit, initial ones for what is new."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from recgpt import storage
from recgpt.config import ModelSettings, RecallSettings, SplitSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import read_unit
from recgpt.distributed.sharded_table import ShardedTable
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, load_model, save_model
from recgpt.model.gpt import GPT
from recgpt.model.item_table import initial_rows
from recgpt.settings_reading import from_dict
from recgpt.training import run_folder
from recgpt.training.model import known_users
from recgpt.training.recorder import Recorder
from recgpt.training.start import find_start
from recgpt.training.trainer import Trainer, train

OLD_ITEMS, NEW_ITEMS, OLD_USERS, NEW_USERS = 30, 13, 40, 21
ROWS_PER_FILE = 7
MODEL = {"width": 8, "members": 1, "layers": 1, "heads": 2, "max_history": 6, "dropout": 0.3}
SETTINGS = {
    "model": MODEL,
    "seed": 5,
    "data": {"tokens_per_batch": 24, "lanes": 3},
    "pretrain": {"max_epochs": 2},
    "prompt_tune": {"max_epochs": 1},
    "checkpoint_every_steps": 4,
}
PERSONAL = {"model": MODEL | {"user": {"kind": "table"}}}
SHARDED = {"item_table": {"placement": "sharded"}}
VARIANTS = {
    "replicated": {"model": MODEL | {"user": {"kind": "hashed", "buckets": 5}}},
    "replicated, zero3": {"deepspeed": "zero3"},
    "sharded": SHARDED,
    "sharded, bfloat16": {"item_table": {"placement": "sharded", "row_dtype": "bfloat16"}},
    "user table": PERSONAL | SHARDED,
}


def walks(num_users: int, num_items: int) -> dict[int, list[int]]:
    """Users who walk around a circle of items, the last one past all of them."""
    draw = random.Random(0)
    starts = [(user, draw.randrange(num_items), draw.randrange(3, 12)) for user in range(num_users - 1)]
    histories = {
        user: [(start + place) % num_items for place in range(length)] for user, start, length in starts
    }
    return histories | {num_users - 1: list(range(num_items))}


def settings_of(overrides: dict) -> TrainSettings:
    return from_dict(TrainSettings, SETTINGS | overrides, "test")


def export_older(dataset: HistoryDataset, url: str, model: ModelSettings) -> None:
    """A model with weights that no initialisation gives, in files of a few rows."""
    torch.manual_seed(99)
    manifest = dataset.manifest
    info = ModelInfo(
        manifest.num_items, manifest.vocabulary_fingerprint, model, SplitSettings(), RecallSettings(k=20)
    )
    items_RD = torch.randn(manifest.num_items + 1, model.width)
    users = known_users(dataset) if model.user.kind == "table" else None
    users_RD = torch.randn(users.num_rows, model.width).split(ROWS_PER_FILE) if users else ()
    save_model(url, info, GPT(model).state_dict(), items_RD.split(ROWS_PER_FILE), users, users_RD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_dataset) -> Path:
    """An older dataset, one that has grown from it, one that has grown from that, and a model per variant."""
    folder = tmp_path_factory.mktemp("start")
    for name in ("older", "grown", "grown again"):
        (folder / name).mkdir()
    older = write_dataset(folder / "older", walks(OLD_USERS, OLD_ITEMS))
    more = walks(OLD_USERS + NEW_USERS, OLD_ITEMS + NEW_ITEMS)
    grown = write_dataset(folder / "grown", more, grown_from=older)
    write_dataset(folder / "grown again", more | {-1: [500, 501]}, grown_from=grown)
    for name, overrides in VARIANTS.items():
        export_older(older, str(folder / "models" / name), settings_of(overrides).model)
    return folder


# What a run begins with


def begin(dataset_url: str, models: str) -> None:
    """Begin a stage of every variant from its model, and compare this rank's weights before any step."""
    dataset = HistoryDataset.open(dataset_url)
    for name, overrides in VARIANTS.items():
        settings = settings_of(overrides)
        url = find_start(f"{models}/{name}", settings.model, dataset)
        info, older_gpt, older_items_RD = load_model(url)
        with files_that_are_read() as files:
            trainer = Trainer(settings, dataset, "nowhere", lambda units: (), QuietRecorder(), url, "", bool)
            trainer.start_stage("prompt_tune", weights_from=None)
        weights = trainer.engine.weights()
        for key, value in older_gpt.state_dict().items():
            assert torch.equal(weights[f"gpt.{key}"], value), key
        new_RD = initial_rows(settings.seed, info.num_items + 1, dataset.num_items + 1, info.model.width)
        items_RD = torch.cat([older_items_RD, new_RD])
        tables = trainer.model.sharded_tables()
        if "item_table" in tables:
            assert_holds(tables["item_table"], items_RD)
            assert_only_its_files_are_read(tables["item_table"], files, info.num_items)
        else:
            assert torch.equal(weights["item_table.weight"], items_RD)
        if "user_table" in tables:
            assert_holds(tables["user_table"], expected_users(settings, dataset, older_gpt))
        trainer.close()


class QuietRecorder(Recorder):
    def __init__(self):
        super().__init__("nowhere", lambda line: None, lambda metrics: None)

    def restart(self, step):
        pass


class files_that_are_read:
    """While it is open, the names of the files that are read."""

    def __enter__(self) -> list[str]:
        self._read, names = storage.read_bytes, []
        storage.read_bytes = lambda url: names.append(url.rpartition("/")[2]) or self._read(url)
        return names

    def __exit__(self, *_):
        storage.read_bytes = self._read


def assert_holds(table: ShardedTable, rows_RD: torch.Tensor) -> None:
    assert table.num_rows == len(rows_RD)
    assert torch.equal(table.rows_in_use(), rows_RD[table.first : table.end].to(table.rows.dtype))


def assert_only_its_files_are_read(table: ShardedTable, files: list[str], old_items: int) -> None:
    older_rows = range(table.first, min(table.end, old_items + 1))
    wanted = {f"item_table-{row // ROWS_PER_FILE:05d}.safetensors" for row in older_rows}
    assert sorted(file for file in files if file.startswith("item_table-")) == sorted(wanted)


def expected_users(settings: TrainSettings, dataset: HistoryDataset, older_gpt: GPT) -> torch.Tensor:
    """Row by row: the older model's where it knows the user, else the initial one."""
    hashes = known_users(dataset).hashes.tolist()
    older = {user: row for row, user in enumerate(older_gpt.known_users.hashes.tolist(), start=1)}
    seed = settings.seed + (1 << 32)
    rows_RD = initial_rows(seed, 0, len(hashes) + 1, settings.model.width)
    rows_RD[0] = older_gpt.user.rows_RD[0]
    for row, user in enumerate(hashes, start=1):
        if user in older:
            rows_RD[row] = older_gpt.user.rows_RD[older[user]]
    return rows_RD


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_older_rows_are_kept_and_new_ones_are_initial(folder, run_ranks, world_size):
    run_ranks(begin, world_size, str(folder / "grown"), str(folder / "models"))


@pytest.mark.distributed
@pytest.mark.parametrize("dataset", ["older", "grown again"])
def test_the_dataset_may_be_the_same_or_have_grown_twice(folder, run_ranks, dataset):
    run_ranks(begin, 2, str(folder / dataset), str(folder / "models"))


# Trained on, interrupted


class Interrupted(Exception):
    pass


def train_here(
    dataset_url: str, run: str, model: str, overrides: dict, stop_after: int | None = None
) -> None:
    """Train in this process group from an exported model; ``stop_after``: break off after that step."""
    dataset, settings = HistoryDataset.open(dataset_url), settings_of(overrides)

    class EveryRankStops(Recorder):
        def step(self, state, figures):
            super().step(state, figures)
            if state.step == stop_after:
                raise Interrupted

    def read(units):
        return (read_unit(dataset, unit, settings.data.split, None) for unit in units)

    Path(run).mkdir(exist_ok=True)
    recorder = EveryRankStops(run, lambda line: None, lambda metrics: None)
    train(settings, dataset, run, read, recorder, model)


def interrupt_and_go_on(dataset_url: str, models: str, folder: str) -> None:
    """The older model is gone when the run goes on: nothing but the checkpoint is needed."""
    for name, stages in STAGES_OF.items():
        overrides = VARIANTS[name] | {"stages": stages}
        model = f"{models}/{name}"
        train_here(dataset_url, f"{folder}/{name}-whole", model, overrides)
        with pytest.raises(Interrupted):
            train_here(dataset_url, f"{folder}/{name}-resumed", model, overrides, stop_after=6)
        train_here(dataset_url, f"{folder}/{name}-resumed", "nowhere", overrides)


STAGES_OF = {"user table": ["pretrain", "prompt_tune"], "replicated": ["prompt_tune"]}


@pytest.mark.distributed
def test_a_run_goes_on_without_the_older_model(folder, run_ranks, tmp_path):
    run_ranks(interrupt_and_go_on, 2, str(folder / "grown"), str(folder / "models"), str(tmp_path))
    for name, stages in STAGES_OF.items():
        whole, resumed = (
            {
                file.name: safetensors.torch.load_file(file)
                for file in Path(tmp_path, f"{name}-{kind}", "model").glob("*.safetensors")
            }
            for kind in ("whole", "resumed")
        )
        assert whole.keys() == resumed.keys()
        for file, tensors in whole.items():
            assert all(torch.equal(resumed[file][key], tensor) for key, tensor in tensors.items()), file
        lines = run_folder.read_metrics(str(tmp_path / f"{name}-resumed"), until_step=10**9)
        assert list(dict.fromkeys(line["stage"] for line in lines)) == stages


# What does not fit


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"width": 16}, "model.width=8, this run has model.width=16; give --set model.width=8"),
        ({"layers": 2}, "model.layers=1, this run has model.layers=2; give --set model.layers=1"),
        ({"heads": 4}, "model.heads=2, this run has model.heads=4; give --set model.heads=2"),
        ({"max_history": 9}, "model.max_history=6, this run has model.max_history=9; give --set"),
        (
            {"user": {"kind": "hashed", "buckets": 6}},
            "model.user.buckets=5, this run has model.user.buckets=6",
        ),
        (
            {"user": {"kind": "table"}},
            "user.kind=hashed model.user.buckets=5, this run has model.user.kind=table",
        ),
        ({"width": 4, "layers": 3}, "give --set model.width=8 model.layers=1$"),
    ],
)
def test_a_model_of_another_shape_is_refused(folder, ours, message):
    model = VARIANTS["replicated"]["model"] | ours
    with pytest.raises(UserError, match=message):
        find_start(
            str(folder / "models" / "replicated"),
            settings_of({"model": model}).model,
            HistoryDataset.open(str(folder / "grown")),
        )


def test_what_shapes_no_weight_may_differ(folder):
    grown, url = HistoryDataset.open(str(folder / "grown")), str(folder / "models" / "user table")
    user = {"kind": "table", "buckets": 7, "dropout": 0.1}
    settings = settings_of({"model": MODEL | {"dropout": 0.0, "user": user}})
    assert find_start(url, settings.model, grown) == url


def test_a_dataset_with_other_items_is_refused(folder, write_dataset, tmp_path):
    url, settings = str(folder / "models" / "sharded"), settings_of(SHARDED)
    stranger = write_dataset(tmp_path, walks(OLD_USERS, OLD_ITEMS + 1))
    grown = HistoryDataset.open(str(folder / "grown"))
    wrong_size = replace(grown.manifest.lineage[0], num_items=OLD_ITEMS - 1)
    for dataset in (stranger, replace(grown, manifest=replace(grown.manifest, lineage=[wrong_size]))):
        with pytest.raises(UserError, match=r"its 30 items are not the first ones.*prepare --append"):
            find_start(url, settings.model, dataset)


def test_a_model_that_has_seen_more_than_the_dataset_is_refused(folder):
    """Trained on the grown dataset, it does not fit the older one."""
    grown, older = (HistoryDataset.open(str(folder / name)) for name in ("grown", "older"))
    settings, url = settings_of(SHARDED), str(folder / "models" / "of the grown")
    export_older(grown, url, settings.model)
    with pytest.raises(UserError, match="its 43 items are not the first ones"):
        find_start(url, settings.model, older)
