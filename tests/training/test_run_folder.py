"""The folder of a run: begun, gone on with, replaced, and refused where it is not the same run."""

import json
import uuid

import pytest

from recgpt import storage
from recgpt.config import DataSettings, ModelSettings, TrainSettings
from recgpt.errors import UserError
from recgpt.training.checkpoint import checkpoint_name
from recgpt.training.run_folder import (
    begin_attempt,
    check_attempt,
    finish_run,
    finished_stages,
    open_run,
    read_metrics,
    write_metrics,
)

SETTINGS = TrainSettings()
OTHER_MODEL = TrainSettings(model=ModelSettings(width=32))


ALL_STAGES = {"stages": {"pretrain": {}, "prompt_tune": {}}}


def open_with(run, settings=SETTINGS, fingerprint="items-1", overwrite=False, start_from=None):
    return open_run(str(run), settings, fingerprint, overwrite, start_from)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def unfinished(tmp_path):
    run = tmp_path / "run"
    open_with(run)
    (run / "work").write_text("half")
    (run / "checkpoints" / checkpoint_name(1, 0)).mkdir(parents=True)
    (run / "checkpoints" / checkpoint_name(1, 0) / "manifest.json").write_text("{}")
    return run


@pytest.fixture
def finished(unfinished):
    finish_run(str(unfinished), str(unfinished), ALL_STAGES)
    return unfinished


def test_a_new_run_states_its_settings(tmp_path):
    assert open_with(tmp_path / "deep" / "run") == str(tmp_path / "deep" / "run")
    identity = json.loads((tmp_path / "deep" / "run" / "settings.json").read_text())
    assert identity["dataset_fingerprint"] == "items-1"
    assert identity["settings"]["model"]["width"] == TrainSettings().model.width
    assert not finished_stages(str(tmp_path / "deep" / "run"))


def test_an_empty_folder_may_become_a_run(tmp_path):
    assert open_with(tmp_path) == str(tmp_path)


def test_an_unfinished_run_goes_on_with_the_same_settings(unfinished):
    assert open_with(unfinished) == str(unfinished)
    assert (unfinished / "work").read_text() == "half"


def test_an_unfinished_run_begins_again_on_demand(unfinished):
    assert open_with(unfinished, overwrite=True) == str(unfinished)
    assert set(contents(unfinished)) == {"settings.json"}


def test_a_run_is_gone_on_with_for_the_next_stage(unfinished):
    pretrain, prompt_tune = TrainSettings(stages=("pretrain",)), TrainSettings(stages=("prompt_tune",))
    finish_run(str(unfinished), str(unfinished), {"stages": {"pretrain": {}}})
    assert open_with(unfinished, pretrain) is None, "it is finished"
    assert open_with(unfinished, prompt_tune) == str(unfinished)
    assert open_with(unfinished, SETTINGS) == str(unfinished)
    assert (unfinished / "work").read_text() == "half"


def test_prompt_tuning_alone_needs_a_run_to_begin_with(tmp_path):
    with pytest.raises(UserError, match="prompt_tune needs a pre-trained run"):
        open_with(tmp_path / "run", TrainSettings(stages=("prompt_tune",)))
    assert not (tmp_path / "run").exists()


def test_prompt_tuning_alone_may_start_from_an_older_model(tmp_path):
    prompt_tune = TrainSettings(stages=("prompt_tune",))
    assert open_with(tmp_path / "run", prompt_tune, start_from="model-1") == str(tmp_path / "run")


def test_a_run_goes_on_from_the_model_that_it_started_from_alone(tmp_path, unfinished):
    with pytest.raises(UserError, match="holds a run with another start_from_fingerprint;"):
        open_with(unfinished, start_from="model-1")
    run = tmp_path / "started"
    open_with(run, start_from="model-1")
    storage.write_json(str(run / "checkpoints" / checkpoint_name(1, 0) / "manifest.json"), {})
    assert open_with(run, start_from="model-1") == str(run)
    for other in ("model-2", None):
        with pytest.raises(UserError, match="holds a run with another start_from_fingerprint;"):
            open_with(run, start_from=other)


def test_a_run_whose_settings_name_no_older_model_goes_on(unfinished):
    identity = json.loads((unfinished / "settings.json").read_text())
    del identity["start_from_fingerprint"]
    (unfinished / "settings.json").write_text(json.dumps(identity))
    assert open_with(unfinished) == str(unfinished)


def test_what_only_changes_the_speed_may_differ(unfinished):
    faster = TrainSettings(
        workers=4, threads_per_worker=2, deepspeed="zero2", keep_checkpoints=1, checkpoint_every_steps=5
    )
    assert open_with(unfinished, faster) == str(unfinished)
    assert (unfinished / "work").exists()
    assert json.loads((unfinished / "settings.json").read_text())["settings"]["workers"] == 4


@pytest.mark.parametrize(
    ("settings", "fingerprint", "key"),
    [
        (OTHER_MODEL, "items-1", "settings.model.width"),
        (TrainSettings(seed=1), "items-1", "settings.seed"),
        (TrainSettings(data=DataSettings(lanes=8), workers=8), "items-1", "settings.data.lanes"),
        (SETTINGS, "items-2", "dataset_fingerprint"),
        # What may differ must not hide what may not.
        (TrainSettings(workers=2), "items-2", "dataset_fingerprint"),
        (TrainSettings(deepspeed="zero3", seed=1), "items-1", "settings.seed"),
    ],
)
def test_an_unfinished_run_with_other_settings_is_refused_by_the_name_of_the_key(
    unfinished, settings, fingerprint, key
):
    before = contents(unfinished)
    with pytest.raises(UserError, match=f"holds a run with another {key};"):
        open_with(unfinished, settings, fingerprint)
    assert contents(unfinished) == before


def test_a_run_without_a_checkpoint_has_nothing_to_lose(tmp_path):
    run = tmp_path / "run"
    open_with(run)
    assert open_with(run, OTHER_MODEL) == str(run)
    assert json.loads((run / "settings.json").read_text())["settings"]["model"]["width"] == 32


def test_a_finished_run_without_checkpoints_is_kept(finished):
    storage.remove(str(finished / "checkpoints"))
    before = contents(finished)
    with pytest.raises(UserError, match="holds a run with another"):
        open_with(finished, OTHER_MODEL)
    assert contents(finished) == before


def test_an_unfinished_run_with_other_settings_is_overwritten_on_demand(unfinished):
    assert open_with(unfinished, OTHER_MODEL, overwrite=True) == str(unfinished)
    assert set(contents(unfinished)) == {"settings.json"}


def test_damaged_settings_are_an_error_of_the_folder(unfinished):
    (unfinished / "settings.json").write_text('{"settings": ')
    with pytest.raises(UserError, match="settings.json: not valid JSON"):
        open_with(unfinished)


def test_a_foreign_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="already holds something"):
        open_with(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": "precious"}
    beside = open_with(tmp_path, overwrite=True)
    assert contents(tmp_path) == {"thesis.txt": "precious"}, "until the new run is finished"
    finish_run(beside, str(tmp_path), ALL_STAGES)
    assert set(contents(tmp_path)) == {"settings.json", "manifest.json"}


def test_a_finished_run_is_left_as_it_is(finished):
    assert finished_stages(str(finished))
    before = contents(finished)
    assert open_with(finished) is None
    with pytest.raises(UserError, match="--restart"):
        open_with(finished, OTHER_MODEL)
    assert contents(finished) == before


def test_who_takes_a_folder_over_keeps_others_from_writing(tmp_path):
    first = begin_attempt(str(tmp_path))
    check_attempt(str(tmp_path), first)
    second = begin_attempt(str(tmp_path))
    check_attempt(str(tmp_path), second)
    with pytest.raises(UserError, match="another run has taken over"):
        check_attempt(str(tmp_path), first)
    storage.remove(str(tmp_path))
    with pytest.raises(UserError, match="another run has taken over"):
        check_attempt(str(tmp_path), second)


def test_a_finished_run_is_replaced_only_when_the_new_one_finished_stages(finished):
    before = contents(finished)
    beside = open_with(finished, OTHER_MODEL, overwrite=True)
    assert beside != str(finished)
    storage.write_bytes(storage.join(beside, "work"), b"new")
    assert contents(finished) == before

    assert open_with(finished, OTHER_MODEL, overwrite=True) == beside, "an interrupted replacement goes on"
    assert storage.read_bytes(storage.join(beside, "work")) == b"new"

    finish_run(beside, str(finished), {"stages": {"pretrain": 1}})
    assert (finished / "work").read_text() == "new"
    assert json.loads((finished / "manifest.json").read_text()) == {"stages": {"pretrain": 1}}
    assert [path.name for path in finished.parent.iterdir()] == [finished.name]


def test_an_abandoned_replacement_with_other_settings_does_not_stay_in_the_way(finished):
    beside = open_with(finished, OTHER_MODEL, overwrite=True)
    storage.write_bytes(storage.join(beside, "work"), b"new")
    assert open_with(finished, TrainSettings(seed=9), overwrite=True) == beside
    assert storage.list_names(beside) == ["settings.json"]


def test_what_a_killed_replacement_left_over_does_not_stay_in_the_way(finished):
    left_over = finished.with_name(f".{finished.name}.previous")
    left_over.mkdir()
    (left_over / "work").write_text("older")
    beside = open_with(finished, overwrite=True)
    finish_run(beside, str(finished), ALL_STAGES)
    assert [path.name for path in finished.parent.iterdir()] == [finished.name]
    assert not (finished / "work").exists()


def test_on_an_object_store_a_finished_run_is_cleared_before_it_is_replaced():
    """With the same settings too: asked to overwrite, it must not go on with the old checkpoints."""
    run = f"memory://{uuid.uuid4().hex}/run"
    open_with(run)
    storage.write_bytes(storage.join(run, "checkpoints", "old"), b"old")
    finish_run(run, run, ALL_STAGES)
    assert finished_stages(run)
    assert open_with(run, overwrite=True) == run
    assert not finished_stages(run)
    assert storage.list_names(run) == ["settings.json"]


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    assert read_metrics(str(tmp_path), until_step=10) == []
    lines = [{"step": 5, "loss": 2.5}, {"step": 10, "stage": "pretrain"}, {"step": 11}]
    write_metrics(str(tmp_path), lines)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert read_metrics(str(tmp_path), until_step=10) == lines[:2]
    assert read_metrics(str(tmp_path), until_step=11) == lines
    write_metrics(str(tmp_path), [])
    assert read_metrics(str(tmp_path), until_step=11) == []
