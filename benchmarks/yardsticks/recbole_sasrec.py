"""The yardstick: training steps of RecBole's SASRec with full cross-entropy, on its own batches.

Runs in an environment of its own, which has RecBole and knows nothing of RecGPT.
"""

import logging
import os
import warnings
from pathlib import Path

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer

from benchmarks.stopwatch import Stopwatch

USER, ITEM, TIME = "user_id", "item_id", "timestamp"


def measure(
    log: str,
    folder: str,
    width: int,
    layers: int,
    heads: int,
    dropout: float,
    max_history: int,
    batch: int,
    seconds: float,
) -> list[tuple[int, float, float]]:
    """Targets, seconds and CPU seconds of each step, after the first.

    Args:
        log: histories, one line per user: the user and then items in their order.
        batch: targets in a step; RecBole makes a history of its own for each.
        seconds: how long to go on, about.
    """
    warnings.filterwarnings("ignore")
    logging.disable()
    os.chdir(folder)  # its trainer leaves a log where the process stands
    _write_interactions(Path(log), Path(folder) / "log" / "log.inter")
    config = Config(
        model=SASRec,
        dataset="log",
        config_dict={
            "data_path": folder,
            "checkpoint_dir": folder,
            "USER_ID_FIELD": USER,
            "ITEM_ID_FIELD": ITEM,
            "TIME_FIELD": TIME,
            "load_col": {"inter": [USER, ITEM, TIME]},
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "order": "TO",
                "mode": "full",
                "group_by": "user",
            },
            "MAX_ITEM_LIST_LENGTH": max_history,
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "train_batch_size": batch,
            "hidden_size": width,
            "inner_size": 4 * width,
            "n_layers": layers,
            "n_heads": heads,
            "hidden_dropout_prob": dropout,
            "attn_dropout_prob": dropout,
            "use_gpu": False,
            "show_progress": False,
        },
    )
    batches, _, _ = data_preparation(config, create_dataset(config))
    model = SASRec(config, batches.dataset)
    optimizer = Trainer(config, model).optimizer
    model.train()
    # As recbole.trainer.Trainer._train_epoch goes through an epoch.
    stopwatch = Stopwatch(seconds)
    for interaction in batches:
        optimizer.zero_grad()
        loss = model.calculate_loss(interaction)
        loss.item()
        loss.backward()
        optimizer.step()
        if stopwatch.step(len(interaction)):
            break
    return stopwatch.steps


def _write_interactions(log: Path, path: Path) -> None:
    """The log in RecBole's own format; places in a history serve as times."""
    path.parent.mkdir(exist_ok=True)
    with log.open() as source, path.open("w") as target:
        target.write(f"{USER}:token\t{ITEM}:token\t{TIME}:float\n")
        for line in source:
            user, *items = line.split()
            target.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(items))
