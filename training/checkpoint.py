"""The one checkpoint mechanism: a file that is either the old state or the new one, never half of it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class UnreadableCheckpoint(ValueError):
    """A checkpoint file is damaged or belongs to another trial."""


def save(path: Path, state: dict[str, Any], *, read_back: bool = False) -> None:
    """Writes ``state`` to ``path``: temporary file, fsync, rename. OSError where the disk does not take it.

    ``read_back`` loads the file again and raises :class:`UnreadableCheckpoint` if it cannot be, for a first save.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if read_back:
            load(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint without running code from it. FileNotFoundError; UnreadableCheckpoint where it is damaged."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise UnreadableCheckpoint(f"checkpoint {path} does not hold a state")
    return state


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
