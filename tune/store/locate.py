"""The choice of a store, by ``--storage`` and ``--ledger``."""

from __future__ import annotations

from pathlib import Path

from errors import UserError
from training.locations import Remote, location
from tune.store.base import SweepStore
from tune.store.folder import FolderStore
from tune.store.urls import check_storage_url


def open_store(storage: str | None, ledger: str) -> SweepStore:
    """The store that the flags ``--storage`` and ``--ledger`` name. ValueError where there is no such store."""
    if storage is not None and not storage.strip():
        raise UserError(f"--storage: {storage!r} is not allowed; name a folder, or leave it out for ./runs")
    try:
        folder = location(check_storage_url(storage) if "://" in storage else storage) if storage else None
    except ValueError as error:
        raise UserError(f"--storage: {error}") from error
    if ledger:
        from tune.store.postgresql.store import PostgresStore  # psycopg takes a while to import

        return PostgresStore(ledger, folder)
    if isinstance(folder, Remote):
        raise UserError(f"--storage: {storage!r} holds checkpoints only; give a database for the rest with --ledger URL")
    return FolderStore(folder or Path("runs").resolve())


def as_store(store: Path | SweepStore) -> SweepStore:
    """The store itself, or the one in a folder."""
    return store if isinstance(store, SweepStore) else FolderStore(store)
