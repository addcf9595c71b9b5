"""Random streams: one seed per purpose, a pure function of what it is for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(*purpose: int | str) -> int:
    """A 63-bit seed that depends on every part of ``purpose`` and on nothing else, on every machine alike."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream that belongs to ``purpose``."""
    import torch  # here, since the ledger derives seeds without it

    return torch.Generator().manual_seed(derive(*purpose))
