"""Shared set-up: caches and Ray's token in temporary folders, and a migrated MLflow store to copy."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

import pytest
import torch

SCRATCH = Path(tempfile.mkdtemp(prefix="noisy-label-tests-"))
os.environ["NOISY_LABEL_CACHE"] = str(SCRATCH / "cache")
(SCRATCH / "ray-token").write_text(secrets.token_hex(32))
os.environ["RAY_AUTH_TOKEN_PATH"] = str(SCRATCH / "ray-token")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)  # tests say where they run
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)  # one trial, one thread; more make each other slower


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty sqlite MLflow store with its schema in place, which takes seconds to make: copy it."""
    from tune.tracker import quiet

    quiet()
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path
