"""Runs `recgpt train --workers 1:2` on a cluster of two nodes, of which one is killed in the middle.

    python -m tests.ray_jobs.lost_node DATASET RUN SETTINGS

A process of its own, because a process can be part of one cluster only.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from ray_jobs.train import run_train
from recgpt.settings_reading import load_train_settings
from recgpt.training.run_folder import read_metrics

KILLED_AFTER_STEP = 40


def main(dataset: str, run: str, settings_file: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    # On each node there is room for one worker of two CPUs, and for readers beside it.
    node = {"num_cpus": 3, "object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    other = cluster.add_node(**node)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    # Ray Train counts on the dead node for a while, and would wait for a worker there for a minute.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"

    def lose_the_other() -> None:
        while newest_step(run) < KILLED_AFTER_STEP:
            time.sleep(0.2)
        assert workers_of_newest_checkpoint(run) == 2
        cluster.remove_node(other, allow_graceful=False)

    thread = threading.Thread(target=lose_the_other, daemon=True)
    thread.start()
    try:
        overrides = ["workers=2", "min_workers=1", "threads_per_worker=2"]
        run_train(dataset, run, load_train_settings(settings_file, overrides))
        assert not thread.is_alive(), "the node was not lost in time"
    finally:
        ray.shutdown()
        cluster.shutdown()


def newest_step(run: str) -> int:
    return max((line["step"] for line in read_metrics(run, until_step=10**9)), default=0)


def workers_of_newest_checkpoint(run: str) -> int:
    newest = sorted(Path(run, "checkpoints").glob("*/manifest.json"))[-1]
    return json.loads(newest.read_text())["about"]["workers"]


if __name__ == "__main__":
    main(*sys.argv[1:])
