"""A Ray cluster of several nodes on this machine, in a process of its own: it leaves its address where ``auto`` looks for one.

``python -m tests.ray_nodes '{"num_cpus": 0}'`` starts a head and prints its address, then obeys lines: ``add CPUS``, ``kill``
(the oldest node, without a word to it), ``preempt`` (the oldest node, of which Ray is told a second before). It ends the
cluster with its input. With ``{"gcs_address": ...}`` it is one node more of that cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTICE_SECONDS = 1.0  # from the word that a node will be preempted to its end


class RayNodes:
    """The cluster as a test sees it. Its nodes ask for the token of the test's environment. ``before`` is a command that runs
    its process."""

    def __init__(self, *before: object, **head: Any) -> None:
        command = [*map(str, before), sys.executable, "-m", "tests.ray_nodes", json.dumps(head)]
        env = os.environ | {"RAY_AUTH_MODE": "token"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=pipe, stdout=pipe)
        self.address = self._answer()

    def tell(self, *words: object) -> None:
        """Does what the words say, and returns when it is done."""
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("done "):
                return line.split()[1]
        raise AssertionError("the cluster's process has ended")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(240)


def one_more_node(options: dict[str, Any]) -> None:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    node = Node(RayParams(include_log_monitor=False, node_manager_port=0, **options), head=False, shutdown_at_exit=True)
    print("done", options["gcs_address"], flush=True)
    sys.stdin.read()
    node.kill_all_processes(check_alive=False, wait=True)


def announce(cluster: Any, node: Any) -> None:
    """Tells Ray that the node will be preempted, as the agent of a cloud's spot instance does."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline = int((time.time() + NOTICE_SECONDS) * 1000)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    taken, why = cluster.head_node.get_gcs_client().drain_node(node.node_id, reason, "spot", deadline)
    assert taken, why


def main() -> None:
    from ray.cluster_utils import Cluster

    options = json.loads(sys.argv[1])
    if "gcs_address" in options:
        one_more_node(options)
        return
    cluster = Cluster(initialize_head=True, head_node_args=options)
    nodes = []
    print("done", cluster.address, flush=True)
    for line in sys.stdin:
        what, *cpus = line.split()
        if what == "add":
            nodes.append(cluster.add_node(num_cpus=int(cpus[0])))
        elif what in ("kill", "preempt"):
            if what == "preempt":
                announce(cluster, nodes[0])
                time.sleep(NOTICE_SECONDS)
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
        print("done", what, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
