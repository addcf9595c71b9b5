"""The nodes of a Ray cluster: which one is meant, how many trials they hold, and whether a trial can run on each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from data.cache import same_table
from data.spec import DataSpec
from errors import UserError
from training.locations import check_writable, location
from tune.search.coordinator import Coordinator
from tune.spec import SweepSpec
from tune.store.base import PROBE
from tune.store.stored_sweep import Sweep

ADDRESS = re.compile(r"auto|(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
PATIENCE = 5  # seconds that a cluster gets to answer
LOOK_SECONDS = 3.0  # between looks at the nodes
SILENT_SECONDS = 30.0  # that no node holds a trial before it is said
MAX_REFUSALS = 3  # questions that a living node may fail to answer


def address_of(spec: SweepSpec) -> str:
    """``--address``, else ``RAY_ADDRESS``, as everywhere in Ray; empty for a Ray of our own on this machine.

    ValueError where it is neither ``local`` nor a cluster's address.
    """
    name, address = ("--address", spec.address) if spec.address else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS", ""))
    if address in ("", "local"):
        return ""
    if "://" in address:  # of the jobs' server, or of Ray Client, behind which Tune cannot run its loop
        raise UserError(
            f"{name}: {address!r} is not allowed; from outside the cluster a sweep is submitted: ray job submit -- python "
            f"search.py ... --address auto; on a machine of the cluster give auto or HOST:PORT, for this machine alone local"
        )
    if not ADDRESS.fullmatch(address):
        raise UserError(f"{name}: {address!r} is not allowed; it must be auto, HOST:PORT or local")
    return address


def check_answers(address: str) -> None:
    """ValueError where nothing listens at a cluster's address, for which Ray takes 20 s."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"Ray cluster {address!r} cannot be joined: nothing answers there ({error})") from error


def room(resources: Mapping[str, float], spec: SweepSpec) -> int:
    """How many trials a node holds at a time."""
    fits = [how_many(resources.get("CPU", 0.0), spec.cpus_per_trial)]
    if spec.gpus_per_trial >= 1:
        fits.append(how_many(resources.get("GPU", 0.0), spec.gpus_per_trial))
    elif spec.gpus_per_trial > 0:
        fits.append(int(resources.get("GPU", 0.0)) * how_many(1, spec.gpus_per_trial))  # a fraction does not span two GPUs
    return min(fits)


def how_many(have: float, need: float) -> int:
    """How often ``need`` goes into ``have``, in Ray's units of a ten-thousandth."""
    return round(have * 10_000) // round(need * 10_000)


def living_nodes() -> dict[str, dict[str, Any]]:
    """Ray's record of each node that is alive, by its id."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def capacity(spec: SweepSpec) -> int:
    """How many trials the living nodes hold at a time. ValueError where none holds even one."""
    nodes = [node["Resources"] for node in living_nodes().values()]
    if total := sum(room(resources, spec) for resources in nodes):
        return total
    most = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}
    raise UserError(
        f"no node holds a trial of {spec.cpus_per_trial:g} CPUs and {spec.gpus_per_trial:g} GPUs; "
        f"the largest have {most['CPU']:g} CPUs and {most['GPU']:g} GPUs"
    )


class Nodes:
    """Follows the nodes of a cluster. A node counts once a task there has seen the sweep's folder and the data."""

    def __init__(self, sweep: Sweep, spec: SweepSpec) -> None:
        self.sweep = sweep
        self.spec = spec
        self.usable: set[str] = set()  # ids of nodes that have answered that a trial can run on them
        self.questions: dict[str, Any] = {}
        self.refusals: Counter[str] = Counter()
        self.capacity = 0
        self.wrote_probe = False
        self.looked_at = self.had_room_at = time.monotonic()
        self.said_waiting = False

    def check(self) -> int:
        """How many trials the nodes hold, each of them asked. ValueError where on one no trial can run, or none holds any.

        A number of trials given by the user is taken at its word: the cluster may grow once there are trials that wait.
        """
        if not self.spec.concurrent:
            try:
                capacity(self.spec)
            except UserError as error:
                raise UserError(
                    f"{error}; if the cluster brings nodes on demand, say how many trials: --concurrent N"
                ) from error
        self._ask_new_nodes(patience=None)
        while self.questions:
            time.sleep(LOOK_SECONDS)  # one did not answer: it is dying, and soon gone, or asked again
            self._ask_new_nodes(patience=None)
        return self.capacity

    def follow(self, coordinator: Coordinator, say: Callable[[str], None]) -> None:
        """Sets how many trials run at a time, now and then; stops the sweep where one cannot run on a new node."""
        now = time.monotonic()
        if now - self.looked_at < LOOK_SECONDS:
            return
        self.looked_at, before = now, self.capacity
        try:
            self._ask_new_nodes(patience=0)
        except UserError as error:
            coordinator.halt(str(error))
            return
        coordinator.concurrent = self.spec.concurrent or self.capacity
        if self.capacity:
            self.had_room_at, self.said_waiting = now, False
            if self.capacity != before:
                say(f"the cluster holds {self.capacity} trials at a time (before: {before})")
        elif now - self.had_room_at >= SILENT_SECONDS and not self.said_waiting:
            say("no node of the cluster holds a trial; waiting for one")
            self.said_waiting = True

    def _ask_new_nodes(self, patience: float | None) -> None:
        """Asks the nodes that are new and takes the answers that are there within ``patience`` seconds (None: all of them)."""
        import ray

        living = living_nodes()
        rooms = {key: num for key, node in living.items() if (num := room(node["Resources"], self.spec))}
        self.questions = {key: answer for key, answer in self.questions.items() if key in rooms}
        for key in rooms.keys() - self.usable - self.questions.keys():
            self.questions[key] = self._ask(key)
        answers = list(self.questions.values())
        if answers:
            ray.wait(answers, num_returns=len(answers), timeout=patience)
            for key in [key for key, answer in self.questions.items() if ray.wait([answer], timeout=0)[0]]:
                self._take_answer(key, living[key])
        self.capacity = sum(num for key, num in rooms.items() if key in self.usable)

    def _ask(self, key: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pinned = NodeAffinitySchedulingStrategy(key, soft=False)
        question: Any = ray.remote(why_not_here)
        ask = question.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
        data = dataclasses.replace(DataSpec.of(self.spec), table=str(self.sweep.provenance.get("table", "")))
        return ask.remote(self._probe(), self.sweep.provenance["id"], data)

    def _probe(self) -> str:
        """A file in the sweep's folder that no other sweep has."""
        probe = self.sweep.folder / PROBE
        if not self.wrote_probe:
            check_writable(self.sweep.folder)
            probe.write_bytes(self.sweep.provenance["id"].encode())
            self.wrote_probe = True
        return str(probe)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        if self.wrote_probe:
            with contextlib.suppress(OSError):  # an object store that is away; the next driver writes it again, and removes it
                (self.sweep.folder / PROBE).unlink()

    def _take_answer(self, key: str, node: Mapping[str, Any]) -> None:
        import ray

        try:
            trouble = ray.get(self.questions[key])
        except ray.exceptions.RayError as error:
            self.refusals[key] += 1
            if self.refusals[key] < MAX_REFUSALS:
                self.questions[key] = self._ask(key)
                return
            trouble = f"cannot run a trial: {str(error).strip().splitlines()[-1]}"
        del self.questions[key]
        if trouble:
            raise UserError(f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']}) {trouble}")
        self.usable.add(key)


def why_not_here(probe: str, text: str, data: DataSpec) -> str:
    """Why no trial of a sweep can run on the node that this is called on; empty where one can.

    The file ``probe`` holds ``text`` where the sweep's folder is the driver's. The data are decoded into the node's cache.
    """
    folder = location(probe).parent
    try:
        same = location(probe).read_bytes() == text.encode()
    except OSError:
        same = False
    if not same:
        return f"does not see the storage {folder.parent}; give --storage a folder that all nodes share under this path"
    try:
        check_writable(folder)
    except OSError as error:
        return f"cannot write the storage {folder.parent}: {error.strerror or error}"
    try:
        same_table(data.source(), data.table)
    except (ValueError, OSError) as error:
        return f"cannot read the data: {error}"
    return ""
