"""What a user waits for before anything runs comes without torch, Ray and MLflow; and whose error an error is."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import search
from data.names import SPLITS, VIEW_DESCRIPTIONS
from data.sources import READERS, find_source
from data.views import VIEWS
from errors import UserError
from methods import METHODS
from methods.base import Method
from models import MODELS
from tests.sweep_process import ROOT, make_finished_sweep
from tests.sweeps import make_sweep, play
from tune.checks import TrackingUnavailable
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger
from tune.spec import make_spec
from tune.store.journal import DamagedFile
from tune.store.stored_sweep import Sweep

HEAVY = ("torch", "ray", "mlflow", "torchvision", "timm", "sklearn")
HELP_MEGABYTES = 100
PROBE = f"""
import json, re, sys
import search
try:
    code = search.main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
imported = [name for name in {HEAVY!r} if name in sys.modules]
with open("/proc/self/status") as status:  # getrusage counts what the parent held before exec, too
    kilobytes = int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])
print(json.dumps([code, imported, kilobytes // 1024]))
"""


def probe(*words: object) -> tuple[int, list[str], int, str]:
    """Runs a command in a process of its own: exit code, heavy packages that it imported, megabytes, and what it printed."""
    command = [sys.executable, "-c", PROBE, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    code, imported, megabytes = json.loads(last)
    return code, imported, megabytes, "\n".join(printed) + done.stderr


@pytest.mark.parametrize("words", [["--help"], ["launch", "--help"], ["best", "--help"]])
def test_help_is_light(words: list[str]) -> None:
    code, imported, megabytes, said = probe(*words)
    assert (code, imported) == (0, []), said
    assert "usage: " in said
    assert megabytes < HELP_MEGABYTES


def test_what_reads_or_refuses_is_light(tmp_path: Path) -> None:
    make_finished_sweep(tmp_path, "seen")
    storage = ["--storage", tmp_path]
    cases: list[tuple[list[object], int, str]] = [
        (["launch", "x", "--learning-rate", "1"], 2, "--learning-rate"),
        (["launch", "x", "--method", "arl", *storage], 2, "'arl'"),
        (["launch", "x", "--trials", "0", *storage], 2, "'0'"),
        (["best", "lost", *storage], 2, "no sweep 'lost'"),
        (["stop", "lost", *storage], 2, "no sweep 'lost'"),
        (["stop", "seen", *storage], 0, "is not running"),
        (["list", *storage], 0, "3/3"),
        (["best", "seen", *storage], 0, "complete"),
        (["best", "seen", "--json", *storage], 0, '"state": "complete"'),
    ]
    for words, expected, word in cases:
        code, imported, _, said = probe(*words)
        assert (code, imported) == (expected, []), (words, said)
        assert word in said, words


def test_every_name_stands_for_something() -> None:
    """The tables of names are written apart from what needs torch."""
    assert set(VIEW_DESCRIPTIONS) == set(VIEWS)
    assert SPLITS == ("stratified", "shuffled")
    assert all(issubclass(method, Method) for method in METHODS.values())
    assert len({METHODS[name] for name in METHODS}) == len(METHODS)
    assert all(callable(model.build) for model in MODELS.values())
    assert len({(model.module, model.function) for model in MODELS.values()}) == len(MODELS)
    assert [name for name in READERS if name not in ("folder", "manifest", "cifar10n") and find_source(name).name != name] == []


# -- a ledger that speaks for itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [("ce",), ("ce", "alr", "gce")])
def test_a_leaderboard_without_the_space_is_the_same(methods: tuple[str, ...], tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, method=methods, trials=9, epochs=4)
    ledger = Ledger(sweep)
    play(Coordinator(ledger, total=9, concurrent=3), keep=[7])
    read = Ledger(sweep, read_only=True)
    assert read._space is None
    assert (read.size, read.budgets()) == (ledger.size, ledger.budgets())
    assert read.leaderboard() == Ledger(sweep).leaderboard()
    assert read._space is None
    assert [record.values for record in read.leaderboard()] == [record.values for record in ledger.leaderboard()]
    assert read._space is not None


def test_a_small_space_is_asked_for_its_size(tmp_path: Path) -> None:
    """Its budget is a number of configurations, which the leaderboard shows."""
    small = {"lr": "0.05,0.1", "weight_decay": "0.001,0.002"}
    sweep = make_sweep(tmp_path, method=("ce",), trials=9, epochs=1, range=small)
    play(Coordinator(Ledger(sweep), total=9, concurrent=1))
    read = Ledger(sweep, read_only=True)
    assert read.size == 4
    assert "4 of 4 configurations" in [str(budget) for budget in read.budgets()]


def test_a_record_is_read_as_it_was_launched(tmp_path: Path) -> None:
    """Without its data set, which is asked for what a record of an earlier version lacks."""
    sweep = make_sweep(tmp_path, method=("ce", "gce"), noise="asymmetric:0.2:7>1", range={"lr": "1e-5:0.1:log"}, hours=0.125)
    assert Sweep.read(sweep.folder).spec == sweep.spec
    bare = make_spec({"data": "digits", "noise": "", "model": "", "views": ""}, stored=True)
    assert (bare.noise, bare.model, bare.views) == ("symmetric:0.4", "small-cnn", "")
    with pytest.raises(UserError, match="unknown data set 'digit'; known are digits, "):
        make_spec({**vars(sweep.spec), "data": "digit"}, stored=True)


# -- whose error it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UserError, DamagedFile, TrackingUnavailable])
def test_errors_of_users_pass_from_one_process_to_another(kind: type[UserError]) -> None:
    error = pickle.loads(pickle.dumps(kind("lr: 2 is not allowed")))
    assert (type(error), str(error)) == (kind, "lr: 2 is not allowed")
    assert isinstance(error, ValueError)


def test_debug_shows_where_a_user_s_error_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["best", "lost", "--storage", str(tmp_path)]
    assert search.main(words) == 2
    line = capsys.readouterr().err
    assert line == f"error: no sweep 'lost' in {tmp_path}; there are: none\n"
    assert search.main([*words, "--debug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert "stored_sweep.py" in said
    assert said.endswith(f"\n{line}")


@pytest.mark.parametrize("error", [ValueError("math domain error"), KeyError("lr"), TypeError("not callable")])
def test_an_error_of_ours_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(options: object) -> int:
        raise error

    monkeypatch.setitem(search.VERBS, "list", broken)
    assert search.main(["list"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert "in broken" in said
    assert "error: " not in said


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/x"), OSError(28, "No space left on device")])
def test_an_error_of_the_system_is_one_line(
    error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(options: object) -> int:
        raise error

    monkeypatch.setitem(search.VERBS, "list", refused)
    assert search.main(["list"]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
