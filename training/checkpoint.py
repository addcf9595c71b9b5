"""The one checkpoint mechanism: a file that is either the old state or the new one, never half of it.

The file is what ``torch.save`` writes, and which ``torch.load`` opens, with the sha256 of that at its end: torch's own reader
takes damaged tensors for good ones.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from typing import Any

import torch

from data.durable import write_whole
from training.locations import Away, Location, Remote

DIGEST_BYTES = hashlib.sha256().digest_size
ATTEMPTS = 3  # to read a file
PAUSE = 1.0  # seconds between two of them


class UnreadableCheckpoint(ValueError):
    """A checkpoint file is damaged or belongs to another trial."""


def save(path: Location, state: dict[str, Any], *, read_back: bool = False) -> None:
    """Replaces the checkpoint at ``path`` by ``state``, whole or not at all; an object store's upload is so by itself.

    ``read_back`` loads the file again, for a first save. OSError where the storage does not take it;
    :class:`UnreadableCheckpoint` where it cannot be loaded.
    """
    buffer = io.BytesIO()  # torch turns the OSError of a full disk into a RuntimeError
    torch.save(state, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).digest()
    buffer.seek(0, io.SEEK_END)
    buffer.write(digest)
    if isinstance(path, Remote):
        path.write_bytes(buffer.getbuffer())
        if read_back:
            load(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Private: a trial that is taken for dead may yet write, while its successor does.
    write_whole(path, buffer.getbuffer(), check=load if read_back else None, private=True)


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
