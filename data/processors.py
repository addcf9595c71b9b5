"""How many processors this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SLURM = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")


def num_processors() -> int:
    """How many processors this process may keep busy, at least 1.

    That is the smallest of: the processors that it may run on (``taskset``, a cpuset, Slurm's binding); the quotas of its
    control groups, rounded down as Ray rounds them; and what Slurm gave to the task, which not every Slurm enforces.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = [int(number) for number in map(os.environ.get, SLURM) if number and number.isdigit()]
    return max(1, int(min([allowed, *slurm, *quotas(CONTROL_GROUPS, MEMBERSHIP)])))


def quotas(root: Path, membership: Path) -> Iterator[float]:
    """The quotas in processors of a process's control groups and of those above them, version 1 or 2.

    ``membership`` lists the groups as ``/proc/self/cgroup`` does. In a container they may lie outside of what is mounted at
    ``root``; the container's own group is then ``root`` itself.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # this is no Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        here = Path(group.lstrip("/"))
        for part in [here, *here.parents]:
            yield from _quota(top / part)


def _quota(group: Path) -> Iterator[float]:
    """The quota of one control group, where it has one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
    except (OSError, ValueError):  # the group is not mounted here, or has no such controller
        return
