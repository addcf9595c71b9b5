"""Private names of Ray that the project needs, and nothing else: whoever takes another version of Ray reads this file.

Each function says what goes wrong without it, and asserts that the name which it replaces is still there. The tests in
``tests/test_quirks.py`` say by name which of them no longer holds.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

VERSION = "2.60.0"  # of Ray, for which all of this was tried


def quiet_about_dead_nodes() -> None:
    """Ray prints pages of a node's log on the driver's terminal for each node that dies, also with ``log_to_driver=False``.

    Replaces ``ray._private.worker.print_to_stdstream``, for good: a thread of Ray's calls it.
    """
    from ray._private import worker

    _check(worker, "print_to_stdstream")
    setattr(worker, "print_to_stdstream", lambda *data, **options: None)  # noqa: B010  mypy knows the name's type


@contextlib.contextmanager
def servers_in_their_own_session() -> Iterator[None]:
    """Ray's servers are of the driver's process group. A terminal that goes away, ``timeout`` and Ctrl-C send their signals to
    all of the group: the servers would end before the epochs in progress are saved.

    Replaces ``ray._private.services.ConsolePopen`` while Ray starts. Only on Linux: elsewhere nothing but the group ends
    the servers with the driver.
    """
    from ray._private import services

    in_session = functools.partial(subprocess.Popen, start_new_session=sys.platform == "linux")
    with _replaced(services, "ConsolePopen", in_session):
        yield


@contextlib.contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """``ray.init`` installs a handler of SIGTERM that exits wherever it is, which can be inside a lock of ``logging``, where
    the exit is swallowed and the sweep runs on.

    Replaces ``ray._private.utils.set_sigterm_handler`` while Ray starts.
    """
    from ray._private import utils

    with _replaced(utils, "set_sigterm_handler", lambda handler: None):
        yield


@contextlib.contextmanager
def ports_of_agents(ports: Mapping[str, int]) -> Iterator[None]:
    """A node manager waits 15 s for each port of its agents that it is not told, and aborts where one is later, as on a busy
    machine. ``ray.init`` has no parameters for these ports. That of the agent's HTTP server, 52365, for which two Rays on a
    machine compete, Ray does not tell its node manager at all, which has a flag for it.

    Replaces ``ray._private.parameter.RayParams`` and ``ray._private.services.ConsolePopen`` while Ray starts. ``ports``: by
    their names in RayParams.
    """
    from ray._private import services

    _check(services, "ConsolePopen")
    popen: Any = services.ConsolePopen

    def start(command: list[str], **options: Any) -> Any:
        flag = f"--dashboard_agent_listen_port={ports['dashboard_agent_listen_port']}"
        return popen([*command, flag] if Path(command[0]).name == "raylet" else command, **options)

    with _ray_params(ports), _replaced(services, "ConsolePopen", start):
        yield


@contextlib.contextmanager
def fewer_servers() -> Iterator[None]:
    """``ray.init`` starts, and partly waits for, a server of pages and jobs (also with ``include_dashboard=False``), an
    autoscaler and a process that copies logs to the driver. A Ray of our own uses none of them; without them it is up in half
    of the time (``python -m benchmarks.start``).

    Replaces ``ray._private.node.Node.start_api_server`` and ``ray._private.parameter.RayParams`` while Ray starts.
    """
    from ray._private import node

    with (
        _ray_params({"no_monitor": True, "include_log_monitor": False}),
        _replaced(node.Node, "start_api_server", lambda self, **options: None),
    ):
        yield


def aws_keys_not_passed_on() -> None:
    """Tune hands these variables to each worker by way of an agent that writes their values to a log.

    Takes them out of ``ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE``. Workers on this machine inherit them.
    """
    from ray.tune.execution import class_cache

    _check(class_cache, "ENV_VARS_TO_PROPAGATE")
    names: set[str] = class_cache.ENV_VARS_TO_PROPAGATE
    names -= {name for name in names if name.startswith("AWS_")}


def _check(owner: object, name: str) -> None:
    import ray

    assert hasattr(owner, name), f"Ray {ray.__version__} has no {name} in {owner} any more; see {__name__}, made for {VERSION}"


@contextlib.contextmanager
def _ray_params(values: Mapping[str, object]) -> Iterator[None]:
    """Sets parameters of a Ray that starts meanwhile, for which ``ray.init`` has no arguments."""
    from ray._private import parameter

    make: Any = parameter.RayParams
    for name in values:
        _check(make(), name)
    with _replaced(parameter, "RayParams", lambda **others: make(**{**others, **values})):
        yield


@contextlib.contextmanager
def _replaced(owner: ModuleType | type, name: str, value: object) -> Iterator[None]:
    _check(owner, name)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
