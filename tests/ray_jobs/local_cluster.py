"""A Ray cluster of two nodes on this machine, with a dashboard, until stdin is closed.

    python -m tests.ray_jobs.local_cluster

A process of its own, because a process can be part of one cluster only. Prints the dashboard's address once
it is up.
"""

import socket
import sys


def main() -> None:
    from ray.cluster_utils import Cluster

    dashboard_port = free_port()
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
    cluster = Cluster(initialize_head=True, head_node_args={**node(), **head})
    try:
        cluster.add_node(**node())
        cluster.wait_for_nodes()
        print(f"http://127.0.0.1:{dashboard_port}", flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


def node() -> dict[str, int]:
    # Agents of several nodes on one machine cannot all listen on the same port, and jobs go through them.
    return {
        "num_cpus": 3,
        "object_store_memory": 150 * 1024**2,
        "dashboard_agent_listen_port": free_port(),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
