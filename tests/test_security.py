"""What comes from elsewhere runs no code, secrets are written nowhere, and nobody else can connect.

Elsewhere: checkpoints that hold code (test_training), label files that do (test_data_readers_cifar), images outside of their
folder (test_data_readers_own), and names of sweeps outside of the storage (test_command_line).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import pytest

import search
from tests.faulty_sweep import FaultySweep
from tests.refusals import refused
from tests.sweep_process import make_finished_sweep
from tests.sweeps import files_with

# -- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_in_the_environment_is_written_nowhere(faulty: FaultySweep, tmp_path: Path) -> None:
    """Neither during a real sweep with lost processes and tracebacks nor after it: not in the storage, MLflow's store, the
    logs, Ray's folder, what Tune writes."""
    assert len(list(faulty.ray.rglob("*.log"))) > 3, "Ray wrote its logs here"
    assert files_with("can't allocate memory", faulty.storage), "what is searched holds what was written"
    for name, secret in faulty.secrets.items():
        assert files_with(secret, faulty.folder, faulty.ray) == [], name
    assert faulty.leaks == set()
    assert faulty.scratch, "what Tune wrote was there to be searched"
    (tmp_path / "planted").write_bytes(b"\0" + faulty.secrets["PGPASSWORD"].encode() + b"\xff")
    assert files_with(faulty.secrets["PGPASSWORD"], tmp_path) == [tmp_path / "planted"]


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:hunter2@127.0.0.1:{port}",
        "http://:hunter2@127.0.0.1:{port}",
        "postgresql://user:hunter2@127.0.0.1:{port}/x",
        "postgresql://user@127.0.0.1:{port}/x?password=hunter2",
        "mysql+nodriver://user:hunter2@127.0.0.1:{port}/x",
        "postgresql://user:a/hunter2@127.0.0.1:{port}/x",
        "postgresql://user:a#hunter2@127.0.0.1:{port}/x",
        "postgresql://user:a?hunter2@127.0.0.1:{port}/x",
        "postgresql://user:a@hunter2@127.0.0.1:{port}/x",
        "postgresql://user@127.0.0.1:{port}/x?password=a@hunter2",
        "mysql+nodriver://user@127.0.0.1:{port}/x?passwd=hunter2",
        "mssql+pyodbc:///?odbc_connect=PWD%3Dhunter2",
        "https://hunter2@127.0.0.1:{port}",
        "http://127.0.0.1:{port}/?hunter2",
        "mysql+nodriver://user@127.0.0.1/x?passwd=a@hunter2",
        "http://127.0.0.1:{port}/?token=hunter2",
    ],
)
@pytest.mark.parametrize("verb", ["launch", "resume"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(
    verb: str, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if verb == "resume":
            make_finished_sweep(tmp_path, "some")
        address = uri.format(port=server.getsockname()[1])
        line = refused(capsys, verb, "some", "--storage", tmp_path, "--tracking", address)
    assert "hunter2" not in line
    assert "password" in line
    assert files_with("hunter2", tmp_path) == []


# -- code from elsewhere ----------------------------------------------------------------------------------------------

BOMB = "!!python/object/apply:builtins.open [{path}, w]"


@pytest.mark.parametrize("place", ["spec", "sweep", "recipe"])
def test_yaml_runs_no_code(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A spec file, the record of a sweep, and a configuration to train; each with a tag that makes a file when it is obeyed."""
    sprung, file = tmp_path / "sprung", tmp_path / "file.yaml"
    bomb = BOMB.format(path=sprung)
    if place == "spec":
        file.write_text(f"method: ce\nepochs: {bomb}\n")
        refused(capsys, "launch", "some", "--storage", tmp_path / "runs", "--spec", file)
    elif place == "sweep":
        record = make_finished_sweep(tmp_path, "some") / "sweep.yaml"
        record.write_text(record.read_text().replace("epochs: 3", f"epochs: {bomb}"))
        for verb in ("best", "resume", "retrain"):
            refused(capsys, verb, "some", "--storage", tmp_path)
    else:
        file.write_text(f"method: ce\nvalues: {bomb}\n")
        refused(capsys, "train", file)
    assert not sprung.exists()
    import yaml

    yaml.unsafe_load(bomb).close()
    assert sprung.exists(), "the bomb works"


# -- servers ----------------------------------------------------------------------------------------------------------


def test_ray_listens_on_this_machines_own_address(faulty: FaultySweep) -> None:
    names = {name for name, _ in faulty.listening}
    assert {"gcs_server", "raylet"} <= names
    heard = {ipaddress.ip_address(ip.removeprefix("::ffff:")) for _, ip in faulty.listening}
    assert [str(ip) for ip in heard if not ip.is_loopback] == []
    assert not any("dashboard" in name.lower() and "agent" not in name.lower() for name in names)


def test_the_pages_are_served_on_this_machines_own_address(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    search.main(["ui", "--storage", str(storage), "--port", port])
    (command,) = started
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command.count("--host") == 1
