"""The page of settings: whole, true, and as the dataclasses are now."""

import re
from pathlib import Path

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from recgpt.config import TrainSettings
from recgpt.data.prepare_settings import PrepareSettings
from recgpt.settings_reading import known_keys, load_train_settings
from recgpt.settings_reference import reference, settings_of

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
ROWS = re.findall(r"^\| `([\w.-]+)` \| [^|]+ \| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
SETTINGS = [(key, default) for key, default in ROWS if not key.startswith("--")]


def test_the_page_is_what_the_dataclasses_say():
    assert PAGE.read_text() == reference(), (
        "docs/settings.md is stale: python -m recgpt.settings_reference > docs/settings.md"
    )


def test_every_setting_has_one_row():
    assert sorted(key for key, _ in SETTINGS) == sorted(known_keys(TrainSettings))
    options = [key for key, _ in ROWS if key.startswith("--")]
    assert options == ["--" + key.replace("_", "-") for key in known_keys(PrepareSettings)]


@pytest.mark.parametrize(("key", "default"), SETTINGS)
def test_a_default_may_be_typed_as_it_stands(key, default):
    # Given to settings that are the defaults otherwise, it changes nothing.
    assert load_train_settings(None, [f"{key}={default}"]) == TrainSettings()


def test_a_row_tells_type_default_bounds_and_meaning():
    rows = {name: cells for name, *cells in settings_of(TrainSettings().recall)}
    assert rows["quotas"] == [
        "list of integer",
        "`[18, 2]`",
        "> 0",
        "Candidates taken by each recall step; their sum is `k`.",
    ]
    assert rows["keep_seen"][:3] == ["boolean", "`false`", ""]
    rates = {name: cells for name, *cells in settings_of(TrainSettings().pretrain.optimizer)}
    assert rates["table_learning_rate"][:3] == ["number or null", "`null`", "> 0"]
    assert rates["beta1"][:3] == ["number", "`0.9`", "≥ 0, < 1"]
    assert rates["decay"][:3] == ["string", "`linear`", "`constant`, `linear`"]


@dataclass
class Unexplained:
    explained: int = 1
    """What it is."""
    unexplained: int = Field(default=2)


def test_a_setting_without_a_meaning_is_an_error():
    with pytest.raises(KeyError, match="unexplained"):
        list(settings_of(Unexplained()))
