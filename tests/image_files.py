"""Image files that a test writes, and what a reader makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.cache import open_table
from data.sources import Options, RawTable, find_source

COLOURS = {"cat": (200, 10, 30), "dog": (20, 180, 60), "eel": (5, 60, 250)}


def save(path: Path, colour: tuple[int, int, int] = (9, 9, 9), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def write(folder: Path, text: str, name: str = "list.csv") -> str:
    (folder / name).write_text(text, "utf-8")
    return f"manifest:{folder / name}"


def decoded(table: RawTable, start: int = 0) -> Tensor:
    return torch.cat([block.images for block in table.blocks(range(start, table.shape[0]))])


def refused(data: str, match: str, **options: int) -> None:
    """Somewhere on the way from the name to the last image there is a ValueError of one line."""
    with pytest.raises(ValueError, match=match) as caught:
        open_table(find_source(data, Options(**options)), fresh=True)
    assert "\n" not in str(caught.value)
