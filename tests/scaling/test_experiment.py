"""The file of an experiment, and the points that it means."""

from dataclasses import replace

import pytest
import yaml

from recgpt.errors import UserError
from recgpt.scaling.experiment import (
    Experiment,
    MadeUpDataset,
    identity,
    load_experiment,
    points_of,
    swept_keys,
)

DATASET = MadeUpDataset(users=10, items=20, lengths=(3, 4))


def points(**values):
    return points_of(Experiment(dataset=DATASET, **values), "mine")


@pytest.mark.parametrize("name", ["weak", "strong", "table_rows", "zero_stages"])
def test_every_shipped_experiment_has_points(name):
    assert len(points_of(load_experiment(name), name)) >= 3


def test_every_combination_is_a_point_and_so_is_what_is_listed():
    grid = {"workers": [1, 2], "model.width": [32, 64]}
    found = points(grid=grid, points=[{"deepspeed": "zero3"}, {"workers": 2, "model.width": 64}])
    assert [point.label for point in found] == [
        "workers=1 model.width=32",
        "workers=1 model.width=64",
        "workers=2 model.width=32",
        "workers=2 model.width=64",
        "deepspeed=zero3",
    ], "what is there twice is one point"
    assert [point.settings.model.width for point in found] == [32, 64, 32, 64, 128]
    assert swept_keys(found) == ["workers", "model.width", "deepspeed"]
    assert found[4].value("model.width") == 128, "what a point does not name it has all the same"


def test_without_grid_and_points_the_settings_are_the_point():
    (point,) = points(settings={"model": {"width": 16}, "loss.kind": "full"})
    assert (point.settings.model.width, point.settings.loss.kind) == (16, "full")
    assert point.settings.stages == ("pretrain",)
    assert point.told == {}


def test_work_of_each_worker_stays_in_weak_scaling():
    found = points(settings={"tokens_per_worker": 100}, grid={"workers": [1, 3, 8]})
    assert [point.settings.data.tokens_per_batch for point in found] == [100, 300, 800]
    assert [point.settings.data.lanes for point in found] == [4, 4, 8], "at least one for each worker"
    assert found[2].value("tokens_per_worker") == 100


def test_datasets_differ_where_points_say_so():
    told = [{"items": 7}, {"lengths": [9, 30], "model.max_history": 30}]
    found = points(points=told)
    assert [point.dataset for point in found] == [
        MadeUpDataset(10, 7, (3, 4)),
        MadeUpDataset(10, 20, (9, 30)),
    ]
    assert found[1].label == "lengths=9,30 model.max_history=30"
    assert found[0].value("lengths") == (3, 4)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"grid": {"model.widht": [1]}}, "unknown key model.widht; the nearest known one is model.width"),
        ({"settings": {"item": 3}}, "unknown key item; the nearest known one is items"),
        ({"settings": {"model": 3}}, "unknown key model; the nearest known one is model"),
        ({"grid": {"model.width": [33]}}, "mine, model.width=33: model: heads=2 does not divide width=33"),
        ({"grid": {"workers": ["two"]}}, "workers=two: workers: .*valid integer"),
        ({"grid": {"items": [0]}}, "items=0: items: .*greater than 0"),
        ({"settings": {"tokens_per_worker": "many"}}, "tokens_per_worker is no whole number"),
        (
            {"settings": {"tokens_per_worker": 5, "data.tokens_per_batch": 5}},
            "tokens_per_worker and data.tokens_per_batch contradict each other",
        ),
    ],
)
def test_what_is_wrong_with_a_point_is_told(values, problem):
    with pytest.raises(UserError, match=problem):
        points(**values)


def test_a_prepared_dataset_is_what_it_is():
    experiment = Experiment(dataset="data/mine", grid={"items": [5]})
    with pytest.raises(UserError, match="items is of made-up datasets, and data/mine is a prepared one"):
        points_of(experiment, "mine")
    (point,) = points_of(replace(experiment, grid={}), "mine")
    assert (point.dataset, point.value("items")) == ("data/mine", None)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dataset": "data/mine", "repeat": 3}, "unknown setting repeat; the nearest known one is repeats"),
        (
            {"dataset": {"users": 3, "items": 4, "lengths": [3], "item": 4}},
            "dataset: unknown setting item; the nearest known one is items",
        ),
        ({"dataset": {"users": 3, "items": 4, "lengths": [1]}}, "lengths: .*greater than or equal to 2"),
        ({"dataset": {"users": 3, "items": 4, "lengths": []}}, "lengths: .*at least 1 item"),
        ({"dataset": "data/mine", "steps": 0}, "steps: .*greater than 0"),
        ({}, "dataset: Field required"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, values, problem):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=problem):
        load_experiment(str(file))


def test_a_name_that_nothing_has():
    with pytest.raises(UserError, match="no shipped file has that name; shipped are .*strong.*weak"):
        load_experiment("week")


def test_a_measurement_is_known_by_all_that_it_depends_on():
    experiment = Experiment(dataset=DATASET, grid={"workers": [1, 2]})
    first, second = points_of(experiment, "mine")
    known = identity(experiment, first, "dataset")
    assert known == identity(replace(experiment, repeats=9, timeout_seconds=1), first, "dataset")
    others = [
        identity(experiment, second, "dataset"),
        identity(experiment, first, "another dataset"),
        identity(replace(experiment, steps=21), first, "dataset"),
        identity(replace(experiment, checkpoint=True), first, "dataset"),
    ]
    assert len({known, *others}) == 5
