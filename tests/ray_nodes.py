"""A real Ray cluster on this machine: raylets of one processor each, which can be killed one by one."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def ports() -> dict[str, int]:
    """Free ports by the names of what Ray would else wait for fifteen seconds, too few for a busy machine."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for held in sockets:
            held.bind(("", 0))
        return dict(zip(PORTS, (held.getsockname()[1] for held in sockets), strict=True))


def add(cluster: Any) -> Any:
    """One more node."""
    node = cluster.add_node(num_cpus=1, **ports())
    cluster.wait_for_nodes(timeout=300)
    return node


@contextmanager
def joined(*paths: Path) -> Iterator[Any]:
    """A cluster of one node, to which this process is joined; its workers import from the repository and `paths`."""
    import ray
    from ray.cluster_utils import Cluster

    scratch = tempfile.mkdtemp(prefix="ray")  # sockets lie in it: its name must be short
    before = dict(os.environ)
    found = [str(ROOT), str(ROOT / "tests"), *map(str, paths), *filter(None, [before.get("PYTHONPATH")])]
    (Path(scratch) / "ray").mkdir()  # where it notes the address
    waits = {"RAY_TMPDIR": scratch, "RAY_raylet_start_wait_time_s": "300", "RAY_worker_register_timeout_seconds": "300"}
    os.environ |= {"PYTHONPATH": os.pathsep.join(found), "RAY_USAGE_STATS_ENABLED": "0", **waits}
    head = {"num_cpus": 1, "include_dashboard": False, **ports()}
    cluster: Any = None
    try:
        cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
        yield cluster
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(scratch, ignore_errors=True)
