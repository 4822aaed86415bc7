"""`recgpt train --start-from`: from a finished run to one on a dataset that has grown."""

import json
import shutil

import pytest
import torch

from ray_jobs.prepare import run_prepare
from ray_jobs.train import run_train
from recgpt.config import TrainSettings
from recgpt.errors import UserError
from recgpt.model.export import load_model, model_fingerprint
from recgpt.settings_reading import from_dict
from tests.ray_jobs.logs import csv_of

OLD_ITEMS, NEW_ITEMS = 12, 4
SETTINGS = {
    "workers": 2,
    "model": {
        "width": 8,
        "members": 1,
        "layers": 1,
        "heads": 2,
        "max_history": 8,
        "dropout": 0.0,
        "user": {"kind": "table"},
    },
    "item_table": {"placement": "sharded"},
    "data": {"tokens_per_batch": 64, "lanes": 2},
    "pretrain": {"max_epochs": 2, "optimizer": {"learning_rate": 0.01}},
    "prompt_tune": {"max_epochs": 1},
}


def settings_of(**overrides) -> TrainSettings:
    return from_dict(TrainSettings, SETTINGS | overrides, "test")


# A rate so small that what the run began with still shows.
STILL = settings_of(
    stages=["prompt_tune"], prompt_tune={"max_epochs": 1, "optimizer": {"learning_rate": 1e-9}}
)


def walks(num_users: int, num_items: int, first: int) -> list[tuple[str, str, int]]:
    """A log in which each user takes six items in a row, from the given place on."""
    return [
        (f"user-{user}", f"item-{(user + place) % num_items}", 1_700_000_000 + place)
        for user in range(num_users)
        for place in range(first, first + 6)
    ]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, local_ray):
    """An older dataset, the one that it has grown to, and a run on each; the second starts from the first."""
    folder = tmp_path_factory.mktemp("start-from")
    older, grown = str(folder / "older"), str(folder / "grown")
    (folder / "january.csv").write_text(csv_of(walks(24, OLD_ITEMS, first=0)))
    (folder / "february.csv").write_text(csv_of(walks(40, OLD_ITEMS + NEW_ITEMS, first=6)))
    run_prepare([str(folder / "january.csv")], older)
    run_prepare([str(folder / "february.csv")], grown, append=older)
    run_train(older, str(folder / "old-run"), settings_of(stages=["pretrain"]))
    run_train(grown, str(folder / "new-run"), STILL, start_from=str(folder / "old-run"))
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_the_new_run_has_what_the_older_one_has_learned(paths):
    older, older_gpt, older_items_RD = load_model(str(paths / "old-run" / "model"))
    newer, gpt, items_RD = load_model(str(paths / "new-run" / "model"))
    assert (older.num_items, newer.num_items) == (OLD_ITEMS, OLD_ITEMS + NEW_ITEMS)
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(items_RD[: OLD_ITEMS + 1], older_items_RD, **close)
    users = older_gpt.known_users.hashes
    torch.testing.assert_close(
        gpt.user(gpt.user_rows(users)), older_gpt.user(older_gpt.user_rows(users)), **close
    )
    assert len(gpt.known_users.hashes) == 40


@pytest.mark.ray
@pytest.mark.slow
def test_the_new_run_names_the_model_that_it_started_from(paths):
    model = str(paths / "old-run" / "model")
    manifest, settings = (
        json.loads((paths / "new-run" / name).read_text()) for name in ("manifest.json", "settings.json")
    )
    assert manifest["started_from"] == {"url": model, "fingerprint": model_fingerprint(model)}
    assert list(manifest["stages"]) == ["prompt_tune"]
    assert settings["start_from_fingerprint"] == model_fingerprint(model)
    assert json.loads((paths / "old-run" / "manifest.json").read_text())["started_from"] is None


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_has_begun_goes_on_from_a_copy_of_the_model_but_from_no_other(paths, tmp_path):
    shutil.copytree(paths / "new-run", tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    shutil.copytree(paths / "old-run" / "model", tmp_path / "copy")
    call = {"dataset": str(paths / "grown"), "output": str(tmp_path / "run"), "settings": STILL}
    with pytest.raises(UserError, match="holds a run with another start_from_fingerprint"):
        run_train(**call, start_from=str(paths / "new-run"))
    with pytest.raises(UserError, match="holds a run with another start_from_fingerprint"):
        run_train(**call)
    assert run_train(**call, start_from=str(tmp_path / "copy"))["stages"]["prompt_tune"]["epochs"] == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_is_not_overwritten_while_another_starts_from_it(paths):
    run = str(paths / "old-run")
    with pytest.raises(UserError, match=r"overlaps .*old-run.*choose another folder"):
        run_train(str(paths / "grown"), run, settings_of(), start_from=run, restart=True)
    assert (paths / "old-run" / "manifest.json").exists()
