"""The checkpoints' benchmark with a table of a few hundred items: what it counts and writes, not how fast."""

import pytest

from benchmarks import checkpoints
from benchmarks.checkpoints import WAYS, Size

TINY = Size(num_items=300, width=8, negatives=16, tokens=32, steps=2, rounds=2)


@pytest.mark.slow
@pytest.mark.distributed
def test_checkpoints(capsys):
    result = checkpoints.measure(TINY)
    for way in WAYS:
        # 301 rows of 8 values and of two moments, and a number of steps, and the GPT.
        assert result[way]["bytes"] > 301 * (3 * 8 * 4 + 8)
        assert all(value > 0 for value in result[way].values())
    assert result["at once"]["pause_seconds"] >= result["at once"]["write_seconds"]
    checkpoints.show(TINY, result)
    assert "300 items" in capsys.readouterr().out
