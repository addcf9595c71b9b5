"""Causes faults inside a sweep's workers, whose ``PYTHONPATH`` leads here; the product knows nothing of it.

``$FAULTS`` names a JSON file with, by the seed of a trial, what strikes it, at the start of which epoch, and how often. Beside
it ``struck`` gets a line for each. ``$EPOCH_SECONDS`` is how much longer every epoch takes. The way in is the clock that
``training.fit`` reads before an epoch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

CLOCK = time.perf_counter
READ = Path.read_bytes
FAULTS = Path(os.environ.get("FAULTS", os.devnull))


def hang(fit: FrameType) -> None:
    """In C and with the interpreter's lock held: no signal handler and no other thread of Python's gets a turn."""
    re.match("(a+)+$", "a" * 64 + "b")


def sleep(fit: FrameType) -> None:
    time.sleep(60)


def kill(fit: FrameType) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear(fit: FrameType) -> None:
    """Half of the trial's checkpoint is left when its process dies."""
    assert fit.f_back
    path: Path = fit.f_back.f_locals["self"].path
    os.truncate(path, path.stat().st_size // 2)
    kill(fit)


def poison(fit: FrameType) -> None:
    """Weights that are no numbers, as after a step that was too long."""
    for weight in fit.f_locals["method"].parameters():
        weight.data.fill_(float("nan"))


def exhaust_python(fit: FrameType) -> None:
    bytearray(1 << 60)


def exhaust_torch(fit: FrameType) -> None:
    import torch

    torch.empty(1 << 58)


def exhaust_gpu(fit: FrameType) -> None:
    """Played: it takes a GPU to cause it."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def swallow(fit: FrameType) -> None:
    """More and more memory, in a control group that has little of it."""
    Path(os.environ["FAULTS_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
    held: list[Any] = []
    while True:
        held.append(b"x" * (1 << 24))


def withhold(fit: FrameType) -> None:
    """The process dies, and the next one that goes on with the trial cannot read its checkpoint."""
    FAULTS.with_name("away").touch()
    kill(fit)


def read_bytes(path: Path) -> bytes:
    away = FAULTS.with_name("away")
    if path.name == "checkpoint.pt" and away.exists():
        with away.open("a") as file:
            file.write("x")
        if away.stat().st_size == 3:  # as often as it is tried
            away.unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return READ(path)


def clock() -> float:
    caller = sys._getframe(1)
    if caller.f_code.co_name == "fit":
        here = (caller.f_locals["seed"], caller.f_locals["done"])
        if here != getattr(clock, "seen", None):
            clock.seen = here  # type: ignore[attr-defined]
            time.sleep(float(os.environ.get("EPOCH_SECONDS", 0)))
            if FAULTS.is_file():
                strike(caller, *here)
    return CLOCK()


def strike(fit: FrameType, seed: int, done: int) -> None:
    what, epoch, times = json.loads(FAULTS.read_text()).get(str(seed), ("", 0, 0))
    struck = FAULTS.with_name("struck")
    line = f"{seed} {what} "
    if epoch == done + 1 and (struck.read_text() if struck.exists() else "").count(line) < times:
        with struck.open("a") as file:
            file.write(f"{line}{os.getpid()}\n")
        globals()[what](fit)


time.perf_counter = clock
Path.read_bytes = read_bytes  # type: ignore[method-assign]
