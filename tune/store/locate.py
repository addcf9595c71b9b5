"""Which store is meant, by ``--storage`` and ``--ledger``."""

from __future__ import annotations

from pathlib import Path

from errors import UserError
from training.locations import Remote, location
from tune.store.base import SweepStore
from tune.store.folder import FolderStore


def open_store(storage: str | None, ledger: str) -> SweepStore:
    """Where sweeps live, by ``--storage`` and ``--ledger``. ValueError where that is nowhere."""
    if storage is not None and not storage.strip():
        raise UserError(f"--storage: {storage!r} is not allowed; name a folder, or leave it out for ./runs")
    try:
        place = location(storage) if storage else None
    except ValueError as error:
        raise UserError(f"--storage: {error}") from error
    if ledger:
        from tune.store.postgres import PostgresStore  # psycopg takes a while to import

        return PostgresStore(ledger, place)
    if isinstance(place, Remote):
        raise UserError(f"--storage: {storage!r} holds checkpoints only; give a database for the rest with --ledger URL")
    return FolderStore(place or Path("runs").resolve())


def as_store(place: Path | SweepStore) -> SweepStore:
    return place if isinstance(place, SweepStore) else FolderStore(place)
