"""Checkpoints in an object store: a real S3 interface on this machine, and folders by ``file://`` through the same code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import search
from tests.postgres import Postgres
from tests.sweeps import make_sweep, play, stored_trials
from training import checkpoint
from training.locations import Location, Remote, check_writable, location, names, remove
from training.trial_run import Recipe, TrialRun
from tune.checks import check_storage
from tune.report.tracking import artifacts_uri
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger
from tune.spec import KEPT_CHECKPOINTS
from tune.store.locate import open_store
from tune.store.postgresql.store import PostgresStore

SECRET = "correct-horse-battery"


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "file":
        return location(f"file://{tmp_path}/store")
    return location(f"{request.getfixturevalue('s3')}/some/runs")


def test_a_path_below_a_url() -> None:
    root = location("s3://bucket/some/runs?region=eu-west-1&scheme=http")
    assert isinstance(root, Remote)
    below = root / "first" / "checkpoints" / "3"
    assert str(below) == "s3://bucket/some/runs/first/checkpoints/3?region=eu-west-1&scheme=http"
    assert below == location(str(below))
    assert (below.name, below.parent.parent, below.parent.parent.parent) == ("3", root / "first", root)
    assert (root / "first").as_uri() == "s3://bucket/some/runs/first"
    assert str(location("s3://bucket") / "first") == "s3://bucket/first"
    assert (location("s3://bucket/") / "first").parent == location("s3://bucket/")
    assert location("runs") == Path("runs").resolve()
    for url in ("s3://bucket/alice@corp/runs", "abfss://container@account.dfs.core.windows.net/alice@corp"):
        assert str(location(url)) == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"s3://key:{SECRET}@bucket/runs", "s3://bucket/runs"),
        (f"s3://key:a/{SECRET}@bucket/runs", "s3://bucket/runs"),
        (f"gs://{SECRET}@bucket/runs", "gs://bucket/runs"),
        (f"abfs://container:{SECRET}@account.dfs.core.windows.net/runs", "abfs://account.dfs.core.windows.net/runs"),
        (f"abfss://container@account.dfs.core.windows.net/runs?client_secret={SECRET}", "abfss://account.dfs.core"),
        (f"abfss://container@account.dfs.core.windows.net/runs?sv=2020&SIG={SECRET}", "abfss://account.dfs.core"),
        (f"s3://bucket/runs?client_secret={SECRET}@x", "s3://..."),
    ],
)
def test_credentials_in_a_url_are_refused(url: str, shown: str) -> None:
    with pytest.raises(ValueError, match=f"^--storage: '{shown}.*' is not allowed with credentials") as caught:
        open_store(url, "postgresql://me@host/db")
    assert SECRET not in str(caught.value)
    allowed = "abfs://container@account.dfs.core.windows.net/alice@corp/runs"
    assert str(open_store(allowed, "postgresql://me@host/db").storage) == allowed


def test_a_checkpoint_is_saved_replaced_and_loaded(store: Location) -> None:
    path = store / "first" / "checkpoints" / "3" / "checkpoint.pt"
    with pytest.raises(FileNotFoundError):
        checkpoint.load(path)
    for number in range(3):
        state = {"weights": torch.arange(1000.0) + number, "history": [{"epoch": number}]}
        checkpoint.save(path, state, read_back=number == 0)
        loaded = checkpoint.load(path)
        assert torch.equal(loaded["weights"], state["weights"])
        assert loaded["history"] == state["history"]
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(checkpoint.UnreadableCheckpoint, match="damaged"):
        checkpoint.load(path)


def test_folders_are_listed_and_removed(store: Location) -> None:
    assert names(store) == []
    for name in ("1", "2", "10"):
        (store / "checkpoints" / name / "checkpoint.pt").write_bytes(b"state")  # type: ignore[union-attr]
    assert sorted(names(store / "checkpoints")) == ["1", "10", "2"]
    remove(store / "checkpoints" / "1")
    remove(store / "checkpoints" / "7")
    assert sorted(names(store / "checkpoints")) == ["10", "2"]
    with pytest.raises(FileNotFoundError):
        (store / "checkpoints" / "1" / "checkpoint.pt").read_bytes()
    assert (store / "checkpoints" / "10" / "checkpoint.pt").read_bytes() == b"state"


def test_writing_is_tried_and_leaves_nothing(store: Location) -> None:
    store.mkdir() if isinstance(store, Path) else (store / "x").write_bytes(b"")
    check_writable(store)
    assert names(store) == ["x"]


def test_a_bucket_that_is_not_there_is_one_line(s3: str) -> None:
    for url in (f"{s3}et/runs", "s3:///runs", "nowhere://bucket/runs"):
        with pytest.raises(ValueError, match="cannot be written") as caught:
            check_storage(location(url))
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)


RECIPE: dict[str, Any] = {"method": "elr", "values": {}, "data": "digits", "noise": "symmetric:0.4", "model": "mlp"}


def test_a_trial_goes_on_from_its_checkpoint_there(store: Location) -> None:
    recipe = Recipe(**RECIPE, epochs=3, seed=1)
    undisturbed = [record.objective for record in TrialRun(recipe)]
    first = TrialRun(recipe, store / "3")
    first.advance()
    first.save()
    again = TrialRun(recipe, location(str(store / "3")))
    assert again.epochs_done == 1
    assert [record.objective for record in again.history] + [record.objective for record in again] == undisturbed


def test_checkpoints_are_kept_for_running_trials_and_the_best_few(s3: str, postgres: Postgres) -> None:
    store = PostgresStore(postgres.new_database(), location(f"{s3}/runs"))
    sweep = make_sweep(store, trials=9, epochs=3, scheduler="none")
    coordinator = Coordinator(Ledger(sweep), total=9, concurrent=2)
    assert coordinator.config(coordinator.ledger.ask())["folder"] == "s3://bucket/runs/first/checkpoints/0"
    play(Coordinator(Ledger(sweep), total=9, concurrent=2), lambda record, epoch: record.number / 10, keep={2})
    checkpoints = sweep.folder / "checkpoints"
    best = {str(number) for number in range(9 - KEPT_CHECKPOINTS, 9)}
    assert set(names(checkpoints)) == {*best, "2"}
    for stray in ("0", "77"):
        (checkpoints / stray / "checkpoint.pt").write_bytes(b"state")  # type: ignore[union-attr]
    Coordinator(Ledger(sweep), total=9, concurrent=2)
    assert set(names(checkpoints)) == {*best, "2"}
    assert len(stored_trials(sweep)) == 9
    with pytest.raises(ValueError, match="s3://bucket/runs/first exists and belongs to no sweep in postgresql://"):
        make_sweep(PostgresStore(postgres.new_database(), location(f"{s3}/runs")))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--storage", "s3://bucket/runs"], ["--storage: 's3://bucket/runs'", "--ledger URL"]),
        (["--storage", f"s3://a:{SECRET}@bucket/runs", "--ledger", "URL"], ["s3://bucket/runs", "environment"]),
        (
            ["--storage", "s3://bucketet/runs", "--ledger", "URL", "--tracking", "DB"],
            ["s3://bucketet/runs", "cannot be written"],
        ),
        (["--storage", "s3://bucket/runs", "--ledger", "URL"], ["'s3://bucket/runs'", "--tracking"]),
    ],
)
def test_a_storage_that_cannot_be_used(
    flags: list[str], words: list[str], s3: str, postgres: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"URL": postgres.new_database(), "DB": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    assert search.main(["launch", "bad", *(known.get(flag, flag) for flag in flags)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert SECRET not in said
    for word in words:
        assert word in said, said


def test_where_the_artifacts_of_runs_go(tmp_path: Path) -> None:
    there, here = location("s3://bucket/runs?region=eu-west-1"), tmp_path
    assert artifacts_uri("http://server", here, "a") is None
    assert artifacts_uri("sqlite:////x/mlflow.db", here, "a") == f"{here.as_uri()}/mlartifacts/a"
    assert artifacts_uri("postgresql://server/mlflow", here, "a") == f"{here.as_uri()}/mlartifacts/a"
    assert artifacts_uri("sqlite:////x/mlflow.db", there, "a") == "file:///x/mlartifacts/a"
    assert artifacts_uri("postgresql://server/mlflow", there, "a") == "s3://bucket/runs/mlartifacts/a"
