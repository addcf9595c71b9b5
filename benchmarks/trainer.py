"""Samples per second of this project's training loop beside one that is written the usual way: same data, network and batches.

    python benchmarks/trainer.py [--data digits|cifar-like] [--model NAME] [--methods alr,ce] [--epochs 10] [--repeats 5]
                                 [--samples 2000] [--batch 64] [--workers 2] [--device cpu,cuda] [--profile]
                                 [--out trainer.json]

The usual loop is what the official codes of the field have: PIL images in a list; torchvision's transforms (RandomCrop with
padding, RandomHorizontalFlip where ours flips, ToTensor, Normalize) in a DataLoader with ``--workers`` workers (2), and for
comparison with none; float32; ``loss.item()`` in every step; torch.optim.SGD. Its ALR keeps soft labels [N, K] on the host,
indexed by sample, with the predictions' ``.cpu()`` round trip. Workers are kept from epoch to epoch, which flatters it: many
codes start new ones. Ours is the trainer of a trial, statistics included. Both compute with one thread, as a trial does; the
usual loop has its worker processes beside it, on cores that a search would give to further trials.

A run is ``--epochs`` epochs after one that is not counted. In each repeat all are run right after each other; reported are the
median over repeats with its range, and the median of the ratios within repeats. "evaluated": the passes after the epochs count,
too: over the validation set after each, over the test set where a trial measures it, in both loops. "per core": samples of
training alone per second of processor time, workers included, which is what counts where every core has a trial, and which
other work on the machine disturbs less. "of matmul": floating-point operations of the steps, counted by torch, per second (on a
CPU of processor time), as a share of what torch.mm reaches in the same type in the same repeat. ``--profile`` prints instead
where our epochs spend their time, by median duration of each kind of operation. ``cifar-like`` are random 32 x 32 x 3 images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.dataset import Dataset  # noqa: E402  the checkout is not installed
from data.sources import READERS, Options, RawTable, Source  # noqa: E402
from data.table import Labelled  # noqa: E402
from methods.alr import ALRConfig  # noqa: E402
from methods.base import Clock, half_cosine, memory_momentum  # noqa: E402
from models import make_model  # noqa: E402
from training.trial_run import Recipe, TrialRun, tested_epochs  # noqa: E402

MODELS = {"digits": "small-cnn", "cifar-like": "resnet18"}


@dataclass(frozen=True)
class Speed:
    """Samples per second of training alone, with evaluation, and of training per second of processor time."""

    trained: float
    evaluated: float
    per_core: float


def cifar_like(argument: str, options: Options) -> Source:
    """Random images; their number is the argument."""

    def build() -> RawTable:
        stream = torch.Generator().manual_seed(0)
        images = torch.randint(256, (int(argument), 3, 32, 32), dtype=torch.uint8, generator=stream)
        return RawTable.of(images, 10, truth=torch.randint(10, (int(argument),), generator=stream))

    return Source(f"cifar-like:{argument}", f"cifar-like-{argument}", build, {}, views="flip-crop")


def synchronised(device: str) -> float:
    """Seconds on a clock, once the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def processor_seconds() -> float:
    """What this process and its workers have used."""
    family = [psutil.Process(), *psutil.Process().children()]
    return float(sum(sum(process.cpu_times()[:2]) for process in family))


# Ours


def recipe(method: str, options: argparse.Namespace) -> Recipe:
    data = "digits" if options.data == "digits" else f"cifar-like:{options.samples}"
    return Recipe(
        method,
        {"batch_size": options.batch},
        data=data,
        noise="symmetric:0.4",
        model=options.model,
        epochs=options.epochs + 1,
        seed=0,
    )


def ours(method: str, options: argparse.Namespace, device: str) -> Speed:
    experiment = TrialRun(recipe(method, options), device=device)
    num_train = len(experiment.recipe.dataset().train)
    experiment.advance()
    began = synchronised(device)
    trained = sum(num_train / experiment.advance().metrics["samples_per_second"] for _ in range(options.epochs))
    evaluated = synchronised(device) - began
    used = processor_seconds()
    run_steps(experiment, device)
    used = processor_seconds() - used
    return Speed(options.epochs * num_train / trained, options.epochs * num_train / evaluated, num_train / used)


def run_steps(experiment: TrialRun, device: str) -> None:
    """The last epoch of the budget without what comes after it."""
    clock = Clock(experiment.recipe.epochs - 1, experiment.recipe.epochs)
    experiment.method.train()
    for batch in experiment.method.batches(experiment.recipe.dataset(device).train, clock):
        experiment.statistics.observe(experiment.method.step(batch, clock))


# The usual way


class Images(TorchDataset[tuple[Tensor, int, int]]):
    """PIL images in a list: (transformed image, label, index)."""

    def __init__(self, data: Labelled, transform: Callable[[Any], Tensor]) -> None:
        from torchvision.transforms.functional import to_pil_image

        images = data.images if data.rows is None else data.images[data.rows]
        self.images = [to_pil_image(image) for image in images]
        self.labels: list[int] = data.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(self.images[index]), self.labels[index], index


def loaders(dataset: Dataset, options: argparse.Namespace, workers: int, device: str) -> list[DataLoader[Any]]:
    """Of the training, the validation and the test set."""
    from torchvision import transforms

    size = dataset.train.images.shape[2]
    flips = [transforms.RandomHorizontalFlip()] if dataset.source.views == "flip-crop" else []
    plain = [transforms.ToTensor(), transforms.Normalize(dataset.mean, dataset.std)]
    weak = [transforms.RandomCrop(size, padding=size // 8), *flips, *plain]
    common: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device == "cuda"}
    assert dataset.test is not None
    return [
        DataLoader(Images(dataset.train, transforms.Compose(weak)), options.batch, shuffle=True, **common),
        DataLoader(Images(dataset.validation, transforms.Compose(plain)), options.batch, **common),
        DataLoader(Images(dataset.test, transforms.Compose(plain)), options.batch, **common),
    ]


class SoftLabels:
    """ALR's labels as the official codes of its kin keep them: on the host, [N, K]."""

    def __init__(self, labels: Tensor, num_classes: int, epochs: int) -> None:
        config = ALRConfig()
        self.soft = functional.one_hot(labels, num_classes).float()
        self.warmup, self.weight = config.warmup * epochs, config.entropy_weight
        self.momentum = memory_momentum(config.memory, epochs)

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
        if epoch < self.warmup:
            return functional.cross_entropy(logits, labels)
        p = functional.softmax(logits, dim=1)
        self.soft[index] = self.momentum * self.soft[index] + (1 - self.momentum) * p.detach().cpu()
        targets = self.soft[index].to(logits.device)
        log_p = functional.log_softmax(logits, dim=1)
        return -(targets * log_p).sum(dim=1).mean() - self.weight * (p * log_p).sum(dim=1).mean()


def usual(method: str, options: argparse.Namespace, device: str, workers: int) -> Speed:
    dataset = recipe(method, options).dataset()
    channels, size = dataset.train.images.shape[1:3]
    model = make_model(options.model, in_channels=channels, image_size=size, num_classes=dataset.num_classes, dropout=0.0)
    model = model.to(device)
    epochs = options.epochs + 1
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    train, validation, test = loaders(dataset, options, workers, device)
    soft = SoftLabels(dataset.train.labels, dataset.num_classes, epochs) if method == "alr" else None
    tested = tested_epochs(epochs, rungs=())
    trained = evaluated = used = 0.0
    for epoch in range(epochs):
        began, before = synchronised(device), processor_seconds()
        for group in optimiser.param_groups:
            group["lr"] = half_cosine(0.05, epoch / epochs)
        train_usually(model, optimiser, train, soft, epoch, device)
        between, after = synchronised(device), processor_seconds()
        correct_usually(model, validation, device)
        if epoch + 1 in tested:
            correct_usually(model, test, device)
        if epoch:
            trained += between - began
            evaluated += synchronised(device) - began
            used += after - before
    num_seen = options.epochs * len(dataset.train)
    return Speed(num_seen / trained, num_seen / evaluated, num_seen / used)


def train_usually(
    model: nn.Module, optimiser: torch.optim.SGD, loader: DataLoader[Any], soft: SoftLabels | None, epoch: int, device: str
) -> float:
    model.train()
    total = 0.0
    for images, labels, index in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss = functional.cross_entropy(logits, labels) if soft is None else soft.loss(logits, labels, index, epoch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.item()
    return total


def correct_usually(model: nn.Module, loader: DataLoader[Any], device: str) -> int:
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels, _ in loader:
            correct += int((model(images.to(device)).argmax(dim=1) == labels.to(device)).sum().item())
    return correct


# What the device could do


def busy_seconds(device: str) -> float:
    """The processor's own clock, one thread's, which stands still while others have it; a GPU has none."""
    return time.process_time() if device == "cpu" else synchronised(device)


def step_rate(method: str, options: argparse.Namespace, device: str) -> tuple[float, float]:
    """Of the last epoch's steps, forward and backward: floating-point operations per sample, and per second of work."""
    experiment = TrialRun(recipe(method, options), device=device)
    with FlopCounterMode(display=False) as counter:
        run_steps(experiment, device)
    began = busy_seconds(device)
    run_steps(experiment, device)
    seconds = busy_seconds(device) - began
    return counter.get_total_flops() / len(experiment.recipe.dataset().train), counter.get_total_flops() / seconds


def matmul_rate(device: str) -> float:
    """Floating-point operations per second of torch.mm, the best of some tries: float32 on a CPU, bfloat16 on a GPU."""
    side, dtype = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        began = busy_seconds(device)
        torch.mm(a, b)
        best = min(best, busy_seconds(device) - began)
    return 2 * side**3 / best


def print_profile(method: str, options: argparse.Namespace, device: str) -> None:
    """Operations per step and the share of time of each kind, itself alone, evaluation included."""
    experiment = TrialRun(recipe(method, options), device=device)
    for _ in range(1 + experiment.recipe.epochs // 2):  # past the warm-up
        experiment.advance()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    num_epochs = experiment.recipe.epochs - experiment.epochs_done
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_epochs):
            experiment.advance()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    durations: dict[str, list[float]] = {}
    for event in profile.events() or []:
        durations.setdefault(event.name, []).append(getattr(event, key))
    steps = num_epochs * -(-len(experiment.recipe.dataset().train) // options.batch)
    spent = {name: statistics.median(values) * len(values) / steps for name, values in durations.items()}
    total = sum(spent.values())
    print(f"{method} on {device}: {total / 1e3:.2f} ms and {sum(map(len, durations.values())) / steps:.0f} operations per step")
    for name in sorted(spent, key=lambda name: -spent[name])[:25]:
        print(f"  {100 * spent[name] / total:5.1f} %  {len(durations[name]) / steps:6.1f} per step  {name}")


def median(values: list[float], digits: int = 0) -> str:
    """The median with its range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def measured(method: str, options: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """Everything that is reported, one number per repeat."""
    found: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        own = ours(method, options, device)
        speeds = {"ours": own} | {
            f"usual, {workers} workers": usual(method, options, device, workers) for workers in (options.workers, 0)
        }
        numbers: dict[str, float] = {}
        for way, speed in speeds.items():
            numbers |= {way: speed.trained, f"{way}, evaluated": speed.evaluated, f"{way}, per core": speed.per_core}
        for workers in (options.workers, 0):
            speed = speeds[f"usual, {workers} workers"]
            numbers[f"ratio to {workers} workers"] = own.trained / speed.trained
            numbers[f"ratio to {workers} workers, evaluated"] = own.evaluated / speed.evaluated
            numbers[f"ratio to {workers} workers, per core"] = own.per_core / speed.per_core
        (flops, reached), possible = step_rate(method, options, device), matmul_rate(device)
        numbers |= {"of matmul": reached / possible, "matmul GFLOP/s": possible / 1e9, "MFLOP per sample": flops / 1e6}
        for name, number in numbers.items():
            found.setdefault(name, []).append(number)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(MODELS), default="digits")
    parser.add_argument("--model", help="network (default: small-cnn for digits, resnet18 for cifar-like)")
    parser.add_argument("--methods", default="alr,ce", help="of alr and ce, which the usual loop has")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2000, help="cifar-like: images, of which 56 percent are trained on")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu,cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="of the usual loop; official codes have 5 to 8")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file of all repeats")
    options = parser.parse_args()
    options.model = options.model or MODELS[options.data]
    torch.set_num_threads(1)
    READERS["cifar-like"] = cifar_like
    results: dict[str, dict[str, list[float]]] = {}
    for device in options.device.split(","):
        for method in options.methods.split(","):
            if options.profile:
                print_profile(method, options, device)
                continue
            found = results[f"{method} on {device}"] = measured(method, options, device)
            print(f"\n{method} on {device}: {options.data}, {options.model}, batches of {options.batch}; samples per second")
            for name, values in found.items():
                digits = 0 if max(values) > 100 else 2
                print(f"  {name:32s} {median(values, digits)}", flush=True)
    if options.out:
        what = {name: getattr(options, name) for name in ("data", "model", "epochs", "repeats", "samples", "batch", "workers")}
        options.out.write_text(json.dumps({"what": what, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
