"""An exported model with random weights, and what it must recall."""

import torch

from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.model.export import ModelInfo, save_model
from recgpt.model.gpt import GPT

RECALL = RecallSettings(6, (4, 2), batch_users=3, block_items=7)


def save_random_model(folder, dataset, seed=0, recall=RECALL):
    """A run folder with nothing but its export."""
    torch.manual_seed(seed)
    settings = ModelSettings(
        width=8, members=1, layers=1, heads=2, max_history=6, user=UserSettings(kind="hashed", buckets=5)
    )
    gpt = GPT(settings)
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.3)
    fingerprint = dataset.manifest.vocabulary_fingerprint
    info = ModelInfo(dataset.num_items, fingerprint, settings, SplitSettings(), recall)
    save_model(str(folder / "model"), info, gpt.state_dict(), [torch.randn(dataset.num_items + 1, 8)])
    return folder
