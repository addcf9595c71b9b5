"""The one checkpoint mechanism: a file that is either the old state or the new one, never half of it.

The file is what ``torch.save`` writes, and which ``torch.load`` opens, with the sha256 of that at its end: torch's own reader
takes damaged tensors for good ones.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch

from training.locations import Away, Location, Remote

DIGEST_BYTES = hashlib.sha256().digest_size
ATTEMPTS = 3  # to read a file
PAUSE = 1.0  # seconds between two of them


class UnreadableCheckpoint(ValueError):
    """A checkpoint file is damaged or belongs to another trial."""


def save(path: Location, state: dict[str, Any], *, read_back: bool = False) -> None:
    """Writes ``state`` to ``path``: temporary file, fsync, rename; an object store's upload is whole or nothing by itself.
    OSError where it is not taken.

    ``read_back`` loads the file again and raises :class:`UnreadableCheckpoint` if it cannot be, for a first save.
    """
    buffer = io.BytesIO()  # torch turns the OSError of a full disk into a RuntimeError
    torch.save(state, buffer)
    if isinstance(path, Remote):
        path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest())
        if read_back:
            load(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.flush()
            os.fsync(file.fileno())
        if read_back:
            load(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load(path: Location, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint without running code from it. FileNotFoundError; UnreadableCheckpoint where it is damaged; Away where
    the storage does not hand it out."""
    content = _content(path)
    payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise UnreadableCheckpoint(f"checkpoint {path} is damaged: its checksum is not that of its content")
    try:
        state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict):
        raise UnreadableCheckpoint(f"checkpoint {path} does not hold a state")
    return state


def _content(path: Location) -> bytes:
    for left in reversed(range(ATTEMPTS)):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            if not left:
                raise Away(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
            time.sleep(PAUSE)
    raise AssertionError


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
