"""Images per second of the batched views beside torchvision's transforms in a loop over samples, in one process.

    python benchmarks/augmentation.py [--batch 128] [--repeats 20] [--threads 1] [--device cpu]

Batches of 32 x 32 x 3. The loop is what a data loader's worker does without the decoding and the collation: transforms.v2 on
uint8 tensors on the CPU, with the same operations. In each repeat both are timed right after each other; reported are the
medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.views import make_views  # noqa: E402  the checkout is not installed

MEAN, STD, SIZE = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 32


def loops() -> dict[str, Callable[[Tensor], Tensor]]:
    """Weak and strong of "flip-crop" by torchvision, sample by sample."""
    from torchvision.transforms import v2

    moved = [v2.RandomCrop(SIZE, padding=4), v2.RandomHorizontalFlip()]
    normalised = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    square = v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    weak = v2.Compose([*moved, *normalised])
    strong = v2.Compose([*moved, v2.RandAugment(num_ops=2, magnitude=10), *normalised, square])
    return {
        "weak": lambda images: torch.stack([weak(image) for image in images]),
        "strong": lambda images: torch.stack([strong(image) for image in images]),
    }


def seconds(function: Callable[[Tensor], Tensor], images: Tensor) -> float:
    began = time.perf_counter()
    function(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the batched views; the loop is on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randint(256, (options.batch, 3, SIZE, SIZE), dtype=torch.uint8)
    there = images.to(options.device)
    views = dict(zip(("plain", "weak", "strong"), make_views(MEAN, STD, SIZE, "flip-crop"), strict=True))
    print(f"{'flip-crop':10s} {'batched/s':>12s} {'loop/s':>12s} {'ratio':>8s}")
    for name, loop in loops().items():
        for function, batch in ((views[name], there), (loop, images)):
            seconds(function, batch)  # tables and constants are made once
        pairs = [(seconds(views[name], there), seconds(loop, images)) for _ in range(options.repeats)]
        ours, theirs = (options.batch / statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(loop_time / view_time for view_time, loop_time in pairs)
        print(f"{name:10s} {ours:12,.0f} {theirs:12,.0f} {ratio:7.1f}x", flush=True)


if __name__ == "__main__":
    main()
