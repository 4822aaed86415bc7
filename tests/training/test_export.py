"""From a checkpoint to an exported model, the tables replicated or sharded."""

import pytest
import torch

from recgpt.config import ItemTableSettings, ModelSettings, TrainSettings, UserSettings
from recgpt.model.export import load_model
from recgpt.model.gpt import GPT
from recgpt.model.users import KnownUsers
from recgpt.training import checkpoint
from recgpt.training.checkpoint import Snapshot, TableRows
from recgpt.training.export import export_checkpoint

NAME = checkpoint.checkpoint_name(3, 1)
ITEM_ROWS = torch.arange(8.0).repeat_interleave(4).view(8, 4)  # exact in bfloat16
USER_ROWS = -torch.arange(16.0).view(4, 4)


@pytest.fixture(autouse=True)
def few_rows_per_file(monkeypatch):
    monkeypatch.setattr(checkpoint, "ROWS_PER_FILE", 3)


def save(run, user_kind, dense_tables, tables, similarity="dot"):
    """A checkpoint of 7 items; returns its settings and the GPT's weights."""
    user = UserSettings(kind=user_kind)
    model = ModelSettings(
        width=4, members=1, layers=1, heads=1, max_history=4, similarity=similarity, user=user
    )
    gpt = GPT(model).state_dict()
    dense = {f"gpt.{key}": value for key, value in gpt.items()} | dense_tables
    rows = {name: TableRows(len(tensor), 0, {"rows": tensor}) for name, tensor in tables.items()}
    checkpoint.write(run, Snapshot(NAME, {}, dense, {}, rows))
    return TrainSettings(model=model, item_table=ItemTableSettings(placement="auto")), gpt


def assert_exported(run, gpt, item_rows=ITEM_ROWS):
    info, loaded, table_RD = load_model(f"{run}/model")
    assert info.num_items == 7
    assert all(torch.equal(value, gpt[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(table_RD, item_rows)
    return loaded


@pytest.mark.parametrize(
    ("similarity", "item_rows"), [("dot", ITEM_ROWS), ("cosine", ITEM_ROWS.sign() / 2)], ids=["dot", "cosine"]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_is_exported_with_its_item_table(
    tmp_path, write_dataset, sharded, similarity, item_rows
):
    dataset = write_dataset(tmp_path, {"a": [1, 2, 3, 4], "b": [5, 6, 7]})
    run = str(tmp_path / "run")
    tables = {"item_table": ITEM_ROWS.bfloat16()} if sharded else {}
    dense_tables = {} if sharded else {"item_table.weight": ITEM_ROWS}
    settings, gpt = save(run, "none", dense_tables, tables, similarity)
    export_checkpoint(run, NAME, settings, dataset, known_users=None)
    assert_exported(run, gpt, item_rows)
    pieces = sorted(path.name for path in (tmp_path / "run" / "model").glob("item_table-*"))
    assert pieces == [f"item_table-{index:05d}.safetensors" for index in range(3)]


def test_a_table_of_users_is_exported_beside_it(tmp_path, write_dataset):
    dataset = write_dataset(tmp_path, {"a": [1, 2, 3, 4], "b": [5, 6], "c": [7, 1]})
    run = str(tmp_path / "run")
    settings, gpt = save(run, "table", {}, {"item_table": ITEM_ROWS, "user_table": USER_ROWS})
    export_checkpoint(run, NAME, settings, dataset, KnownUsers(torch.tensor([-9, 0, 9])))
    loaded = assert_exported(run, gpt)
    rows = loaded.user_rows(torch.tensor([9, 1, -9]))
    assert torch.equal(loaded.user(rows), USER_ROWS[[3, 0, 1]])
