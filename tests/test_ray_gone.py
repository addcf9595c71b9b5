"""Ray's own processes die under a driver, or with it: it ends in time, with the command that goes on, and loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.sweep_process import assert_projected, assert_whole, board, end_all, metric_lines, search, start, wait_until

SPEC = {"method": "ce", "model": "mlp", "trials": 500, "epochs": 60, "scheduler": "none", "concurrent": 2}
TIMING = {"checkpoint_seconds": 0.5, "report_seconds": 0.2}


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


@pytest.mark.parametrize(
    "victims",
    [("raylet", "everything"), pytest.param(("gcs_server",), marks=pytest.mark.slow)],
    ids=["its node manager", "its control service"],
)
def test_ray_dies_and_the_driver_ends_in_time(
    victims: tuple[str, ...], tmp_path: Path, storage: Path, some_ray: dict[str, str]
) -> None:
    """Its node manager or its control service is killed, or all processes get SIGTERM, as from a service manager."""
    folder, log, spec = storage / "gone", tmp_path / "log", tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC | TIMING))
    command = f"python search.py resume gone --storage {storage}"
    words: list[object] = ["launch", "gone", "--spec", spec]
    families: list[psutil.Process] = []
    for victim in victims:
        goal = len(metric_lines(folder)) + 10
        driver = start(log, *words, "--storage", storage)
        wait_until(lambda: len(metric_lines(folder)) >= goal, driver, log)  # noqa: B023  called here
        family = psutil.Process(driver.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {process.name() for process in family}
        assert os.getpgid(driver.pid) not in {os.getpgid(process.pid) for process in family}, "a terminal's end is not theirs"
        if victim == "everything":
            for process in family:
                process.terminate()
            driver.send_signal(signal.SIGTERM)
        else:
            next(process for process in family if process.name() == victim).kill()
        code = driver.wait(120)  # in seconds; one that does not notice stays for ever
        last = log.read_text().splitlines()[-1]
        if victim == "everything":
            assert (code, last) == (143, command)
        else:
            assert code == 1, log.read_text()
            assert last == f"error: Ray on this machine has ended; go on with: {command}"
        families += family
        words = ["resume", "gone"]
    search("resume", "gone", "--storage", storage, "--trials", len(board(storage, "gone")), env=some_ray)
    rows = board(storage, "gone")
    assert_whole(folder, rows, len(rows))
    assert_projected(storage, "gone", rows)
    _, alive = psutil.wait_procs(families, timeout=180)
    assert alive == []
