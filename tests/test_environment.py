"""Where a sweep finds itself: allowed processors, long and missing folders, and packages of the user's own with our names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.processors import num_processors, quotas
from tests.sweep_process import ROOT, SEARCH, board, hostile_folder, metric_lines
from tune.checks import check_resources
from tune.cluster import environment, executor
from tune.cluster.environment import choose_folder, choose_token, short_folder
from tune.spec import make_spec

# -- processors -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def one_processor() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_as_many_processors_as_coreutils_counts() -> None:
    """``nproc`` minds the affinity, as joblib does."""
    import joblib

    plain = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}  # which ``nproc`` minds, too
    assert num_processors() <= len(os.sched_getaffinity(0)) == int(subprocess.check_output(["nproc"], env=plain, text=True))
    assert num_processors() <= joblib.cpu_count()
    code = "from data.processors import num_processors; print(num_processors())"
    told = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, preexec_fn=one_processor, text=True)
    assert told == "1\n"


def control_groups(root: Path, files: dict[str, str], membership: str) -> list[float]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "membership").write_text(membership)
    return list(quotas(root, root / "membership"))


@pytest.mark.parametrize(
    ("files", "membership", "found"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", [1.5]),  # docker run --cpus 1.5
        ({"cpu.max": "max 100000\n"}, "0::/\n", []),
        ({"a.slice/cpu.max": "50000 100000", "a.slice/b.scope/cpu.max": "max 100000"}, "0::/a.slice/b.scope\n", [0.5]),
        ({"cpu.max": "200000 100000"}, "0::/../../elsewhere\n", [2.0]),  # outside of what the container sees
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/docker/1\n", [3.0]),
        ({"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "25000"}, "1:cpu:/x/y\n0::/\n", [2.0]),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n3:cpuset:/\n", []),
        ({}, "", []),
    ],
)
def test_quotas_of_control_groups(files: dict[str, str], membership: str, found: list[float], tmp_path: Path) -> None:
    assert control_groups(tmp_path, files, membership) == found


def test_a_quota_is_rounded_down_but_not_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("data.processors.CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr("data.processors.MEMBERSHIP", tmp_path / "membership")
    for quota, count in (("250000", 2), ("50000", 1), ("1600000", 8)):
        control_groups(tmp_path, {"cpu.max": f"{quota} 100000"}, "0::/\n")
        assert num_processors() == count


def test_what_slurm_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("data.processors.quotas", lambda root, membership: [])
    for variables, count in (({"ON_NODE": "6"}, 6), ({"ON_NODE": "6", "PER_TASK": "2"}, 2), ({"PER_TASK": "64"}, 8)):
        for name in ("ON_NODE", "PER_TASK"):
            monkeypatch.setenv(f"SLURM_CPUS_{name}", variables.get(name, ""))
        assert num_processors() == count


def test_ray_and_the_check_of_resources_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("ray.init", lambda **options: given.update(options, folder=Path.cwd()))
    monkeypatch.setattr(executor, "num_processors", lambda: 3)
    monkeypatch.setattr("tune.checks.num_processors", lambda: 3)
    before = Path.cwd()
    executor._start()
    assert (given["num_cpus"], given["folder"], Path.cwd()) == (3, ROOT, before)
    check_resources(make_spec({"cpus_per_trial": 3.0}))
    with pytest.raises(ValueError, match=rf"this process may use 3 of the machine's {os.cpu_count()} CPUs"):
        check_resources(make_spec({"cpus_per_trial": 4.0}))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment, which is as it was before at the end."""
    held = dict(os.environ)
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(held)


def test_the_longest_folder_that_ray_takes(variables: dict[str, str]) -> None:
    """The limit is that of Ray's own check, with the longest name that Ray gives a socket."""
    from ray._private.utils import validate_socket_filepath

    limit = environment.SOCKET_BYTES - len(environment.SOCKET) - 1
    for length, fits in ((limit, True), (limit + 1, False)):
        folder = "/" + "é" * ((length - 1) // 2) + "x" * ((length - 1) % 2)
        assert len(folder.encode()) == length
        variables["TMPDIR"] = folder
        assert (short_folder() == ("", "")) is fits
        if fits:
            validate_socket_filepath(f"{folder}/{environment.SOCKET}")
        else:
            with pytest.raises(OSError, match="AF_UNIX path length"):
                validate_socket_filepath(f"{folder}/{environment.SOCKET}")


def test_a_long_temporary_folder_is_not_rays(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    long = "/scratch/" + "x" * 60
    variables["TMPDIR"] = long
    line = f"TMPDIR: '{long}' is too long for Ray's sockets; they are kept in /tmp (RAY_TMPDIR names another folder)"
    assert choose_folder() == line
    assert variables["RAY_TMPDIR"] == "/tmp"
    assert choose_folder() == ""
    variables["RAY_TMPDIR"] = long
    with pytest.raises(ValueError, match=rf"^RAY_TMPDIR: '{long}' is too long for Ray's sockets; its path must have at most"):
        check_resources(make_spec({}))
    del variables["RAY_TMPDIR"]
    monkeypatch.setattr(environment, "SHORT_FOLDERS", ("/proc/none",))
    with pytest.raises(ValueError, match=r"^TMPDIR: .*; set RAY_TMPDIR to a folder whose path has at most"):
        short_folder()


def test_a_relative_folder_means_the_same_to_all_processes(variables: dict[str, str]) -> None:
    variables["RAY_TMPDIR"] = "here"
    assert choose_folder() == ""
    assert variables["RAY_TMPDIR"] == str(Path("here").absolute())


@pytest.mark.parametrize(("home", "made_up"), [("home", False), ("/proc/nohome", True), ("/dev/null/home", True)])
def test_a_token_where_the_home_folder_takes_none(home: str, made_up: bool, tmp_path: Path, variables: dict[str, str]) -> None:
    variables["HOME"] = str(tmp_path / home)
    choose_token()
    assert ("RAY_AUTH_TOKEN" in variables) is made_up
    variables["RAY_AUTH_TOKEN_PATH"] = "own"
    variables.pop("RAY_AUTH_TOKEN", None)
    choose_token()
    assert "RAY_AUTH_TOKEN" not in variables


def test_a_cache_in_a_home_folder_that_is_not_there(tmp_path: Path) -> None:
    environ = {**os.environ, "HOME": "/proc/nohome"}
    del environ["NOISY_LABEL_CACHE"]
    environ.pop("XDG_CACHE_HOME", None)
    command = [*SEARCH, "launch", "first", "--storage", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    folder = "/proc/nohome/.cache/noisy-label-search"
    said = f"error: cache folder {folder} cannot be used (No such file or directory); set NOISY_LABEL_CACHE to one that can"
    assert done.stderr.splitlines()[-1] == said


# -- a sweep ----------------------------------------------------------------------------------------------------------


def test_a_sweep_in_an_odd_place(storage: Path, tmp_path: Path) -> None:
    """From a folder whose packages have our names, on one of the processors, with a long temporary folder and no home: all
    trials run, one at a time, with our code. ``PYTHONPATH`` keeps its meaning."""
    folder, long = hostile_folder(tmp_path / "own"), tmp_path / ("x" * 60)
    long.mkdir()
    environ = {**os.environ, "HOME": "/proc/nohome", "TMPDIR": str(long), "PYTHONPATH": f".{os.pathsep}"}
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        environ.pop(name, None)
    options = ["--method", "ce", "--model", "mlp", "--trials", "3", "--epochs", "2", "--storage", str(storage)]
    command = [*SEARCH, "launch", "odd", *options]
    done = subprocess.run(
        command, env=environ, cwd=folder, preexec_fn=one_processor, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is too long for Ray's sockets; they are kept in /tmp" in done.stdout
    assert all(row["state"] in ("complete", "stopped") for row in board(storage, "odd"))
    assert len(board(storage, "odd")) == 3
    trials = [line["trial"] for line in metric_lines(storage / "odd")]
    assert trials == sorted(trials), "with two at a time their epochs would mix"
    assert not Path("/proc/nohome").exists()
