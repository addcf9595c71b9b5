"""Where images and labels come from, and what each source uses when the user says nothing.

A data set is written ``NAME`` or ``NAME:ARGUMENT``; each name has a reader, a function of the argument and of
:class:`Options` that returns a :class:`Source`. A new reader is a function in :mod:`data.readers` and a line here. A reader's
module is imported when its first source is asked for: the names are known without torch.
"""

from __future__ import annotations

from importlib import import_module

from data.readers.base import TEST, TRAIN, VALIDATION, Options, RawTable, Reader, Source
from errors import UserError

__all__ = ["READERS", "TEST", "TRAIN", "VALIDATION", "Options", "RawTable", "Source", "check_name", "find_source"]


def _reader(module: str, name: str) -> Reader:
    """The reader ``name`` of a module in :mod:`data.readers`."""

    def read(argument: str, options: Options) -> Source:
        source: Source = getattr(import_module(f"data.readers.{module}"), name)(argument, options)
        return source

    return read


READERS: dict[str, Reader] = {
    "digits": _reader("digits", "digits"),
    "folder": _reader("own", "folder"),
    "manifest": _reader("own", "manifest"),
    "cifar10": _reader("cifar", "cifar10"),
    "cifar100": _reader("cifar", "cifar100"),
    "cifar10n": _reader("cifar", "cifar10n"),
    "cifar100n": _reader("cifar", "cifar100n"),
    "animal10n": _reader("web", "animal10n"),
    "clothing1m": _reader("web", "clothing1m"),
    "webvision": _reader("web", "webvision"),
}


def check_name(data: str) -> str:
    """The name in ``NAME:ARGUMENT``. UserError for an unknown one."""
    name = data.partition(":")[0]
    if name not in READERS:
        raise UserError(f"unknown data set {data!r}; known are {', '.join(READERS)}")
    return name


def find_source(data: str, options: Options | None = None) -> Source:
    """The source of that name. UserError for an unknown one, or for an argument that its reader does not take."""
    return READERS[check_name(data)](data.partition(":")[2], options or Options())
