"""The model of costs against what was measured: fitted to some points, wrong by so much on others."""

import json

import numpy as np
import pytest

from recgpt.errors import UserError
from recgpt.scaling import accuracy
from recgpt.scaling.accuracy import compare_model, features, median_error
from recgpt.scaling.made_up_histories import write_dataset
from recgpt.settings_reading import load_train_settings, to_dict

CONSTANTS = np.array([2e-11, 1e-10, 3e-9, 4e-4, 5e-3])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), 2_000, np.array([4, 9]), num_items=500).url


def row(dataset, *overrides):
    settings = load_train_settings(None, ["item_table.placement=sharded", *overrides])
    return {"point": " ".join(overrides), "settings": json.dumps(to_dict(settings)), "dataset": dataset}


def measured(dataset, cpus=2):
    """Points whose times are what the model says, but for the held-out ones, which take twice as long."""
    settings = [
        (f"workers={workers}", f"model.width={width}", f"data.tokens_per_batch={tokens}")
        for workers, width, tokens in [
            *[(1, 16, 256), (2, 16, 256), (4, 16, 256), (1, 64, 512), (2, 64, 512)],
            *[(4, 32, 512), (1, 32, 1024), (2, 128, 256), (4, 64, 1024)],
        ]
    ]
    points = []
    for number, overrides in enumerate(settings):
        one = row(dataset, *overrides)
        slower = 2 if number % 3 == 1 else 1
        points.append((one["point"], one, slower * float(features(one, cpus) @ CONSTANTS)))
    return points


def test_constants_are_those_of_the_fitted_points_and_the_error_that_of_the_others(monkeypatch, dataset):
    monkeypatch.setattr(accuracy, "_measured_points", lambda sweep: measured(dataset))
    compared = compare_model(["sweep"], cpus=2)
    assert [one.held_out for one in compared] == [False, True, False] * 3
    assert median_error(compared, held_out=False) == pytest.approx(0, abs=1e-6)
    assert median_error(compared, held_out=True) == pytest.approx(0.5)
    assert compared[1].error == pytest.approx(-0.5)


def test_what_a_step_is_a_sum_of(dataset):
    flops, moved, leaves, calls, one = features(row(dataset, "workers=1"), cpus=2)
    assert (leaves, calls, one) == (0, 0, 1), "one rank sends nothing"
    two = features(row(dataset, "workers=2"), cpus=2)
    assert two[0] == pytest.approx(flops / 2)
    assert two[2] > 0
    four = features(row(dataset, "workers=4"), cpus=2)
    assert four[0] == pytest.approx(flops / 2), "four ranks on two CPUs take turns"
    assert four[4] == 2


def test_too_few_points_are_refused(monkeypatch, dataset):
    monkeypatch.setattr(accuracy, "_measured_points", lambda sweep: measured(dataset)[:6])
    with pytest.raises(UserError, match="6 points are too few"):
        compare_model(["sweep"], cpus=2)
