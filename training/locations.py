"""Where checkpoints are kept: a folder, or an object store by its URL (``s3://bucket/prefix``)."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Away(OSError):
    """What is there cannot be read now, though nothing says that it is damaged."""


class Remote:
    """A file or folder in an object store, in pathlib's words as far as checkpoints need them.

    Credentials and endpoint come from the environment, as the store's own tools read them (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ...). What pyarrow takes as the URL's query (``?region=...``) stays with every path below it.
    """

    def __init__(self, url: str) -> None:
        """ValueError where the URL is not readable. Whether it holds a secret is checked where a user gives it."""
        parts = urlsplit(url)
        self._root = f"{parts.scheme}://{parts.netloc}/"
        self._path = parts.path.strip("/")
        self._query = f"?{parts.query}" if parts.query else ""

    def __str__(self) -> str:
        return self._root + self._path + self._query

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> Remote:
        return Remote(self._root + f"{self._path}/{name}".lstrip("/") + self._query)

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self._root + self._path.rpartition("/")[0] + self._query)

    def as_uri(self) -> str:
        """Without the query, which is for pyarrow."""
        return self._root + self._path

    @property
    def _opened(self) -> tuple[Any, str]:
        """The store and the path in it."""
        store, root = _store(self._root + self._query)
        return store, f"{root.rstrip('/')}/{self._path}"

    def read_bytes(self) -> bytes:
        store, path = self._opened
        with store.open_input_file(path) as file:
            return bytes(file.read())

    def write_bytes(self, content: bytes | memoryview) -> None:
        """The object is the old one or the new one: an upload counts when it is complete."""
        store, path = self._opened
        try:
            stream = store.open_output_stream(path)
        except FileNotFoundError:  # a store with real folders
            store.create_dir(path.rpartition("/")[0], recursive=True)
            stream = store.open_output_stream(path)
        stream.write(content)
        stream.close()

    def unlink(self) -> None:
        store, path = self._opened
        store.delete_file(path)

    def names(self) -> list[str]:
        """What lies directly in it."""
        from pyarrow.fs import FileSelector

        store, path = self._opened
        return [info.base_name for info in store.get_file_info(FileSelector(path, allow_not_found=True))]

    def remove(self) -> None:
        store, path = self._opened
        store.delete_dir(path)


@lru_cache(maxsize=8)
def _store(root: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    store, path = FileSystem.from_uri(root)
    return store, str(path)


Location = Path | Remote


def location(text: str) -> Location:
    """A URL, or a path of the file system, absolute: workers have a working directory of their own."""
    return Remote(text) if "://" in text else Path(text).resolve()


def names(folder: Location) -> list[str]:
    """What lies in a folder; nothing where there is none."""
    if isinstance(folder, Remote):
        return folder.names()
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def remove(folder: Location) -> None:
    """Removes a folder and what is in it, as far as that can be done."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):  # it is not there, or stays for the next driver to remove
        folder.remove()


def check_writable(folder: Location) -> None:
    """Makes the folder and writes a file into it, which is removed. OSError or ValueError where that fails."""
    trial = folder / f".{uuid.uuid4().hex}"
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    trial.write_bytes(b"")
    trial.unlink()
