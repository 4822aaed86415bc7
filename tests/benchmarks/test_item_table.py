"""The item table's benchmark with tables of a few hundred items: what it counts and writes, not how fast."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import item_table
from benchmarks.item_table import Part, Size

TINY = Size(
    width=8,
    items=(100, 200),
    items_of_rivals=300,
    tokens=(32, 64),
    negatives=16,
    steps=2,
    engine_steps=1,
)


@pytest.mark.slow
@pytest.mark.distributed
def test_growing_table(capsys):
    result = item_table.measure_size(TINY)
    assert [table["items"] for table in result["tables"]] == [100, 200]
    smallest, larger = result["tables"]
    # 100 items x (8 values + 1 of state) x 4 bytes, on two ranks.
    assert smallest["peak_bytes"] - result["fixed_bytes"] == 1800
    assert larger["share_of_expected"] == larger["peak_bytes"] / (3600 + result["fixed_bytes"])
    for table in result["tables"]:
        assert len(table["steps"]) == len(TINY.tokens)
        for tokens, step in zip(TINY.tokens, table["steps"], strict=True):
            drawn = TINY.negatives + 2 * 2 * tokens  # with inputs and targets of both ranks
            assert 0 < step["updated_rows"] <= min(drawn, table["items"])
            assert all(step[key] > 0 for key in step)
    item_table.print_size(TINY, result)
    assert "128 tokens" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.distributed
def test_table_inside_the_engine(capsys):
    result = item_table.measure_engine(TINY)
    assert list(result) == ["sharded", "zero1", "zero2", "zero3"]
    for side in result.values():
        assert len(side["seconds"]) == len(TINY.tokens)
        assert 0 <= side["added_bytes"] < side["peak_bytes"]
    item_table.print_engine(TINY, result)
    assert "zero3" in capsys.readouterr().out


@pytest.mark.distributed
def test_traffic(capsys):
    result = item_table.measure_traffic(TINY)
    assert [(row["row_dtype"], row["items"]) for row in result] == [
        ("float32", 100),
        ("float32", 200),
        ("bfloat16", 100),
        ("bfloat16", 200),
    ]
    single, half = result[0], result[2]
    assert single["unique_ids"] == half["unique_ids"], "the same batch"
    assert single["all_to_all"] == single["unique_ids"] * (8 + 2 * 8 * 4)
    assert half["all_to_all"] == half["unique_ids"] * (8 + 2 * 8 * 2)
    item_table.print_traffic(TINY, result)
    assert f"{single['all_to_all']:,}" in capsys.readouterr().out


def test_parts_are_chosen_and_written(monkeypatch, tmp_path):
    fakes = {
        part: (lambda size, part=part: {"of": part.value}, lambda size, result: print("shown", result["of"]))
        for part in Part
    }
    monkeypatch.setattr(item_table, "PARTS", fakes)
    call = ["--part", "traffic", "--part", "size", "--json", str(tmp_path / "new" / "result.json")]
    app = item_table.typer.Typer()
    app.command()(item_table.main)
    run = CliRunner().invoke(app, call)
    assert run.exit_code == 0, run.output
    assert run.output.split() == ["shown", "traffic", "shown", "size"]
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written["traffic"] == {"of": "traffic"}
    assert set(written) == {"machine", "traffic", "size"}
