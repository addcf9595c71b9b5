"""Shared set-up: caches and Ray's token in temporary folders, and a migrated MLflow store to copy."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.postgres import Postgres
from training import locations

if TYPE_CHECKING:
    from tests.faulty_sweep import FaultySweep

SCRATCH = Path(tempfile.mkdtemp(prefix="noisy-label-tests-"))
os.environ["NOISY_LABEL_CACHE"] = str(SCRATCH / "cache")
(SCRATCH / "ray-token").write_text(secrets.token_hex(32))
os.environ["RAY_AUTH_TOKEN_PATH"] = str(SCRATCH / "ray-token")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)  # tests say where they run
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ["DO_NOT_TRACK"] = "true"
if not os.environ.get("NOISY_LABEL_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)  # also while fixtures of a module are made


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One trial, one thread: tensors this small gain nothing from more, and what a test trained may have set another number."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that look at the faulty sweep come first, one after the other, so that only one worker of xdist runs it."""
    items.sort(key=lambda item: "faulty" not in getattr(item, "fixturenames", ()))


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real server. A test that stops it must start it again."""
    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket in an object store on this machine; where that is, and who we are there, is in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "correct-horse-battery")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    locations._store.cache_clear()
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()
    locations._store.cache_clear()


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty sqlite MLflow store with its schema in place, which takes seconds to make: copy it."""
    from tune.report.tracking import quiet

    quiet()
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def storage(tmp_path: Path, migrated_store: Path) -> Path:
    """A storage folder with an MLflow store in it."""
    from tests.sweeps import new_storage

    return new_storage(tmp_path / "runs", migrated_store)


@pytest.fixture(scope="session")
def some_ray() -> Iterator[dict[str, str]]:
    """A Ray cluster of two processors for tests that need one, whichever it is, and do not kill it; the environment in which a
    command joins it. A Ray of its own costs each command 12 s of a processor."""
    from tests.ray_nodes import RayNodes

    cluster = RayNodes(num_cpus=2)
    yield {"RAY_ADDRESS": cluster.address}
    cluster.end()


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory, migrated_store: Path) -> Iterator[FaultySweep]:
    """A sweep that has ended after a trial hung for good, one lost its process and half of its checkpoint, three ran out of
    memory and one was poisoned."""
    from tests.faulty_sweep import faulty_sweep, wait_for

    faults = {
        0: ("hang", 2, 3),
        1: ("tear", 4, 1),
        2: ("exhaust_torch", 2, 1),
        3: ("exhaust_python", 2, 1),
        4: ("exhaust_gpu", 2, 1),
        5: ("poison", 3, 1),
    }
    spec = {"trials": 3, "epochs": 4, "grace_epochs": 2, "reduction_factor": 50, "concurrent": 2}
    timing = {"checkpoint_seconds": 1e6, "report_seconds": 0, "hang_seconds": 5}
    with faulty_sweep(tmp_path_factory.mktemp("faulty"), migrated_store, faults, **spec, **timing) as sweep:
        wait_for(sweep, lambda: sweep.struck)
        sweep.look()
        sweep.process.wait(600)
        yield sweep
