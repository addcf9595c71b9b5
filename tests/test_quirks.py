"""What is private in Ray is as it was when it was last looked at, one test for each name: after an upgrade those that fail say
which function of ``tune/cluster/quirks.py`` does nothing any more, or is no longer needed."""

from __future__ import annotations

import inspect
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import node, parameter, services, utils, worker

from tests.sweep_process import ROOT
from tune.cluster import quirks

PRIVATE = (
    r"\b_private\b|_global_node|print_to_stdstream|ConsolePopen|set_sigterm_handler|ENV_VARS_TO_PROPAGATE|\b_print\b"
    r"|maybe_enable_token|RayParams|start_api_server"
)


def test_the_version_is_the_one_that_was_looked_at() -> None:
    """Where this fails: read ``quirks.py``, try each symptom without its function, then set its VERSION."""
    assert ray.__version__ == quirks.VERSION


def test_private_names_stand_in_one_module() -> None:
    files = [ROOT / "search.py", *(file for folder in ("tune", "training", "data") for file in (ROOT / folder).rglob("*.py"))]
    found = {file.relative_to(ROOT) for file in files if re.search(PRIVATE, file.read_text())}
    assert found == {Path("tune/cluster/quirks.py")}


def names_in(function: Any) -> set[str]:
    """The global names and attributes that a function's code uses."""
    return set(inspect.unwrap(function).__code__.co_names)


def test_print_to_stdstream(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "print_to_stdstream" in names_in(worker.listen_error_messages)
    page: dict[str, Any] = {"lines": ["a page of a log"], "pid": "raylet", "ip": "", "is_err": False, "job": None}
    printed: Any = worker.print_to_stdstream
    monkeypatch.setattr(worker, "print_to_stdstream", printed)  # put back at the end
    printed(page, ignore_prefix=True)
    assert "a page of a log" in "".join(capsys.readouterr()), "so Ray prints it by itself"
    quirks.quiet_about_dead_nodes()
    replaced: Any = worker.print_to_stdstream
    replaced(page, ignore_prefix=True)
    assert capsys.readouterr() == ("", "")


def test_console_popen(tmp_path: Path) -> None:
    """A process as Ray starts its servers is the leader of a session with the quirk, and not without it."""
    assert "ConsolePopen" in names_in(services.start_ray_process)
    command = [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"]
    leaders = []
    for quirk in (False, True):
        with (tmp_path / str(quirk)).open("w+") as file:
            if quirk:
                with quirks.servers_in_their_own_session():
                    info = services.start_ray_process(command, "test", fate_share=False, stdout_file=file)
            else:
                info = services.start_ray_process(command, "test", fate_share=False, stdout_file=file)
            assert info.process.wait(60) == 0
            leaders.append((tmp_path / str(quirk)).read_text())
    assert leaders == ["False\n", "True\n"]
    assert issubclass(services.ConsolePopen, subprocess.Popen), "it is as it was"


def test_set_sigterm_handler() -> None:
    assert "set_sigterm_handler" in names_in(ray.init)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with quirks.sigterm_handler_kept():
            utils.set_sigterm_handler(lambda number, frame: None)
            assert signal.getsignal(signal.SIGTERM) is before
        utils.set_sigterm_handler(lambda number, frame: None)
        assert signal.getsignal(signal.SIGTERM) is not before, "Ray's own is as it was"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_params() -> None:
    assert "RayParams" in names_in(ray.init)
    ports = {"metrics_agent_port": 1025, "metrics_export_port": 1026, "dashboard_agent_listen_port": 1027}
    with quirks.ports_of_agents(ports):
        parameters = parameter.RayParams(num_cpus=3, metrics_export_port=None)  # as ``ray.init`` makes them
    assert (parameters.num_cpus, parameters.metrics_agent_port, parameters.metrics_export_port) == (3, 1025, 1026)
    plain = parameter.RayParams()
    assert (plain.metrics_agent_port, plain.metrics_export_port, plain.runtime_env_agent_port) == (None, None, None)
    assert plain.dashboard_agent_listen_port == 52365, "the same for each Ray on a machine"
    with (
        pytest.raises(AssertionError, match=r"has no some_port in .*; see tune\.cluster\.quirks"),
        quirks.ports_of_agents({"some_port": 1}),
    ):
        pass


def test_start_api_server() -> None:
    """And the switches of RayParams, which Ray reads where it starts the processes."""
    started = inspect.getsource(node.Node.start_head_processes)
    assert "self.start_api_server(" in started
    assert "if not self._ray_params.no_monitor:" in started
    assert "if self._ray_params.include_log_monitor:" in inspect.getsource(node.Node.start_ray_processes)
    real = node.Node.start_api_server
    with quirks.fewer_servers(), quirks.ports_of_agents({"dashboard_agent_listen_port": 1027}):
        assert node.Node.start_api_server is not real
        parameters = parameter.RayParams(num_cpus=3)
    assert (parameters.no_monitor, parameters.include_log_monitor, parameters.num_cpus) == (True, False, 3)
    assert node.Node.start_api_server is real
    assert parameter.RayParams().no_monitor is False


def test_env_vars_to_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution import class_cache

    names = set(class_cache.ENV_VARS_TO_PROPAGATE)
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", names | {"AWS_SECRET_ACCESS_KEY"})  # put back at the end
    assert "ENV_VARS_TO_PROPAGATE" in inspect.getsource(class_cache).split("class _ActorClassCache")[1]
    quirks.aws_keys_not_passed_on()
    assert {name for name in names if not name.startswith("AWS_")} == class_cache.ENV_VARS_TO_PROPAGATE != set()


@pytest.mark.parametrize("name", ["print_to_stdstream", "ConsolePopen", "set_sigterm_handler"])
def test_a_name_that_has_gone_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, enter = {
        "print_to_stdstream": (worker, quirks.quiet_about_dead_nodes),
        "ConsolePopen": (services, lambda: quirks.servers_in_their_own_session().__enter__()),
        "set_sigterm_handler": (utils, lambda: quirks.sigterm_handler_kept().__enter__()),
    }[name]
    monkeypatch.delattr(module, name)
    with pytest.raises(AssertionError, match=rf"Ray .* has no {name} in "):
        enter()
