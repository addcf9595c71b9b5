"""What is asked of the machine, the storage and the tracking server before anything is written or Ray starts."""

from __future__ import annotations

import http.client
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from data.dataset import Dataset
from data.processors import num_processors
from data.views import make_views
from errors import UserError
from models import make_model
from training.locations import Location, check_writable
from tune.cluster.environment import short_folder
from tune.report.tracking import VARIABLE, absolute_sqlite_uri, kind_of, quiet, sqlite_path
from tune.search.space import Space
from tune.spec import SweepSpec
from tune.store.urls import AT_SIGN, HARMLESS_NAMES, read_url

WEB = ("http", "https")
FLAG = "--tracking"
PATIENCE = 5  # seconds that a server gets to answer
HTTP_LOGIN, HTTP_TOKEN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
COMPILE = """
import sys, torch
try:
    torch.compile(torch.sin)(torch.ones(2, device=sys.argv[1]))
except RuntimeError as error:  # the compiler's own are
    sys.exit(str(error).strip().splitlines()[0])
"""
DATABASES = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}  # and their drivers' word for it


class TrackingUnavailable(UserError):
    """What is tracked to does not answer; it may do so later."""


def check_storage(storage: Location) -> None:
    """UserError where the storage cannot be made or written, or is a folder that Ray made for a job and removes."""
    if isinstance(storage, Path) and "runtime_resources" in storage.parts:
        raise UserError(f"storage {str(storage)!r} is not allowed; Ray removes this folder: give --storage one of your own")
    try:
        check_writable(storage)
    except (OSError, ValueError) as error:
        raise UserError(f"storage {str(storage)!r} cannot be written: {getattr(error, 'strerror', '') or error}") from error


def check_resources(spec: SweepSpec, address: str = "") -> None:
    """UserError where a trial asks for more than this machine has, or Ray has no place for its sockets here. The cluster at
    ``address`` is asked when it is joined."""
    if address:
        return
    if spec.cpus_per_trial > (allowed := num_processors()):
        there = f"this process may use {allowed} of the machine's {os.cpu_count()} CPUs"
        raise UserError(f"--cpus-per-trial: {spec.cpus_per_trial:g} is not allowed; {there}")
    if spec.gpus_per_trial > num_gpus():
        raise UserError(f"--gpus-per-trial: {spec.gpus_per_trial:g} is not allowed; this machine has {num_gpus()} GPUs")
    short_folder()


def check_network(spec: SweepSpec, dataset: Dataset) -> None:
    """UserError where the network does not take such images, or its pretrained weights cannot be had."""
    channels, side = dataset.input_shape
    make_model(spec.model, in_channels=channels, image_size=side, num_classes=dataset.num_classes, dropout=0.0)


def check_views(space: Space, dataset: Dataset) -> None:
    """UserError where a trial could draw views that cannot be made of such images."""
    _, side = dataset.input_shape
    for name in space.views() - {"auto"}:
        make_views(dataset.mean, dataset.std, dataset.train.images.shape[2], name, side)


def check_compiler(compiled: str, device: str) -> None:
    """UserError where networks are to be compiled and this machine cannot do that: a first function is, in about 20 s, in a
    process of its own, since a driver that has used a GPU holds some of its memory."""
    if compiled == "off":
        return
    process = subprocess.run([sys.executable, "-c", COMPILE, device], capture_output=True, text=True, check=False)
    if process.returncode:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise UserError(f"--compile: 'on' is not allowed; this machine cannot compile ({reason})")


def num_gpus() -> int:
    """GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count()


def launch_tracking(asked: str) -> tuple[str, str]:
    """The tracking URI of a new sweep, clean and empty for the storage's own database, and what asked for it: the flag (or the
    spec file), else MLflow's own variable. UserError as ``clean``."""
    variable = os.environ.get(VARIABLE, "").strip()
    origin = VARIABLE if variable and not asked else FLAG
    return clean(asked or variable, origin), origin


def disregarded(tracked: str) -> bool:
    """Whether MLflow's variable names another place than where a sweep is tracked."""
    variable = os.environ.get(VARIABLE, "").strip()
    try:
        return bool(variable) and clean(variable, VARIABLE) != tracked
    except UserError:
        return True


def clean(uri: str, origin: str = FLAG) -> str:
    """A tracking URI that means the same from any working directory. UserError where it holds a password or what may be one,
    which everybody could read in the list of processes, and which would be stored; it begins with ``origin``."""
    kind = kind_of(uri)
    if kind == "sqlite":
        try:
            return absolute_sqlite_uri(uri)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
    has_user, has_password, query, shown = read_url(uri)
    if has_user or has_password or query if kind in WEB else has_password or not query <= HARMLESS_NAMES:
        instead = HTTP_LOGIN if kind in WEB else "up an MLflow server in front of the database"
        instead = "PGPASSWORD, or use ~/.pgpass" if kind == "postgresql" else instead
        what = "a user, a query or a password" if kind in WEB else "a password, or a query that may be one"
        raise UserError(f"{origin}: the URL of {shown!r} holds {what}; leave it out and set {instead} ({AT_SIGN})")
    if kind in WEB:
        try:
            host, _ = urllib.parse.urlsplit(uri).hostname, urllib.parse.urlsplit(uri).port
        except ValueError as error:
            raise UserError(f"{origin}: {shown!r} is not allowed; {error}") from error
        if not host:
            raise UserError(f"{origin}: {shown!r} is not allowed; it names no host")
    return uri


def check_tracking(uri: str, origin: str = FLAG) -> None:
    """UserError where ``uri``, which ``origin`` gave, is not a tracking URI; TrackingUnavailable where what it names does not
    answer within seconds."""
    kind, source = kind_of(uri), "" if origin == FLAG else f" of {origin}"
    if kind in WEB:
        try:
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=PATIENCE).close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not has_answered(error):
                reason = getattr(error, "reason", error)
                raise TrackingUnavailable(f"tracking server {uri}{source} does not answer: {reason}") from error
        _check_login(uri, source)
    elif path := sqlite_path(uri):
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{origin}: {uri!r} is not allowed; folder {str(path.parent)!r} cannot be written")
    elif kind in DATABASES:
        _check_database(uri, DATABASES[kind], source)
    else:
        allowed = "give http(s)://HOST:PORT or a database such as sqlite:///FILE"
        raise UserError(f"{origin}: {uri!r} is not allowed; {allowed}")


def has_answered(error: Exception) -> bool:
    """Whether a server has refused a request, which one that does not answer cannot; what certificates MLflow's own client
    accepts is for that to say."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500
    return isinstance(getattr(error, "reason", error), ssl.SSLError)


def _check_login(uri: str, source: str) -> None:
    quiet()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except MlflowException as error:
        message = str(error).strip().splitlines()[0][:200]
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED") and not re.search(r"\b40[13]\b", message):
            raise TrackingUnavailable(f"tracking server {uri}{source} cannot be used: {message}") from error
        login = f"a login comes from {HTTP_LOGIN}, or from {HTTP_TOKEN}"
        raise UserError(f"tracking server {uri}{source} cannot be used: {message}; {login}") from error


def _check_database(uri: str, timeout: str, source: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        create_engine(uri, connect_args={timeout: PATIENCE}).connect().close()
    except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        kind = TrackingUnavailable if isinstance(error, (OperationalError, OSError)) else UserError
        raise kind(f"tracking database {uri.rpartition('@')[2]}{source} cannot be opened: {reason}") from error
