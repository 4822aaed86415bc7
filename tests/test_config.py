"""Settings: defaults, overrides, ranges, unknown keys, and every file that ships."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.config import ItemTableSettings, ModelSettings, RecallSettings, TrainSettings
from recgpt.errors import UserError
from recgpt.settings_reading import from_dict, known_keys, load_train_settings, shipped_file, to_dict

REPOSITORY = Path(__file__).parent.parent


def test_without_a_file_the_defaults_hold():
    assert load_train_settings(None) == TrainSettings()


def test_a_file_and_overrides_add_up(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\nmodel:\n  width: 32\n  layers: 3\n")

    settings = load_train_settings(
        str(path), ["model.width=128", "stages=[pretrain]", "recall.quotas=[15, 5]"]
    )

    assert settings.seed == 7
    assert settings.model.layers == 3
    assert settings.model.width == 128
    assert settings.stages == ("pretrain",)
    assert settings.recall.quotas == (15, 5)
    assert settings.model.heads == ModelSettings().heads


def test_an_empty_file_means_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert load_train_settings(str(path)) == TrainSettings()


def test_decay_of_whole_weights_is_refused():
    rates = ["pretrain.optimizer.table_learning_rate=0.5", "pretrain.optimizer.weight_decay=2"]
    with pytest.raises(UserError, match="weight_decay=2 times the learning rate 0.5 is not below 1"):
        load_train_settings(None, rates)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.widht=64", "model.width"),
        ("workes=2", "workers"),
        ("pretrain.optimizer.learning_rat=1", "pretrain.optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override, nearest):
    with pytest.raises(UserError) as caught:
        load_train_settings(None, [override])
    key = override.partition("=")[0]
    assert f"unknown setting {key}; the nearest known one is {nearest}" in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "model.width=0",
        "model.width=many",
        "model.dropout=1.5",
        "model.heads=3",
        "model.members=0",
        "recall.k=10",
        "data.lanes=0",
        "workers=5",
        "stages=[pre_train]",
        "validation.metric=recall@10",
        "model=3",
        "seed=-1",
    ],
)
def test_a_wrong_value_is_a_user_error_of_one_line_that_names_the_origin(override):
    with pytest.raises(UserError) as caught:
        load_train_settings(None, [override])
    assert str(caught.value).startswith("--set: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["workers", "=2", "seed.deeper=1", "model=[1"])
def test_a_malformed_override_is_a_user_error(override, tmp_path):
    path = tmp_path / "seed.yaml"
    path.write_text("seed: 7\n")
    with pytest.raises(UserError, match="--set"):
        load_train_settings(str(path), [override])


@pytest.mark.parametrize("text", ["[1, 2]", "just text", "a: [1", "!!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_settings_is_a_user_error(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_train_settings(str(path))


def test_a_missing_file_names_the_shipped_ones():
    with pytest.raises(UserError, match="shipped are .*quickstart"):
        load_train_settings("quikstart")


def test_a_folder_does_not_hide_a_shipped_file_of_its_name(tmp_path, monkeypatch):
    by_name = load_train_settings("quickstart")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load_train_settings("quickstart") == by_name


def test_a_folder_is_no_settings(tmp_path):
    with pytest.raises(UserError, match="is a folder, and no shipped file has that name"):
        load_train_settings(str(tmp_path))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_by_its_name(path):
    settings = load_train_settings(path.stem)
    assert from_dict(TrainSettings, to_dict(settings), "again") == settings
    assert shipped_file("deepspeed_configs", settings.deepspeed, ".json").endswith(".json")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "deepspeed_configs").glob("*.json")), ids=lambda path: path.stem
)
def test_every_shipped_deepspeed_config_loads_by_its_name(path):
    from recgpt.training.engine import read_deepspeed_config

    assert read_deepspeed_config(path.stem)["zero_optimization"]["stage"] in (0, 1, 2, 3)


def test_known_keys_are_the_leaves():
    assert known_keys(ItemTableSettings) == [field.name for field in dataclasses.fields(ItemTableSettings)]
    keys = known_keys(TrainSettings)
    assert "model.user.buckets" in keys
    assert "model" not in keys


@given(
    quotas=st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=5),
    difference=st.integers(-3, 3),
)
def test_quotas_must_sum_to_k(quotas, difference):
    k = sum(quotas) + difference
    if difference == 0:
        assert RecallSettings(k=k, quotas=tuple(quotas)).k == k
    else:
        with pytest.raises(UserError, match=r"k"):
            from_dict(RecallSettings, {"k": k, "quotas": quotas}, "here")


@given(
    seed=st.integers(min_value=0, max_value=2**31),
    dropout=st.floats(min_value=0.0, max_value=1.0),
    heads=st.sampled_from([1, 2, 4]),
)
def test_settings_survive_the_way_through_plain_dictionaries(seed, dropout, heads):
    settings = TrainSettings(seed=seed, model=ModelSettings(dropout=dropout, heads=heads))
    assert from_dict(TrainSettings, to_dict(settings), "there and back") == settings
