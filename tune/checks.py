"""What is asked of the machine, the storage and the tracking server before anything is written or Ray starts."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from data.dataset import Dataset
from data.processors import num_processors
from models import make_model
from training.locations import AT, Credentials, Location, check_writable
from tune.cluster import address_of
from tune.environment import short_folder
from tune.spec import SweepSpec
from tune.tracker import quiet

WEB = ("http", "https")
PATIENCE = 5  # seconds that a server gets to answer
HTTP_LOGIN, HTTP_TOKEN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
HARMLESS = {  # in the query of a database's URL, in small letters
    *("application_name", "charset", "connect_timeout", "driver", "encrypt", "host", "options", "port", "service", "timeout"),
    *("sslcert", "sslkey", "sslmode", "sslrootcert", "ssl_ca", "ssl_cert", "ssl_check_hostname", "ssl_key", "unix_socket"),
    *("passfile", "target_session_attrs", "trusted_connection", "trustservercertificate", "user"),
}
COMPILE = """
import sys, torch
try:
    torch.compile(torch.sin)(torch.ones(2, device=sys.argv[1]))
except RuntimeError as error:  # the compiler's own are
    sys.exit(str(error).strip().splitlines()[0])
"""
DATABASES = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}  # and their drivers' word for it


class NoAnswer(ValueError):
    """What is tracked to does not answer; it may do so later."""


def check_storage(storage: Location) -> None:
    """ValueError where the storage cannot be made or written, or is a folder that Ray made for a job and removes."""
    if isinstance(storage, Path) and "runtime_resources" in storage.parts:
        raise ValueError(f"storage {str(storage)!r} is not allowed; Ray removes this folder: give --storage one of your own")
    try:
        check_writable(storage)
    except (OSError, ValueError) as error:
        raise ValueError(f"storage {str(storage)!r} cannot be written: {getattr(error, 'strerror', '') or error}") from error


def check_resources(spec: SweepSpec) -> None:
    """ValueError where a trial asks for more than this machine has, or Ray has no place for its sockets here. A cluster is
    asked when it is connected to."""
    if address_of(spec):
        return
    if spec.cpus_per_trial > (allowed := num_processors()):
        there = f"this process may use {allowed} of the machine's {os.cpu_count()} CPUs"
        raise ValueError(f"--cpus-per-trial: {spec.cpus_per_trial:g} is not allowed; {there}")
    if spec.gpus_per_trial > num_gpus():
        raise ValueError(f"--gpus-per-trial: {spec.gpus_per_trial:g} is not allowed; this machine has {num_gpus()} GPUs")
    short_folder()


def check_network(spec: SweepSpec, dataset: Dataset) -> None:
    """ValueError where the network does not take such images, or its pretrained weights cannot be had."""
    channels, side = dataset.input_shape
    make_model(spec.model, in_channels=channels, image_size=side, num_classes=dataset.num_classes, dropout=0.0)


def check_compiler(compiled: str, device: str) -> None:
    """ValueError where networks are to be compiled and this machine cannot do that: a first function is, in about 20 s, in a
    process of its own, since a driver that has used a GPU holds some of its memory."""
    if compiled == "off":
        return
    done = subprocess.run([sys.executable, "-c", COMPILE, device], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"--compile: 'on' is not allowed; this machine cannot compile ({reason})")


def num_gpus() -> int:
    """GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count()


def clean(uri: str) -> str:
    """A tracking URI that means the same from any working directory. ValueError where it holds a password or what may be one,
    which everybody could read in the list of processes, and which would be stored."""
    path = uri.removeprefix("sqlite:///")
    if path != uri:
        if not path or path == ":memory:":
            raise ValueError(f"--tracking: {uri!r} is not allowed; it keeps nothing: name a file, sqlite:///FILE")
        return f"sqlite:///{Path(path).resolve()}"
    userinfo, query, shown = Credentials.of(uri)
    kind = kind_of(uri)
    names = {name.lower() for name, _ in urllib.parse.parse_qsl(query, keep_blank_values=True)}
    if userinfo or query if kind in WEB else ":" in userinfo or not names <= HARMLESS:
        instead = HTTP_LOGIN if kind in WEB else "up an MLflow server in front of the database"
        instead = "PGPASSWORD, or use ~/.pgpass" if kind == "postgresql" else instead
        what = "a user, a query or a password" if kind in WEB else "a password, or a query that may be one"
        raise ValueError(f"--tracking: the URL of {shown!r} holds {what}; leave it out and set {instead} ({AT})")
    if kind in WEB:
        try:
            host, _ = urllib.parse.urlsplit(uri).hostname, urllib.parse.urlsplit(uri).port
        except ValueError as error:
            raise ValueError(f"--tracking: {shown!r} is not allowed; {error}") from error
        if not host:
            raise ValueError(f"--tracking: {shown!r} is not allowed; it names no host")
    return uri


def kind_of(uri: str) -> str:
    """``https``, ``postgresql``, ...: a URI's scheme without a driver's name."""
    return uri.partition(":")[0].partition("+")[0]


def check_tracking(uri: str) -> None:
    """ValueError where ``uri`` is not a tracking URI, NoAnswer where what it names does not answer within seconds."""
    kind = kind_of(uri)
    if kind in WEB:
        try:
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=PATIENCE).close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not isinstance(error, urllib.error.HTTPError) or error.code >= 500:  # else it has answered
                raise NoAnswer(f"tracking server {uri} does not answer: {getattr(error, 'reason', error)}") from error
        _check_login(uri)
    elif kind == "sqlite" and uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--tracking: {uri!r} is not allowed; folder {str(folder)!r} cannot be written")
    elif kind in DATABASES:
        _check_database(uri, DATABASES[kind])
    else:
        raise ValueError(f"--tracking: {uri!r} is not allowed; give http(s)://HOST:PORT or a database such as sqlite:///FILE")


def _check_login(uri: str) -> None:
    quiet()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except MlflowException as error:
        said = str(error).strip().splitlines()[0][:200]
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED") and not re.search(r"\b40[13]\b", said):
            raise NoAnswer(f"tracking server {uri} cannot be used: {said}") from error
        login = f"a login comes from {HTTP_LOGIN}, or from {HTTP_TOKEN}"
        raise ValueError(f"tracking server {uri} cannot be used: {said}; {login}") from error


def _check_database(uri: str, timeout: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        create_engine(uri, connect_args={timeout: PATIENCE}).connect().close()
    except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        kind = NoAnswer if isinstance(error, (OperationalError, OSError)) else ValueError
        raise kind(f"tracking database {uri.rpartition('@')[2]} cannot be opened: {reason}") from error
