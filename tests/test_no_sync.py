"""Between the first batch of an epoch and the last, nobody waits for the device: a GPU's queue of work never runs dry.

There is no GPU here, so one is played. A tensor on it is a wrapper that claims torch's device without storage (``meta``) and
holds a host tensor, on which the operations are done; a dispatch mode sees every operation below autograd, and notes those
that make the host wait on a GPU (``torch.cuda.set_sync_debug_mode`` warns of the same): an element that is read, a shape that
depends on elements, a copy back, and a copy there that does not say ``non_blocking``. What would fail on a GPU, tensors of two
devices in one operation, fails here, too.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from data.table import TrainData
from data.views import VIEWS, make_views
from hparams import declared
from methods import METHODS
from methods.base import Clock, Method, Task
from models.network import Network
from tests.tiny import EPOCHS, K, make, plain, tiny_data, tiny_net, trusted_data
from training.fit import _train
from training.statistics import RefinementStatistics

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("meta")
aten = torch.ops.aten
READS = {  # operations whose result, or its shape, the host must have
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
COPIES = {aten._to_copy, aten.copy_, aten._copy_from}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class OnDevice(Tensor):
    """A tensor on the device that is played; ``host`` holds its elements. Only a :class:`Machine` can use it."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=DEVICE
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        """As torch does it for tensors elsewhere, which it refuses to do for a wrapper."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the machine")


class Machine(TorchDispatchMode):
    """A host with a device. ``waits`` lists the operations for which the host waited, with the line of the project."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation, given = func.overloadpacket, {}

        def taken(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            held = value.host if isinstance(value, OnDevice) else value
            given[id(held)] = value
            return held

        host_args, host_kwargs = tree_map(taken, (args, kwargs))
        tensors = list(given.values())
        remote = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        device = kwargs.get("device") or (DEVICE if remote else torch.device("cpu"))
        if operation in COPIES:
            self.note_copy(operation, args, kwargs, device)
        elif remote:
            self.note(func, operation, args, [t for t in tensors if not isinstance(t, OnDevice) and t.dim()])
        if kwargs.get("device") is not None:
            host_kwargs["device"] = torch.device("cpu")

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return given.get(id(value), OnDevice(value) if device == DEVICE else value)

        return tree_map(placed, func(*host_args, **host_kwargs))

    def note_copy(self, operation: Any, args: Any, kwargs: Any, device: torch.device) -> None:
        """``_to_copy(source)`` or ``copy_(goal, source)``."""
        goal, source = args[:2] if operation is aten.copy_ else (None, args[0])
        there = isinstance(goal, OnDevice) if goal is not None else device == DEVICE
        come_from_there = isinstance(source, OnDevice)
        blocking = not (kwargs.get("non_blocking") or (operation is aten.copy_ and args[2:3] == (True,)))
        if come_from_there and not there:
            self.wait("a copy from the device")  # non_blocking would be worse: the host would read what is not there yet
        elif there and not come_from_there and blocking:
            self.wait("a copy to the device that blocks")

    def note(self, func: Any, operation: Any, args: Any, on_host: list[Tensor]) -> None:
        if operation in READS:
            self.wait(str(func))
        elif operation in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if on_host:
                self.wait("indices on the host")
            elif any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("a mask as an index")
        else:
            assert not on_host, f"{func} of tensors on two devices"

    def wait(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back and (frame.f_globals is globals() or Path(frame.f_code.co_filename).parent.parent != ROOT):
            frame = frame.f_back
        self.waits.append(f"{what}: {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")


class Constants(TorchFunctionMode):
    """``torch.tensor`` makes what it is given on the host first, as for a GPU; for ``meta`` it would not make it at all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return torch.tensor(*args, **{**kwargs, "device": None}).to(DEVICE)
        return func(*args, **kwargs)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    autocast = torch.autocast.__init__  # knows no ``meta``: there it casts nothing

    def started(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    monkeypatch.setattr(torch.autocast, "__init__", started)
    with Machine() as machine, Constants():
        yield machine


# The machine


def remote(*values: float) -> Tensor:
    return torch.tensor(values).to(DEVICE, non_blocking=True)


WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: remote(1.0).item(),
    "float": lambda: float(remote(1.0)),
    "int": lambda: int(remote(1.0).sum()),
    "bool": lambda: bool(remote(1.0)),
    "if": lambda: 1 if remote(1.0) > 0 else 2,
    "max": lambda: max(remote(1.0), 2.0),  # a comparison that Python decides
    "equal": lambda: torch.equal(remote(1.0), remote(1.0)),
    "nonzero": lambda: torch.nonzero(remote(1.0, 0.0)),
    "where": lambda: torch.where(remote(1.0, 0.0) > 0),
    "mask": lambda: remote(1.0, 2.0)[remote(1.0, 0.0) > 0],
    "mask on the host": lambda: remote(1.0, 2.0)[torch.tensor([True, False])],
    "masked write": lambda: remote(1.0, 2.0).__setitem__(remote(1.0, 0.0) > 0, remote(3.0)),
    "masked_select": lambda: remote(1.0, 2.0).masked_select(remote(1.0, 0.0) > 0),
    "indices on the host": lambda: remote(1.0, 2.0)[torch.tensor([0, 1])],
    "scalar index": lambda: remote(1.0, 2.0)[remote(1.0, 2.0).argmax()],
    "slice": lambda: remote(1.0, 2.0)[remote(1.0, 2.0).argmax() :],
    "unique": lambda: remote(1.0, 1.0).unique(),
    "unique_consecutive": lambda: remote(1.0, 1.0).unique_consecutive(),
    "repeat_interleave": lambda: remote(1.0, 1.0).repeat_interleave(remote(1.0, 2.0).long()),
    "one_hot": lambda: torch.nn.functional.one_hot(remote(1.0).long()),
    "tolist": lambda: remote(1.0, 2.0).tolist(),
    "cpu": lambda: remote(1.0).cpu(),
    "cpu that does not wait": lambda: remote(1.0).to("cpu", non_blocking=True),
    "numpy": lambda: remote(1.0).cpu().numpy(),
    "copy back": lambda: torch.zeros(1).copy_(remote(1.0)),
    "copy there": lambda: torch.ones(1).to(DEVICE),
    "copy into": lambda: remote(1.0).copy_(torch.ones(1)),
    "made there": lambda: torch.tensor([1.0], device=DEVICE),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_machine_notes_what_waits(name: str, machine: Machine) -> None:
    WAITING[name]()
    assert len(machine.waits) == 1


def test_numpy_of_a_device_fails() -> None:
    with Machine(), pytest.raises((TypeError, RuntimeError)):
        remote(1.0).numpy()


def test_the_machine_computes_and_notes_nothing_else(machine: Machine) -> None:
    """The gradient of sum((w x)^2) with a selection, random numbers of both sides, and writes in place."""
    x, w = remote(1.0, 2.0, 3.0), remote(2.0, 2.0, 2.0).requires_grad_()
    y = torch.where(x > 1, w * x, 0.0)
    y.square().sum().backward()
    rows = torch.zeros(3, device=DEVICE)
    rows[torch.randperm(3, device=DEVICE)] = 1.0
    rows[:2] += float(torch.rand(()) < 2)  # the host's own number
    rows.mul_(torch.tensor(3.0))  # one number of the host goes along with the call
    assert torch.nn.functional.one_hot(x.long() - 1, 3).device == DEVICE
    assert machine.waits == []
    assert w.grad is not None
    assert (w.grad.tolist(), rows.tolist()) == ([0, 16, 36], [6, 6, 3])
    assert len(machine.waits) == 2, "two lists were read"
    with pytest.raises(AssertionError, match="two devices"):
        x + torch.ones(3)


# Views, methods and the trainer


@pytest.mark.parametrize("kind", VIEWS)
def test_no_view_waits(kind: str, machine: Machine) -> None:
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8, device=DEVICE)
    for view in make_views((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 16, kind):
        assert view(images).device == DEVICE
    assert machine.waits == []


def weak(images: Tensor) -> Tensor:
    return plain(images) + 0.1 * torch.randn(images.shape, device=images.device)


def task_on_the_device(labels: Tensor) -> Task:
    def make_net(num_classes: int | None = None) -> Network:
        return tiny_net(num_classes).to(DEVICE)

    trusted = trusted_data()
    return Task(K, labels, make_net, plain, weak, weak, TrainData(trusted.images.to(DEVICE), trusted.labels.to(DEVICE)))


def watched(machine: Machine, batches: Iterable[Any], waits: list[str]) -> Iterator[Any]:
    """The same batches; ``waits`` gets what waited from the first to the last. The start and the end of an epoch may wait."""
    iterator = iter(batches)
    batch = next(iterator)
    machine.waits.clear()
    while batch is not None:
        yield batch
        so_far = len(machine.waits)
        batch = next(iterator, None)
    waits += machine.waits[:so_far]


def other_choices(name: str) -> dict[str, Any]:
    """The values of a method's switches that are not its defaults."""
    others: dict[str, Any] = {}
    for key, parameter in declared(METHODS[name].Config).items():
        if isinstance(parameter.default, bool):
            others[key] = not parameter.default
        elif parameter.choices:
            others[key] = next(choice for choice in parameter.choices if choice != parameter.default)
    return others


@pytest.mark.parametrize(("others", "mapped"), [(False, False), (True, True)], ids=["defaults", "choices and mapped images"])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_within_an_epoch(
    name: str, others: bool, mapped: bool, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, in the middle and at the end of a budget; ``mapped``: a large set's images stay on the host."""
    whole = tiny_data()
    data = TrainData(whole.images, whole.labels.to(DEVICE), torch.arange(len(whole)))
    if not mapped:
        data = dataclasses.replace(data, images=data.images.to(DEVICE), rows=data.rows.to(DEVICE))
    method: Method[Any] = make(name, task_on_the_device(data.labels), **(other_choices(name) if others else {})).to(DEVICE)
    batches, waits = method.batches, list[str]()
    monkeypatch.setattr(method, "batches", lambda *given: watched(machine, batches(*given), waits))
    statistics = RefinementStatistics(data.labels, None, K)
    for epoch in (0, EPOCHS // 2, EPOCHS - 1):
        torch.manual_seed(epoch)
        _train(method, SimpleNamespace(train=data), statistics, Clock(epoch, EPOCHS))  # type: ignore[arg-type]
    assert waits == []
