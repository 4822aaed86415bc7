"""Runs `recgpt prepare` on a cluster of two nodes, each with an object store of its own.

    python -m tests.ray_jobs.two_nodes LOG DATASET

A process of its own, because a process can be part of one cluster only.
"""

import os
import sys

from ray_jobs import prepare_pipeline
from ray_jobs.prepare import run_prepare
from recgpt.data import preparation

ROWS_PER_PIECE, PART = 1000, 2000


def main(log: str, dataset: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    preparation.ROWS_PER_PIECE, prepare_pipeline.INTERACTIONS_PER_PART = ROWS_PER_PIECE, PART
    node = {"num_cpus": 1, "object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        run_prepare([log], dataset)
        assert len(ray.nodes()) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
