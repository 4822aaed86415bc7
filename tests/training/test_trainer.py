"""Training on real gloo ranks: any number of workers, any ZeRO stage, either placement, resumed or not."""

import json
import math
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import read_unit
from recgpt.distributed import collectives
from recgpt.errors import UserError
from recgpt.settings_reading import from_dict, to_dict
from recgpt.training import checkpoint, run_folder
from recgpt.training import recorder as recorder_module
from recgpt.training.recorder import Recorder
from recgpt.training.trainer import train

NUM_ITEMS = 30

# Without dropout the ranks draw nothing, so that one rank and several compute the same.
SETTINGS = {
    "model": {
        "width": 8,
        "members": 1,
        "layers": 2,
        "heads": 2,
        "max_history": 6,
        "dropout": 0.0,
        "user": {"kind": "hashed", "buckets": 5},
    },
    "loss": {"block_items": 7},
    "data": {"tokens_per_batch": 24, "lanes": 4, "shuffle_window_users": 16},
    "pretrain": {"max_epochs": 3, "optimizer": {"learning_rate": 0.01, "warmup_steps": 5}},
    "prompt_tune": {"max_epochs": 2, "optimizer": {"learning_rate": 0.01, "warmup_steps": 0}},
    "prompts": {"interleaved_share": 0.4, "last_share": 0.4},
}
VARIANTS = {
    "zero1": {"deepspeed": "zero1", "item_table": {"placement": "replicated"}},
    "zero2": {"deepspeed": "zero2", "item_table": {"placement": "replicated"}},
    "zero3": {"deepspeed": "zero3", "item_table": {"placement": "replicated"}},
    "sharded-zero1": {"deepspeed": "zero1", "item_table": {"placement": "sharded"}},
    "sharded-zero3": {"deepspeed": "zero3", "item_table": {"placement": "sharded"}},
    "in parts": {"data": SETTINGS["data"] | {"micro_batches": 3}},
    "sharded-zero2, in parts": {
        "deepspeed": "zero2",
        "item_table": {"placement": "sharded"},
        "data": SETTINGS["data"] | {"micro_batches": 3},
    },
}
# float32, and sums over ranks in another order; Adam turns tiny differences of gradients into larger ones.
LOSS_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_dataset) -> str:
    """60 users who walk around a circle of items, in row groups of 9."""
    draw = random.Random(0)
    histories = {}
    for user in range(60):
        start, length = draw.randrange(NUM_ITEMS), draw.randrange(1, 12)
        histories[user] = [(start + place) % NUM_ITEMS for place in range(length)]
    histories[60] = list(range(NUM_ITEMS))  # every item is in the vocabulary
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=9).url


def clipped(overrides: dict) -> dict:
    """The same with a limit that most gradients of the first steps exceed."""
    stages = {
        stage: SETTINGS[stage] | {"optimizer": SETTINGS[stage]["optimizer"] | {"gradient_clipping": 0.3}}
        for stage in ("pretrain", "prompt_tune")
    }
    return overrides | stages


CLIPPED = {
    "clipped": clipped(VARIANTS["zero1"]),
    "clipped-sharded-zero1": clipped(VARIANTS["sharded-zero1"]),
    "clipped-sharded-zero3": clipped(VARIANTS["sharded-zero3"]),
    "clipped-sharded-zero2, in parts": clipped(VARIANTS["sharded-zero2, in parts"]),
}
USER_TABLE = SETTINGS["model"] | {"user": {"kind": "table"}, "members": 2}
PERSONAL = {
    "user table": VARIANTS["sharded-zero1"] | {"model": USER_TABLE},
    "user table, zero3": VARIANTS["zero3"] | {"model": USER_TABLE},
}
DRAWN = {
    "sampled": {
        "loss": {"kind": "sampled", "negatives": 16},
        "item_table": {"placement": "sharded", "optimizer": "adagrad"},
    },
    "binary": {"loss": {"kind": "binary"}, "item_table": {"placement": "sharded", "row_dtype": "bfloat16"}},
    "replicated": {
        "loss": {"kind": "sampled", "negatives": 16},
        "prompts": SETTINGS["prompts"] | {"pool_items": 8},
    },
}


class Interrupted(Exception):
    pass


def train_here(dataset_url: str, run: str, overrides: dict, stop_after: int | None = None) -> None:
    """Train in this process group and write every step's loss; ``stop_after``: break off after that step."""
    recorder_module.LOG_EVERY_STEPS = 1
    dataset = HistoryDataset.open(dataset_url)
    settings = from_dict(TrainSettings, {**SETTINGS, **overrides}, "test")

    def stop(line):
        if stop_after is not None and line["step"] == stop_after:
            raise Interrupted

    def read(units):
        return (read_unit(dataset, unit, settings.data.split, None) for unit in units)

    class EveryRankStops(Recorder):
        def step(self, state, figures):
            super().step(state, figures)
            stop({"step": state.step})

    Path(run).mkdir(exist_ok=True)
    try:
        train(settings, dataset, run, read, EveryRankStops(run, lambda line: None, lambda metrics: None))
    except Interrupted:
        assert stop_after is not None


ALONE = {"zero1", "sharded-zero3", "in parts", "clipped", "user table"}  # one worker has nothing to share


def trained(variants: dict, world_size: int) -> dict:
    """Those of the variants that this number of workers trains."""
    return {name: overrides for name, overrides in variants.items() if world_size > 1 or name in ALONE}


def train_variants(dataset_url: str, folder: str) -> None:
    world_size = collectives.world_size()
    for name, overrides in trained(VARIANTS | CLIPPED | PERSONAL, world_size).items():
        train_here(dataset_url, f"{folder}/{name}-{world_size}", overrides)


def metrics_of(run: str) -> list[dict]:
    return run_folder.read_metrics(run, until_step=10**9)


def losses_of(run: str) -> list[float]:
    return [line["loss"] for line in metrics_of(run) if line["kind"] == "train"]


def exported(run: str) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}: {key}": tensor
        for file in sorted(Path(run, "model").glob("*.safetensors"))
        for key, tensor in safetensors.torch.load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_workers_stages_and_placements_give_the_same_losses(dataset, run_ranks, tmp_path):
    """Same global batches, so same losses: 1 and 2 workers, ZeRO 1, 2, 3, table whole and sharded."""
    for world_size in (1, 2):
        run_ranks(train_variants, world_size, dataset, str(tmp_path))
    expected = losses_of(f"{tmp_path}/zero1-1")
    assert len(expected) > 40
    assert sum(expected[-10:]) < 0.9 * sum(expected[:10]), "it learns"
    assert_same_losses(tmp_path, VARIANTS, expected)
    # DeepSpeed alone clips where the table is replicated; elsewhere the table's gradient counts too.
    expected_clipped = losses_of(f"{tmp_path}/clipped-1")
    changes = [abs(one / other - 1) for one, other in zip(expected_clipped, expected, strict=True)]
    assert max(changes) > 100 * LOSS_TOLERANCE, "the limit was felt"
    assert_same_losses(tmp_path, CLIPPED, expected_clipped)
    assert_same_losses(tmp_path, PERSONAL, losses_of(f"{tmp_path}/user table-1"))
    assert_norms_are_of_all_workers(tmp_path)


def assert_norms_are_of_all_workers(folder):
    """Before clipping, and however the table lies: the engine's and the table's together are the same."""
    norms = {
        name: [
            math.hypot(line["gradient_norm"], line.get("table_gradient_norm", 0.0))
            for line in metrics_of(f"{folder}/{name}")
            if line["kind"] == "train"
        ]
        for name in ("zero1-1", "zero3-2", "sharded-zero1-2", "sharded-zero2, in parts-2")
    }
    expected = norms.pop("zero1-1")
    assert min(expected) > 0
    for name, found in norms.items():
        assert found == pytest.approx(expected, rel=0.01), name
    (last,) = [line for line in metrics_of(f"{folder}/sharded-zero1-2") if line["kind"] == "train"][-1:]
    assert 0 < last["communication_share"] < 1
    assert last["bytes_per_step"] > 0


def assert_same_losses(folder, variants, expected):
    for world_size in (1, 2):
        for name in trained(variants, world_size):
            losses = torch.tensor(losses_of(f"{folder}/{name}-{world_size}"))
            torch.testing.assert_close(
                losses, torch.tensor(expected), rtol=LOSS_TOLERANCE, atol=0, msg=f"{name}, {world_size}"
            )


RESUMED = {
    "sharded-zero3": VARIANTS["sharded-zero3"],
    "sampled, user table": DRAWN["sampled"] | {"model": USER_TABLE},
    "binary": DRAWN["binary"],
    "replicated": DRAWN["replicated"],
}


def resume_variants(dataset_url: str, folder: str) -> None:
    """Break off in the middle of an epoch of each stage, and go on; with dropout."""
    for name, variant in RESUMED.items():
        overrides = variant | {
            "model": variant.get("model", SETTINGS["model"]) | {"dropout": 0.3},
            "checkpoint_every_steps": 4,
            "keep_checkpoints": 1,
        }
        train_here(dataset_url, f"{folder}/{name}-whole", overrides)
        for stop_after in (6, 50):
            train_here(dataset_url, f"{folder}/{name}-resumed", overrides, stop_after)
        train_here(dataset_url, f"{folder}/{name}-resumed", overrides)


@pytest.mark.slow
@pytest.mark.distributed
def test_resumed_equals_uninterrupted_bit_for_bit(dataset, run_ranks, tmp_path):
    run_ranks(resume_variants, 2, dataset, str(tmp_path))
    for name in RESUMED:
        whole, resumed = (f"{tmp_path}/{name}-{kind}" for kind in ("whole", "resumed"))
        stages = {line["stage"] for line in metrics_of(whole) if line["step"] > 50}
        assert stages == {"prompt_tune"}, "the second interruption is in the second stage"
        assert losses_of(resumed) == losses_of(whole)
        expected = exported(whole)
        for key, tensor in exported(resumed).items():
            assert torch.equal(tensor, expected[key]), key


def stop_early(dataset_url: str, run: str) -> None:
    train_here(dataset_url, run, VARIANTS["sharded-zero1"] | {"checkpoint_every_steps": 4}, stop_after=30)


def go_on(dataset_url: str, run: str) -> None:
    train_here(dataset_url, run, VARIANTS["sharded-zero1"] | {"checkpoint_every_steps": 4})


@pytest.mark.distributed
def test_another_number_of_workers_goes_on_from_the_same_state(dataset, run_ranks, tmp_path):
    run_ranks(go_on, 1, dataset, f"{tmp_path}/whole")
    run_ranks(stop_early, 2, dataset, f"{tmp_path}/moved")
    run_ranks(go_on, 3, dataset, f"{tmp_path}/moved")
    torch.testing.assert_close(
        torch.tensor(losses_of(f"{tmp_path}/moved")),
        torch.tensor(losses_of(f"{tmp_path}/whole")),
        rtol=LOSS_TOLERANCE,
        atol=0,
    )


def steps_of_rank(dataset_url: str, folder: str) -> None:
    """Write which steps this rank took, and with how much loss of its own: none without data."""
    dataset = HistoryDataset.open(dataset_url)
    settings = from_dict(TrainSettings, SETTINGS | {"stages": ["pretrain"]}, "test")
    taken = []

    class Steps(Recorder):
        def step(self, state, figures):
            super().step(state, figures)
            taken.append((state.epoch, state.step, float(figures.loss_sum)))

    def read(units):
        return (read_unit(dataset, unit, settings.data.split, None) for unit in units)

    train(settings, dataset, folder, read, Steps(folder, lambda line: None, lambda metrics: None))
    Path(folder, f"steps-{collectives.rank()}.json").write_text(json.dumps(taken))


@pytest.mark.distributed
def test_all_ranks_take_every_step_also_one_that_has_nothing_left(write_dataset, run_ranks, tmp_path):
    """Four lanes over three ranks: the first has two of them, and all have other lengths."""
    (tmp_path / "dataset").mkdir()
    histories = {user: [(user + place) % NUM_ITEMS for place in range(3 + user % 9)] for user in range(41)}
    run = tmp_path / "run"
    run.mkdir()
    run_ranks(steps_of_rank, 3, write_dataset(tmp_path / "dataset", histories).url, str(run))
    ranks = [json.loads((run / f"steps-{rank}.json").read_text()) for rank in range(3)]
    steps = [[(epoch, step) for epoch, step, _ in taken] for taken in ranks]
    assert steps[0] == steps[1] == steps[2]
    assert {epoch for epoch, _ in steps[0]} == {0, 1, 2}
    assert any(loss == 0 for taken in ranks for _, _, loss in taken), "a rank had nothing left"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of this process alone; once, because DeepSpeed remembers the first for good."""
    store = tmp_path_factory.mktemp("one-rank") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ({1: [1, 2], 2: [2, 3]}, "no user has an item held out for validation"),
        ({1: [1, 2, 3], 2: [2, 3, 4]}, "no history has a training target"),
    ],
)
def test_a_log_that_teaches_nothing_is_refused(one_rank, write_dataset, tmp_path, histories, message):
    (tmp_path / "dataset").mkdir()
    dataset = write_dataset(tmp_path / "dataset", histories)
    with pytest.raises(UserError, match=message):
        train_here(dataset.url, str(tmp_path / "run"), VARIANTS["zero1"])
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_diverges_is_stopped(one_rank, dataset, tmp_path):
    diverging = {"pretrain": {"max_epochs": 3, "optimizer": {"learning_rate": 1e30, "warmup_steps": 0}}}
    with pytest.raises(UserError, match=r"diverged.*lower pretrain.optimizer.learning_rate"):
        train_here(dataset, str(tmp_path / "run"), VARIANTS["zero1"] | diverging)


def test_prompt_tuning_can_follow_later(one_rank, dataset, tmp_path):
    """Both stages in one go, or the second by a later call: the same model."""
    for stages in (["pretrain"], ["prompt_tune"]):
        train_here(dataset, str(tmp_path / "two"), VARIANTS["sharded-zero1"] | {"stages": stages})
    train_here(dataset, str(tmp_path / "one"), VARIANTS["sharded-zero1"])
    expected = exported(str(tmp_path / "one"))
    for key, tensor in exported(str(tmp_path / "two")).items():
        assert torch.equal(tensor, expected[key]), key


def test_checkpoints_that_a_resume_may_need_are_kept(one_rank, dataset, tmp_path):
    run = str(tmp_path / "run")
    train_here(dataset, run, VARIANTS["zero1"] | {"keep_checkpoints": 1, "checkpoint_every_steps": 4})
    kept = checkpoint.finished(run)
    state = checkpoint.load_state(run, kept[-1])
    best = {result["checkpoint"] for result in state["results"].values()}
    assert set(kept) == best | {kept[-1]}


def test_settings_survive_json():
    settings = from_dict(TrainSettings, SETTINGS, "test")
    assert from_dict(TrainSettings, json.loads(json.dumps(to_dict(settings))), "test") == settings
