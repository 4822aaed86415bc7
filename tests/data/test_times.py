"""Units of timestamps, and instants on the command line."""

import numpy as np
import pytest

from recgpt.data.times import finest, parse_instant, recognise_unit
from recgpt.errors import UserError


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([99_999_999], None),
        ([100_000_000], "seconds"),
        ([99_999_999_999], "seconds"),
        ([100_000_000_000], "milliseconds"),
        ([100_000_000_000_000], "microseconds"),
        ([100_000_000_000_000_000], "nanoseconds"),
        ([-1_000_000_000], "seconds"),
        ([1_000_000_000, 1_000_000_001, 1_000_000_000_000], "seconds"),
        ([], None),
    ],
)
def test_each_magnitude_has_one_unit(times, unit):
    assert recognise_unit(np.array(times, np.int64)) == unit


def test_finest():
    assert finest(["seconds", "microseconds", "milliseconds"]) == "microseconds"


@pytest.mark.parametrize(
    ("text", "unit", "instant"),
    [
        ("1970-01-02", "seconds", 86_400),
        ("1970-01-02", "nanoseconds", 86_400_000_000_000),
        ("1970-01-01T01:00:00+01:00", "seconds", 0),
        ("1970-01-01 00:00:00.25", "milliseconds", 250),
        ("-5", "seconds", -5),
        ("7", None, 7),
    ],
)
def test_instants(text, unit, instant):
    assert parse_instant(text, unit, "--since") == instant


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ("20260101", "seconds", "--since 20260101: is this a date. write 2026-01-01"),
        ("yesterday", "seconds", "--since yesterday: expected an ISO date"),
        ("2026-01-01", None, "--since 2026-01-01: the log's times are plain numbers"),
    ],
)
def test_what_is_no_instant(text, unit, message):
    with pytest.raises(UserError, match=message):
        parse_instant(text, unit, "--since")
