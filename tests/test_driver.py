"""A driver that is asked to stop while its main thread stays in C code, or has other things to end."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.sweep_process import PATIENCE, ROOT
from tests.sweeps import make_sweep
from tune import commands
from tune.cluster import interruption as driver_module
from tune.cluster.interruption import LOOK_SECONDS, Interruption
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger

STUCK = """
import ctypes, sys
from pathlib import Path
from search import leave
from tune.cluster import interruption as driver
from tune.cluster import executor
from tune.search.ledger import SWEEP
from tune.store.stored_sweep import Sweep
from tune.execution import execute

def run(coordinator, spec, interruption, say, address):
    if sys.argv[2] == "gone":
        interruption.why_ray_died = lambda: "Ray on this machine has ended"
    Path(sys.argv[1], "stuck").touch()
    mutex = ctypes.create_string_buffer(64)
    while True:  # the second time for good, whatever signals come
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

driver.STUCK_SECONDS = 1
executor.run = run
sweep = Sweep.read(Path(sys.argv[1]))
with sweep.files.lock("the command that goes on"):
    leave(execute(sweep, SWEEP, "the command that goes on").say())
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("gone", 1, "error: Ray on this machine has ended; go on with: the command that goes on"),
        ("Ctrl-C", 130, "the command that goes on"),
        ("stop", 143, "the command that goes on"),
        ("unread", 143, ""),
    ],
)
def test_a_driver_that_cannot_be_reached_ends_with_its_last_words(storage: Path, how: str, code: int, said: str) -> None:
    """Its terminal gets the cursor back; a terminal that has gone does not keep it."""
    sweep = make_sweep(storage)
    ours, its = pty.openpty()
    command = [sys.executable, "-c", STUCK, sweep.folder, how]
    driver = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=ROOT, start_new_session=True)
    os.close(its)
    deadline = time.monotonic() + PATIENCE
    while not (sweep.folder / "stuck").exists():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == "unread":
        os.close(ours)
        driver.terminate()
    elif how == "Ctrl-C":
        driver.send_signal(signal.SIGINT)
    elif how == "stop":
        assert commands.stop("first", storage) == 0
    assert driver.wait(PATIENCE) == code
    if said:
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # all that was written has been read
                break
        os.close(ours)
        assert shown.decode().splitlines()[-1] == said
        assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") > 0


class Silent:
    """A stop request in a place that does not answer."""

    def exists(self) -> bool:
        threading.Event().wait()
        raise AssertionError("it has answered")

    def touch(self) -> None: ...

    def unlink(self, missing_ok: bool = False) -> None: ...


def test_time_is_kept_where_the_stop_request_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thread that ends a driver whose main thread is stuck."""
    monkeypatch.setattr(driver_module, "STUCK_SECONDS", 1.0)
    ended = threading.Event()
    with Interruption(Coordinator(Ledger(make_sweep(tmp_path)), total=4, concurrent=2), Silent(), ended.set):
        time.sleep(2 * LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(PATIENCE)


def test_a_stop_is_asked_for_once(tmp_path: Path) -> None:
    """However long the request stands: what is done at the end, for MLflow above all, is not broken off by it."""
    sweep = make_sweep(tmp_path)
    coordinator = Coordinator(Ledger(sweep), total=4, concurrent=2)
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.1):
            sweep.files.stop_request.touch()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with Interruption(coordinator, sweep.files.stop_request) as interruption:
            assert coordinator.halted.wait(PATIENCE)
            interruption.stop_timer()
            time.sleep(5 * LOOK_SECONDS)
            assert interruption.signal == signal.SIGTERM
            over.set()
            asking.join()
    finally:
        over.set()
    assert not sweep.files.stop_request.exists()
