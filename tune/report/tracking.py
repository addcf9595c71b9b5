"""Where runs are tracked to: URIs of databases, servers and artifacts, and what the environment says about them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from errors import UserError
from training.locations import Location, Remote

VARIABLE = "MLFLOW_TRACKING_URI"  # MLflow's own: the default of --tracking
DATABASE = "mlflow.db"  # in the storage, where nothing else was asked for
ARTIFACTS = "mlartifacts"  # beside it, with a folder for each sweep


def quiet() -> None:
    """Sets what MLflow reads from the environment, where the user has not.

    Telemetry is off. A dead server is given up within seconds. What MLflow raises it does not log as well, and it prints no
    address for each run that has ended.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a call whose answer is late may have been carried out
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.ERROR)


def kind_of(uri: str) -> str:
    """``https``, ``postgresql``, ...: a URI's scheme without a driver's name."""
    return uri.partition(":")[0].partition("+")[0]


def sqlite_uri(path: Path) -> str:
    """The URI of an SQLite file that SQLAlchemy and MLflow open, whatever characters its path holds.

    Where some have to be quoted the URI names the driver, too: MLflow makes the folder of what stands after ``sqlite:///``
    without reading the quotes, and would leave an empty ``a%3Fb`` beside ``a?b``.
    """
    from sqlalchemy import URL, make_url

    plain = f"sqlite:///{path}"
    if make_url(plain).database == str(path):
        return plain
    return URL.create("sqlite+pysqlite", database=str(path)).render_as_string()


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for any other URI, and for a database in memory. ValueError where it is not readable."""
    if kind_of(uri) != "sqlite":
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database
    except ArgumentError as error:
        raise UserError(f"{uri!r} is not readable; write sqlite:///FILE") from error
    return None if not name or name == ":memory:" or name.startswith("file:") else Path(name)


def absolute_sqlite_uri(uri: str) -> str:
    """An SQLite URI that means the same file from any working directory. ValueError where it names no file."""
    path = sqlite_path(uri)
    if path is None:
        raise UserError(f"{uri!r} is not allowed; it keeps nothing: name a file, sqlite:///FILE")
    query = uri.partition("?")[2]
    return sqlite_uri(path.resolve()) + (f"?{query}" if query else "")


def tracking_uri(storage: Location, requested: str) -> str:
    """Where the runs go: what the user asked for, else a database in the storage folder. ValueError where that is a URL."""
    if requested:
        return requested
    if isinstance(storage, Remote):
        raise UserError(f"--storage: {str(storage)!r} holds no database of MLflow's; give a server's address with --tracking")
    return sqlite_uri(storage / DATABASE)


def artifacts_uri(uri: str, storage: Location, name: str) -> str | None:
    """Where the artifacts of a sweep's runs go: a server decides for itself; else into the storage."""
    if uri.startswith("http"):
        return None
    database = sqlite_path(uri)
    if isinstance(storage, Remote) and database:
        storage = database.parent  # beside it: MLflow has clients of its own for object stores
    return (storage / ARTIFACTS / name).as_uri()
