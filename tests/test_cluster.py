"""Sweeps on a cluster: which one, what its nodes hold and see, and nodes that come and go."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.dataset import DataSpec
from tests.ray_nodes import RayNodes
from tests.sweep_process import (
    PATIENCE,
    ROOT,
    assert_projected,
    assert_whole,
    board,
    end_all,
    hostile_folder,
    metric_lines,
    search,
    start,
    wait_until,
)
from tests.sweeps import make_sweep
from tune.checks import check_storage
from tune.cluster import executor
from tune.cluster import nodes as cluster
from tune.cluster.nodes import LOOK_SECONDS, MAX_REFUSALS, SILENT_SECONDS, Nodes, address_of, check_answers, why_not_here
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger
from tune.spec import make_spec

# -- which cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "variable", "meant"),
    [
        ("", "", ""),
        ("local", "", ""),
        ("local", "10.0.0.1:6379", ""),
        ("auto", "", "auto"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
        ("", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("", "auto", "auto"),
        ("", "local", ""),
        ("[2001:db8::1]:6379", "", "[2001:db8::1]:6379"),
    ],
)
def test_the_flag_wins_over_rays_variable(flag: str, variable: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert address_of(make_spec({"address": flag})) == meant


@pytest.mark.parametrize(
    ("flag", "variable", "words"),
    [
        ("10.0.0.2", "", ["--address: '10.0.0.2' is not allowed", "auto, HOST:PORT or local"]),
        ("", "head node:6379", ["RAY_ADDRESS: 'head node:6379' is not allowed"]),
        ("ray://10.0.0.2:10001", "", ["'ray://10.0.0.2:10001' is not allowed", "ray job submit"]),
        ("", "http://127.0.0.1:8265", ["RAY_ADDRESS: 'http://127.0.0.1:8265' is not allowed", "ray job submit"]),
    ],
)
def test_what_is_no_address(flag: str, variable: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(ValueError, match="is not allowed") as raised:
        address_of(make_spec({"address": flag}))
    for word in words:
        assert word in str(raised.value)


def test_nothing_listens_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"'{address}' cannot be joined: nothing answers there"):
            check_answers(address)


def test_which_token_was_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    places = "RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, and ~/.ray/auth_token"
    assert executor.token_advice() == f"no token was shown to it; one is looked for in {places}"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a secret")
    assert executor.token_advice() == f"the token shown to it is that of {tmp_path}/.ray/auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert "no token" in executor.token_advice()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a secret")
    assert executor.token_advice() == "the token shown to it is that of RAY_AUTH_TOKEN"


# -- what is shipped --------------------------------------------------------------------------------------------------


def test_only_our_packages_are_shipped_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a package beside the command line, and is no test, benchmark or page, is shipped; nothing else is."""
    shipped = executor.shipped("empty")
    names = {Path(path).name for path in shipped["py_modules"]}
    root = Path(executor.__file__).parents[2]
    packages = {path.parent.name for path in root.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert names == packages | {"errors.py", "hparams.py"}
    assert all(Path(path).exists() for path in shipped["py_modules"])
    assert set(shipped) == {"py_modules", "env_vars", "working_dir"}
    assert shipped["working_dir"] == "empty"
    assert shipped["env_vars"] == {"NOISY_LABEL_CACHE": os.environ["NOISY_LABEL_CACHE"]}  # not the default of the other


def test_a_jobs_own_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a driver that says again what its job said."""
    monkeypatch.setenv("NOISY_LABEL_DATA", "sets")
    job = {"runtime_env": {"working_dir": "gcs://package.zip", "env_vars": {"NOISY_LABEL_CACHE": "/job"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    shipped = executor.shipped("empty")
    assert "working_dir" not in shipped
    assert shipped["env_vars"] == {"NOISY_LABEL_DATA": str(Path("sets").absolute())}


def test_a_jobs_own_folder_is_no_storage(tmp_path: Path) -> None:
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    with pytest.raises(ValueError, match="Ray removes this folder: give --storage one of your own"):
        check_storage(folder)
    assert not folder.exists()


# -- what a node sees -------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return make_sweep(tmp_path / "runs", "seen").folder / "sweep.yaml"


def test_a_node_that_sees_storage_and_data(record: Path) -> None:
    before = sorted(record.parent.iterdir())
    assert why_not_here(str(record), record.read_text(), DataSpec(data="digits", noise="none")) == ""
    assert sorted(record.parent.iterdir()) == before


def test_a_node_with_a_storage_of_its_own(record: Path) -> None:
    """The folder may even be there, with another sweep of that name in it."""
    expected = f"does not see the storage {record.parent.parent}; give --storage a folder that all nodes share under this path"
    text = record.read_text()
    assert why_not_here(str(record), text + "#", DataSpec(data="digits", noise="none")) == expected
    record.unlink()
    assert why_not_here(str(record), text, DataSpec(data="digits", noise="none")) == expected


def test_a_node_that_may_not_write(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    said = why_not_here(str(record), record.read_text(), DataSpec(data="digits", noise="none"))
    assert said == f"cannot write the storage {record.parent.parent}: Permission denied"


def test_a_node_without_the_data(record: Path, tmp_path: Path) -> None:
    said = why_not_here(
        str(record), record.read_text(), DataSpec(data=f"folder:{tmp_path}/images", noise="none", image_size=32)
    )
    assert said == f"cannot read the data: data set folder:{tmp_path}/images: there is no such folder"


def test_a_node_with_other_data(record: Path) -> None:
    said = why_not_here(str(record), record.read_text(), DataSpec(data="digits", noise="none", table="0" * 64))
    changed = "data set digits has changed, or this version reads it differently"
    assert re.fullmatch(rf"cannot read the data: {changed}: its checksum 0{{12}} is now [0-9a-f]{{12}}", said)


# -- following the nodes ----------------------------------------------------------------------------------------------


class Played:
    """Ray as far as Nodes needs it: nodes by name with their CPUs, and what each answers, "" where a trial can run.

    A node whose answer is None has not answered yet; one that answers with an exception failed to.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpus: dict[str, float] = {}
        self.answers: dict[str, Any] = {}
        self.now = 1000.0
        self.asked: list[str] = []
        monkeypatch.setattr(cluster, "living_nodes", self.living)
        monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(Nodes, "_ask", lambda nodes, key: self.asked.append(key) or key)
        monkeypatch.setattr("ray.wait", self.wait)
        monkeypatch.setattr("ray.get", self.get)

    def living(self) -> Mapping[str, Any]:
        about = {"NodeManagerAddress": "10.0.0.9", "NodeManagerHostname": "gpu-9"}
        return {key: {"Resources": {"CPU": cpus}, **about} for key, cpus in self.cpus.items()}

    def wait(self, keys: list[str], num_returns: int = 1, timeout: float | None = None) -> tuple[list[str], list[str]]:
        assert num_returns == len(keys)
        ready = [key for key in keys if self.answers[key] is not None]
        assert timeout is not None or ready == keys, "it would wait for ever"
        return ready, [key for key in keys if key not in ready]

    def get(self, key: str) -> str:
        if isinstance(self.answers[key], Exception):
            raise self.answers[key]
        return str(self.answers[key])

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def join(self, key: str, cpus: float, answer: Any = "") -> None:
        self.cpus[key], self.answers[key] = cpus, answer


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def followed(played: Played, folder: Path, **fields: Any) -> tuple[Nodes, Coordinator, list[str], Callable[[float], int]]:
    """Nodes, a coordinator, what is said, and a function that lets seconds pass and returns how many trials may run then."""
    sweep = make_sweep(folder, **fields)
    coordinator, said = Coordinator(Ledger(sweep), total=4, concurrent=-1), []
    nodes = Nodes(sweep, sweep.spec)

    def later(seconds: float) -> int:
        played.now += seconds
        nodes.follow(coordinator, said.append)
        return coordinator.concurrent

    return nodes, coordinator, said, later


def test_trials_at_a_time_follow_the_nodes(played: Played, tmp_path: Path) -> None:
    played.join("head", 0)
    played.join("a", 2)
    nodes, coordinator, said, later = followed(played, tmp_path)
    assert nodes.check() == 2
    assert played.asked == ["a"], "a node that holds no trial need not see anything"
    played.join("b", 3, answer=None)
    assert later(LOOK_SECONDS / 2) == -1, "not at every turn of Tune's loop"
    assert later(LOOK_SECONDS) == 2, "b has not answered yet"
    played.answers["b"] = ""
    assert later(LOOK_SECONDS) == 5
    del played.cpus["a"]
    assert later(LOOK_SECONDS) == 3
    assert said == ["the cluster holds 5 trials at a time (before: 2)", "the cluster holds 3 trials at a time (before: 5)"]
    assert not coordinator.halted.is_set()
    assert sorted(played.asked) == ["a", "b"], "each is asked once"


def test_a_cluster_that_lost_its_nodes_is_waited_for(played: Played, tmp_path: Path) -> None:
    played.join("a", 1)
    nodes, coordinator, said, later = followed(played, tmp_path)
    assert nodes.check() == 1
    del played.cpus["a"]
    assert later(LOOK_SECONDS) == 0
    assert said == []
    assert later(SILENT_SECONDS) == 0
    assert later(SILENT_SECONDS) == 0
    assert said == ["no node of the cluster holds a trial; waiting for one"]
    played.join("b", 1)
    assert later(LOOK_SECONDS) == 1
    assert said[1:] == ["the cluster holds 1 trials at a time (before: 0)"]
    assert not coordinator.halted.is_set()


def test_a_number_that_was_given_may_wait_for_nodes(played: Played, tmp_path: Path) -> None:
    """An autoscaler brings nodes where trials wait for them; without a number nobody knows how many that would be."""
    played.join("head", 0)
    with pytest.raises(ValueError, match=r"no node holds a trial of 1 CPUs .*: --concurrent N"):
        followed(played, tmp_path / "without")[0].check()
    nodes, _, said, later = followed(played, tmp_path, concurrent=6)
    assert nodes.check() == 0
    assert later(LOOK_SECONDS) == 6
    played.join("a", 4)
    assert later(LOOK_SECONDS) == 6
    assert said == ["the cluster holds 4 trials at a time (before: 0)"]


def test_a_node_on_which_no_trial_can_run(played: Played, tmp_path: Path) -> None:
    """At launch it is an error; later it stops the sweep, which would otherwise lose trial after trial there."""
    played.join("a", 1)
    nodes, coordinator, _, later = followed(played, tmp_path)
    nodes.check()
    played.join("b", 1, answer="does not see the storage")
    later(LOOK_SECONDS)
    assert coordinator.halted.is_set()
    assert coordinator.problem == "node 10.0.0.9 (gpu-9) does not see the storage"
    with pytest.raises(ValueError, match=r"node 10.0.0.9 \(gpu-9\) does not see the storage"):
        followed(played, tmp_path / "second")[0].check()


def test_a_node_that_does_not_answer(played: Played, tmp_path: Path) -> None:
    """It may be dying, and is asked again until it is gone; one that lives and never answers is named."""
    from ray.exceptions import WorkerCrashedError

    played.join("a", 1)
    played.join("b", 1, answer=WorkerCrashedError())
    nodes, coordinator, _, later = followed(played, tmp_path)
    with pytest.raises(ValueError, match=r"node 10.0.0.9 \(gpu-9\) cannot run a trial: The worker died"):
        nodes.check()
    assert played.asked.count("b") == MAX_REFUSALS
    nodes, coordinator, _, later = followed(played, tmp_path / "second")
    played.answers["b"] = ""
    nodes.check()
    played.join("c", 1, answer=WorkerCrashedError())
    assert later(LOOK_SECONDS) == 2
    del played.cpus["c"]
    assert later(LOOK_SECONDS) == 2
    assert later(LOOK_SECONDS) == 2
    assert not coordinator.halted.is_set()


class Waiting(SimpleNamespace):
    """A trial of Tune's that has no actor yet."""

    def init_local_path(self) -> None:
        self.folder = True


def test_a_free_actor_is_for_the_newest_trial(tmp_path: Path) -> None:
    """The older ones have actors that are starting, which Tune would break off; a halt lets go of all that wait."""
    from tune.cluster.scheduler import LedgerScheduler

    coordinator = Coordinator(Ledger(make_sweep(tmp_path)), total=4, concurrent=4)
    trials = {key: Waiting(trial_id=key, status="PENDING", folder=False) for key in ("z", "a", "m")}
    for key in trials:
        coordinator.next(key)
    stopped: list[str] = []

    def stop_trial(trial: Waiting) -> None:
        assert trial.folder, "Tune's summary asks for the folder"
        stopped.append(trial.trial_id)

    controller = SimpleNamespace(get_live_trials=lambda: list(trials.values()), stop_trial=stop_trial)
    scheduler = LedgerScheduler(coordinator)
    assert scheduler.choose_trial_to_run(controller) is trials["m"]
    trials["m"].status = "RUNNING"
    assert scheduler.choose_trial_to_run(controller) is trials["a"]
    coordinator.halted.set()
    assert scheduler.choose_trial_to_run(controller) is None
    assert sorted(stopped) == ["a", "z"]


# -- real nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    found = RayNodes(num_cpus=0)
    found.tell("add", 1)
    yield found
    end_all()
    found.end()


@pytest.fixture(scope="module")
def refused(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.Popen[str], Path]:
    """A launch with another token, which Ray refuses after 20 s: it waits beside the other tests."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "token").write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        process = start(folder / "log", "launch", "refused", "--storage", folder / "runs", "--address", nodes.address)
    return process, folder


def running(storage: Path, name: str) -> int:
    """How many trials are at work."""
    return sum(row["state"] == "running" and row["epochs"] > 0 for row in board(storage, name))


def test_packages_of_the_users_own_with_our_names(nodes: RayNodes, storage: Path, tmp_path: Path) -> None:
    """The folder that a sweep is launched from is there on every node, as a home folder is, and no worker imports from it."""
    options = ("--method", "ce", "--model", "mlp", "--trials", 2, "--epochs", 1)
    where = ("--storage", storage, "--address", nodes.address)
    launched = start(tmp_path / "log", "launch", "own", *options, *where, cwd=hostile_folder(tmp_path / "own"))
    assert launched.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    assert [row["state"] for row in board(storage, "own")] == ["complete", "complete"]


def test_nodes_come_and_go(nodes: RayNodes, refused: object, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job would run it, in a cluster that asks for a token: a node comes, a node dies, SIGTERM, and a resume."""
    folder, log = storage / "moving", storage.parent / "log"
    (storage.parent / "job").mkdir()
    job = {"working_dir": str(storage.parent / "job"), "env_vars": {"NOISY_LABEL_CACHE": os.environ["NOISY_LABEL_CACHE"]}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job, "metadata": {}}))
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    (storage.parent / "spec.yaml").write_text("{checkpoint_seconds: 0, report_seconds: 0.2, scheduler: none}")
    options = ("--spec", storage.parent / "spec.yaml", "--method", "ce", "--model", "mlp", "--trials", 500, "--epochs", 24)
    launched = start(log, "launch", "moving", "--storage", storage, *options)

    def said(text: str) -> Callable[[], bool]:
        return lambda: text in log.read_text()

    wait_until(lambda: len(metric_lines(folder)) >= 4, launched, log)
    assert f"joined the Ray cluster {nodes.address} (RAY_ADDRESS); it holds 1 trials at a time" in log.read_text()
    assert running(storage, "moving") <= 1
    nodes.tell("add", 1)
    wait_until(said("the cluster holds 2 trials at a time (before: 1)"), launched, log)
    wait_until(lambda: running(storage, "moving") == 2, launched, log)
    nodes.tell("kill")
    wait_until(said("lost its process after epoch"), launched, log)
    wait_until(said("the cluster holds 1 trials at a time (before: 2)"), launched, log)
    lost = re.search(r"trial (\d+) lost its process after epoch", log.read_text())
    assert lost
    wait_until(said(f"trial {lost[1]} ce complete after 24 epochs"), launched, log)
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(PATIENCE) == 143, log.read_text()
    assert log.read_text().splitlines()[-1] == f"python search.py resume moving --storage {storage}"
    search("resume", "moving", "--storage", storage, "--trials", len(board(storage, "moving")))
    rows = board(storage, "moving")
    assert_whole(folder, rows, len(rows))
    assert_projected(storage, "moving", rows)


def test_a_token_that_is_another(refused: tuple[subprocess.Popen[str], Path], nodes: RayNodes) -> None:
    process, folder = refused
    assert process.wait(PATIENCE) == 2
    last = (folder / "log").read_text().splitlines()[-1]
    assert last.startswith(f"error: Ray cluster '{nodes.address}' cannot be joined: Failed to connect")
    assert last.endswith(f"the token shown to it is that of {folder / 'token'}")
    assert list((folder / "runs").iterdir()) == []


@pytest.mark.root
def test_a_storage_of_one_node_alone(nodes: RayNodes, storage: Path) -> None:
    """A node with an empty folder in the storage's place: refused in one line that names it, and nothing is written."""
    script = f'mount -t tmpfs none {storage} && exec "$@"'
    hidden = RayNodes("unshare", "--mount", "sh", "-c", script, "sh", gcs_address=nodes.address, num_cpus=1)
    try:
        before = sorted(storage.iterdir())
        done = search("launch", "split", "--storage", storage, "--address", nodes.address, check=2)
        assert re.search(r"^error: node [0-9.]+ \(.+\) does not see the storage " + re.escape(f"{storage};"), done.stderr)
        assert done.stderr.count("\n") == 1
        assert sorted(storage.iterdir()) == before
    finally:
        hidden.end()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_a_job_is_submitted_and_stopped(storage: Path) -> None:
    """``ray job submit`` with a working directory; ``ray job stop`` ends as Ctrl-C does; a second job goes on."""
    port, agents_port = free_port(), free_port()  # the usual ones may be another cluster's
    nodes = RayNodes(num_cpus=2, include_dashboard=True, dashboard_port=port, dashboard_agent_listen_port=agents_port)
    folder = storage / "job"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    server = ["--address", f"http://127.0.0.1:{port}"]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}

    def job(verb: str, *arguments: object) -> str:
        command = [*ray, verb, *server, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        return done.stdout + done.stderr

    def submit(name: str, *command: object) -> None:
        own = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", "NOISY_LABEL_CACHE": os.environ["NOISY_LABEL_CACHE"]}}
        options = ("--no-wait", "--submission-id", name, "--working-dir", ROOT, "--runtime-env-json", json.dumps(own))
        until(name, lambda: "submitted successfully" in job("submit", *options, "--", sys.executable, "search.py", *command))

    def until(name: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline, job("logs", name)
            time.sleep(1)

    try:
        submit("here", "launch", "job", "--trials", 1)
        until("here", lambda: "'here' failed" in job("status", "here"))
        assert "Ray removes this folder" in job("logs", "here")
        options = ("--method", "ce", "--model", "mlp", "--trials", 500, "--epochs", 24)
        submit("first", "launch", "job", "--storage", storage, *options)
        until("first", lambda: len(metric_lines(folder)) >= 4)
        job("stop", "first")
        said = job("logs", "first")
        assert f"python search.py resume job --storage {storage}" in said.splitlines()[-1], said
        num_begun = len(board(storage, "job"))
        submit("second", "resume", "job", "--storage", storage, "--trials", num_begun)
        until("second", lambda: "'second' succeeded" in job("status", "second"))
        rows = board(storage, "job")
        assert_whole(folder, rows, num_begun)
        assert_projected(storage, "job", rows)
    finally:
        nodes.end()
