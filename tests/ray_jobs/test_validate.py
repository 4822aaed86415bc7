"""`recgpt validate`: what is right, and every problem in one go."""

import pytest

from ray_jobs import validate
from recgpt.config import TrainSettings
from recgpt.errors import UserError
from recgpt.settings_reading import load_train_settings
from tests.ray_jobs.random_model import save_random_model

HISTORIES = {"a": [1, 2, 3, 4], "b": [5, 6, 7], "c": [1]}


@pytest.fixture
def dataset(tmp_path, write_dataset):
    return write_dataset(tmp_path / "data", HISTORIES)


def test_what_is_right_says_what_was_seen(tmp_path, dataset, capsys):
    model = str(save_random_model(tmp_path / "run", dataset))
    validate.command(config="quickstart", dataset=dataset.url, model=model)
    settings, of_dataset, of_model = capsys.readouterr().out.splitlines()
    assert settings == "ok       settings: quickstart, stages pretrain, prompt_tune, 1 workers"
    assert "3 users, 7 items; 2 users have an item held out for validation" in of_dataset
    assert "7 items of width 8" in of_model


def test_every_problem_is_told(tmp_path, dataset, capsys):
    (weights,) = (save_random_model(tmp_path / "run", dataset) / "model").glob("gpt*")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="^settings, dataset, model: not as it has to be; see above$"):
        validate.command(
            set_=["model.widht=3"], dataset=str(tmp_path / "absent"), model=str(tmp_path / "run")
        )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"problem  {one}" for one in ("settings", "dataset", "model")
    ]
    assert "model.width" in lines[0]
    assert "absent: no prepared dataset" in lines[1]
    with pytest.raises(UserError, match=r"gpt.safetensors: not the file that was written"):
        validate.check_model(str(tmp_path / "run"), None)


def test_a_damaged_page_of_a_dataset_is_found(tmp_path, dataset, capsys):
    (file,) = (tmp_path / "data" / "histories").glob("*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="^dataset: "):
        validate.command(dataset=dataset.url)
    assert "problem  dataset" in capsys.readouterr().out


def test_a_dataset_without_held_out_items_is_a_problem(tmp_path, write_dataset):
    short = write_dataset(tmp_path / "short", {"a": [1, 2], "b": [3]})
    with pytest.raises(UserError, match="no user has an item held out"):
        validate.check_dataset(short.url, TrainSettings())


def test_a_table_that_the_settings_cannot_train_is_a_problem(dataset):
    settings = load_train_settings(None, ["item_table.optimizer=adagrad"])
    with pytest.raises(UserError, match="a replicated table is trained by AdamW"):
        validate.check_dataset(dataset.url, settings)
    settings = load_train_settings(None, ["item_table.placement=sharded", "workers=50", "data.lanes=50"])
    with pytest.raises(UserError, match="items are too few to shard over 50 workers"):
        validate.check_dataset(dataset.url, settings)


def test_a_model_of_another_dataset_is_a_problem(tmp_path, dataset, write_dataset):
    other = write_dataset(tmp_path / "other", {"a": ["x", "y", "z"]})
    model = save_random_model(tmp_path / "run", dataset)
    with pytest.raises(UserError, match="trained on another vocabulary"):
        validate.check_model(str(model), other.url)
