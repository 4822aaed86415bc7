"""The exported model: what is written in pieces is loaded whole; what does not fit is named."""

import json

import pytest
import safetensors.torch
import torch

from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.errors import UserError
from recgpt.model.attention import Layout
from recgpt.model.export import (
    ModelInfo,
    check_finite,
    load_model,
    model_fingerprint,
    save_model,
    table_pieces,
)
from recgpt.model.gpt import GPT
from recgpt.model.users import KnownUsers, UserVectors

NUM_ITEMS, WIDTH = 10, 4
ITEMS = torch.arange((NUM_ITEMS + 1) * float(WIDTH)).view(-1, WIDTH)
USERS = KnownUsers(torch.tensor([-7, 3, 2**40]))
USER_ROWS = torch.arange(4.0 * WIDTH).view(-1, WIDTH) - 9


def make(user_kind="none"):
    torch.manual_seed(0)
    user = UserSettings(kind=user_kind)
    gpt = GPT(ModelSettings(width=WIDTH, members=1, layers=1, heads=2, max_history=5, user=user)).eval()
    return ModelInfo(NUM_ITEMS, "f" * 64, gpt.settings, SplitSettings(), RecallSettings(), "d" * 64), gpt


def save(folder, user_kind="none", user_rows=USER_ROWS):
    info, gpt = make(user_kind)
    users = (USERS, iter(user_rows.split(2))) if user_kind == "table" else ()
    save_model(str(folder), info, gpt.state_dict(), iter(ITEMS.split(4)), *users)
    return info, gpt


def as_older_release(folder):
    """The model as written before ``model.json`` had checksums."""
    description = json.loads((folder / "model.json").read_text())
    del description["sha256"]
    (folder / "model.json").write_text(json.dumps(description))


def test_what_is_exported_is_loaded(tmp_path):
    info, gpt = save(tmp_path)
    loaded_info, loaded, table_RD = load_model(str(tmp_path))
    assert loaded_info == info
    assert not loaded.training
    assert all(torch.equal(value, gpt.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(table_RD, ITEMS)
    assert (loaded.user, loaded.known_users) == (None, None)


def test_the_description_names_the_row_ranges(tmp_path):
    save(tmp_path, "table")
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["item_table"] == [
        {"file": f"item_table-{index:05d}.safetensors", "first_row": 4 * index, "rows": rows}
        for index, rows in enumerate([4, 4, 3])
    ]
    assert [entry["rows"] for entry in description["user_table"]] == [2, 2]
    named = {entry["file"] for table in ("item_table", "user_table") for entry in description[table]}
    written = {file.name for file in tmp_path.iterdir()}
    assert written == named | {"model.json", "gpt.safetensors", "users.safetensors"}


def test_a_table_of_users_comes_with_the_gpt(tmp_path):
    _, gpt = save(tmp_path, "table")
    _, loaded, _ = load_model(str(tmp_path))
    assert torch.equal(loaded.known_users.hashes, USERS.hashes)
    rows = loaded.user_rows(torch.tensor([2**40, 8, -7]))
    assert rows.tolist() == [3, 0, 1]
    assert torch.equal(loaded.user(rows), USER_ROWS[[3, 0, 1]])
    gpt.user = UserVectors(USER_ROWS)
    layout = Layout.from_offsets(torch.tensor([0, 1, 3, 4]))
    items = ITEMS[[5, 2, 8, 1]]
    assert torch.equal(loaded(items, layout, rows), gpt(items, layout, rows))


def test_a_model_without_a_table_of_users_has_no_file_of_them(tmp_path):
    save(tmp_path, "hashed")
    assert "user_table" not in json.loads((tmp_path / "model.json").read_text())
    assert not list(tmp_path.glob("user*"))


def test_the_fingerprint_covers_the_table_of_users(tmp_path):
    prints = []
    for change in (0.0, 0.0, 1.0):
        save(tmp_path, "table", USER_ROWS + change)
        prints.append(model_fingerprint(str(tmp_path)))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "pieces", [ITEMS[:-1].split(4), [*ITEMS.split(4), ITEMS[:1]]], ids=["too few rows", "too many rows"]
)
def test_rows_that_do_not_add_up_are_not_exported(tmp_path, pieces):
    info, gpt = make()
    with pytest.raises(AssertionError, match="item_table has 1[02] rows, expected 11"):
        save_model(str(tmp_path), info, gpt.state_dict(), pieces)
    assert not (tmp_path / "model.json").exists()


@pytest.mark.parametrize(
    "file",
    [
        "gpt.safetensors",
        "item_table-00001.safetensors",
        "user_table-00001.safetensors",
        "users.safetensors",
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, file):
    save(tmp_path, "table")
    (tmp_path / file).write_bytes(b"no tensors")
    for read in (load_model, model_fingerprint):
        with pytest.raises(UserError, match=f"{file}: not the file that was written"):
            read(str(tmp_path))
    as_older_release(tmp_path)
    with pytest.raises(UserError, match=f"{file}: not a readable safetensors file"):
        load_model(str(tmp_path))
    (tmp_path / file).unlink()
    for read in (load_model, model_fingerprint):
        with pytest.raises(UserError, match=f"{file}: no such file; the model is not complete"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 11}, "item_table has 11 rows, model.json says 12"),
        ({"num_items": 9}, "item_table has 11 rows, model.json says 10"),
    ],
)
def test_a_table_that_the_description_denies_is_refused(tmp_path, changes, message):
    save(tmp_path)
    description = json.loads((tmp_path / "model.json").read_text()) | changes
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


def test_rows_of_another_width_are_refused(tmp_path):
    save(tmp_path, "table", USER_ROWS[:, :3])
    with pytest.raises(UserError, match=r"user_table-00000.*rows \[2, 3\] are not the 2 x 4 float32 that"):
        load_model(str(tmp_path))


def test_a_file_with_fewer_rows_than_described_is_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "item_table-00001.safetensors").write_bytes(safetensors.torch.save({"rows": ITEMS[:3]}))
    as_older_release(tmp_path)
    with pytest.raises(UserError, match=r"item_table-00001.*rows \[3, 4\] are not the 4 x 4 float32 that"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("first", "end"), [(0, 11), (3, 5), (4, 8), (7, 11), (10, 11), (8, 8)])
def test_a_range_of_rows_comes_from_the_files_that_hold_it_alone(tmp_path, first, end):
    save(tmp_path)
    for index in range(3):
        if not set(range(first, end)) & set(range(4 * index, 4 * index + 4)):
            (tmp_path / f"item_table-{index:05d}.safetensors").unlink()
    pieces = list(table_pieces(str(tmp_path), "item_table", NUM_ITEMS + 1, first, end))
    assert [row for start, piece in pieces for row in range(start, start + len(piece))] == [
        *range(first, end)
    ]
    assert torch.equal(torch.cat([ITEMS[:0], *(piece for _, piece in pieces)]), ITEMS[first:end])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_found_slice_by_slice(monkeypatch, value):
    monkeypatch.setattr("recgpt.model.export._VALUES_CHECKED_AT_ONCE", 9)
    looked_at, isfinite = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda some: looked_at.append(some.numel()) or isfinite(some))
    weights = [torch.tensor(1.0), torch.empty(0, 4), ITEMS.clone()]
    check_finite("model", weights)
    assert (sum(looked_at), max(looked_at)) == (1 + ITEMS.numel(), 9)
    weights[-1][-1, -1] = value
    with pytest.raises(UserError, match="model: the model holds values that are not finite"):
        check_finite("model", weights)
