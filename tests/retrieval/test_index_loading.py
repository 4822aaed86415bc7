"""The index of an exported model: mapped where it lies, read in part by a shard, refused if it is damaged."""

import sys
from pathlib import Path

import pytest
import torch

from recgpt import storage
from recgpt.config import RecallSettings, SplitSettings
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, save_model
from recgpt.retrieval.index_loading import load_exact_index, load_shard


@pytest.fixture(scope="module")
def save(make_model):
    """Exports a model of 50 items in files of 20 rows; returns its item table."""
    gpt, table_RD = make_model(50, dtype=torch.float32)
    info = ModelInfo(50, "f" * 64, gpt.settings, SplitSettings(), RecallSettings())

    def write(url):
        save_model(str(url), info, gpt.state_dict(), table_RD.split(20))
        return table_RD

    return write


def test_the_whole_table(save, tmp_path):
    table_RD = save(tmp_path)
    assert torch.equal(load_exact_index(str(tmp_path), 7).table_RD[:], table_RD)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")
def test_local_files_are_mapped(save, tmp_path):
    save(tmp_path)
    index = load_exact_index(str(tmp_path), 7)
    mapped = Path("/proc/self/maps").read_text()
    assert len(index.table_RD.pieces) == 3
    assert all(f"{tmp_path}/item_table-0000{number}.safetensors" in mapped for number in range(3))


@pytest.mark.parametrize("place", ["local", "object store"])
def test_a_shard_reads_its_own_files_alone(save, place, tmp_path, request):
    """Its rows and the one before them, which begin in the middle of the second file."""
    url = str(tmp_path) if place == "local" else storage.join(request.getfixturevalue("s3_bucket"), "model")
    table_RD = save(url)
    storage.remove(storage.join(url, "item_table-00002.safetensors"))
    if place == "local":
        storage.remove(storage.join(url, "item_table-00000.safetensors"))
    shard = load_shard(url, (29, 36), 7)
    assert torch.equal(shard.row_RD[:], table_RD[28:36])
    assert torch.equal(shard.vectors(torch.tensor([35, 29])), table_RD[[35, 29]])
    with pytest.raises(UserError, match=r"item_table-00002.safetensors: no such file"):
        load_shard(url, (36, 51), 7)


def test_a_damaged_file_is_named(save, tmp_path):
    save(tmp_path)
    (tmp_path / "item_table-00001.safetensors").write_bytes(b"no rows")
    with pytest.raises(UserError, match=r"item_table-00001.safetensors: not a readable safetensors file"):
        load_exact_index(str(tmp_path), 7)
