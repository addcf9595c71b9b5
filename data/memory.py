"""Data sets that a process has read already: trials of one worker share them, and on a GPU they share the images."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch

from data.dataset import Dataset, load
from data.spec import DataSpec
from data.table import Labelled


@lru_cache(maxsize=2)
def shared_dataset(spec: DataSpec) -> Dataset:
    """The data set of ``spec``, read once. ValueError where the source is not the one with its checksum."""
    return load(spec)


@lru_cache(maxsize=2)
def dataset_on(device: str, spec: DataSpec) -> Dataset:
    """The data set of ``spec`` with its tensors on ``device``, torch's name of a GPU.

    A table that would take more than a quarter of the trial's share of the device's memory stays on the CPU, and its batches
    move.
    """
    dataset = shared_dataset(spec)
    share = torch.cuda.mem_get_info()[1] * torch.cuda.get_per_process_memory_fraction()
    table_moves = dataset.train.images.nbytes <= share / 4

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, Labelled):
            moved = {"labels": move(value.labels)}
            if table_moves:
                moved |= {"images": _images_on(device, dataset), "rows": move(value.rows)}
            return dataclasses.replace(value, **moved)
        return value

    return dataclasses.replace(dataset, **{f.name: move(getattr(dataset, f.name)) for f in dataclasses.fields(dataset)})


_IMAGES: dict[tuple[str, str], torch.Tensor] = {}  # by device and table's checksum; one at most


def _images_on(device: str, dataset: Dataset) -> torch.Tensor:
    """The table's images, for all parts of the split and whatever the noise; those of another table are let go first."""
    key = (device, dataset.checksum)
    if key not in _IMAGES:
        _IMAGES.clear()
        _IMAGES[key] = dataset.train.images.to(device)
    return _IMAGES[key]
