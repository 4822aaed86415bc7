"""The benchmark of both training stages with a few histories: what it counts and does, not how fast."""

import numpy as np
import pytest
import torch

from benchmarks import training_speed
from benchmarks.stage_ranks import EVERY_POSITION, INTERLEAVED, PLAIN, PROMPTED, pass_for_every_position
from benchmarks.training_speed import Size, summarize_batches, summarize_epochs
from recgpt.config import STAGES, PromptSettings, TrainSettings
from recgpt.data.packing import Histories, pack
from recgpt.data.sequences import split_histories
from recgpt.scaling.made_up_histories import write_dataset
from recgpt.settings_reading import from_dict
from recgpt.training.model import build_model
from recgpt.training.prompts import plain_batch, prompted_batch

TINY = Size(widths=(8,), num_users=600, num_items=40, tokens=256, epochs=2, batches=2)


def test_a_pass_for_every_position_generates_what_one_pass_does(tmp_path):
    dataset = write_dataset(tmp_path, 20, np.array([2, 3, 9]), num_items=30)
    settings = from_dict(TrainSettings, {"model": {"width": 8, "members": 1}}, "test")
    model = build_model(settings, dataset, torch.device("cpu")).eval()
    histories = split_histories(dataset.read_row_group(dataset.row_groups[0]), settings.data.split, "train")
    packed = pack(Histories.from_table(histories), settings.model.max_history)
    plain = plain_batch(model, packed, settings, 0, torch.device("cpu"))
    everywhere = PromptSettings(interleaved_share=1.0, last_share=0.0, train_from_rank=None)
    prompted = prompted_batch(model, plain, packed.user_hash_B, everywhere, (0, 0))
    generated = pass_for_every_position(model, plain)
    is_last = torch.zeros(len(generated), dtype=torch.bool)
    is_last[plain.offsets[1:] - 1] = True  # nothing follows the last input, so that no guess does
    assert torch.equal(generated[~is_last], prompted.item_index_T[prompted.segment_T == 1])


def test_epochs_are_summed_up_without_the_first():
    epochs = [
        {"stage": stage, "sequences": 10, "targets": 30, "seconds": 9, "cpu_seconds": seconds}
        for stage, all_seconds in (("pretrain", (7, 2, 4)), ("prompt_tune", (7, 6, 6)))
        for seconds in all_seconds
    ]
    pretrain, prompt_tune = summarize_epochs(epochs)
    assert (pretrain["targets_per_cpu_second"], pretrain["ratio"]) == (10, 1)
    assert (prompt_tune["sequences_per_cpu_second"], prompt_tune["ratio"]) == (10 / 6, 2)


def test_ways_are_compared_batch_by_batch():
    seconds = [{PLAIN: 1, PROMPTED: 2}, {PLAIN: 2, PROMPTED: 6}, {PLAIN: 2, PROMPTED: 5}]
    rows = summarize_batches([{"cpu_seconds": one, "longest": 4} for one in seconds])
    assert [(row["way"], row["cpu_seconds"], row["ratio"]) for row in rows] == [
        (PLAIN, 2, 1),
        (PROMPTED, 5, 2.5),
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_both_stages_are_measured(tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_text("".join(f"{user} {' '.join(map(str, range(5 + user % 4)))}\n" for user in range(12)))
    result = training_speed.measure(log, TINY)
    assert [(row["width"], row["stage"]) for row in result["stages"]] == [(8, stage) for stage in STAGES]
    ways = (PLAIN, PROMPTED, INTERLEAVED, EVERY_POSITION)
    assert [(row["width"], row["way"]) for row in result["ways"]] == [(8, way) for way in ways]
    assert all(row["ratio"] > 0 and row["cpu_seconds"] > 0 for row in result["stages"] + result["ways"])
    assert result["stages"][0]["ratio"] == result["ways"][0]["ratio"] == 1
    training_speed.show(TINY, result)
    assert "600 users" in capsys.readouterr().out
