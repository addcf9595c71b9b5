"""Bad input gets one clear line that names the value and what is allowed, exit code 2, before Ray starts; and loses nothing."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import search
from tests.refusals import refused
from tests.sweep_process import ROOT, make_finished_sweep, of_real_data
from tests.sweep_process import search as call
from tests.sweeps import epoch_record, make_sweep, new_storage, play
from tune.report.closing import num_missing
from tune.report.leaderboard import retrain_rows
from tune.search.coordinator import Coordinator
from tune.search.ledger import RETRAIN, Ledger
from tune.search.recipes import dataset
from tune.spec import make_spec
from tune.sweep import _provenance, enqueue_retraining


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing Ray is an error in here."""
    for name in [module for module in sys.modules if module == "ray" or module.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)


BAD_LAUNCHES = {
    "unknown method": (["--method", "arl"], ["'arl'", "alr", "co-teaching"]),
    "one unknown method of two": (["--method", "alr,mixup9"], ["'mixup9'", "known are"]),
    "unknown data set": (["--data", "mnist"], ["'mnist'", "digits"]),
    "unknown noise": (["--noise", "pairs:0.2"], ["'pairs:0.2'", "symmetric"]),
    "unknown precision": (["--precision", "float16"], ["'float16'", "bfloat16"]),
    "noise rate of one": (["--noise", "symmetric:1"], ["symmetric:1", "[0, 1)"]),
    "negative noise rate": (["--noise", "symmetric:-0.1"], ["symmetric:-0.1", "[0, 1)"]),
    "noise rate that is no number": (["--noise", "asymmetric:x"], ["asymmetric:x", "[0, 1)"]),
    "noise map outside the classes": (["--noise", "asymmetric:0.2:3>12"], ["12"]),
    "unknown model": (["--model", "resnet"], ["'resnet'", "small-cnn"]),
    "empty range": (["--range", "lr=0.1:0.01"], ["0.1:0.01", "empty"]),
    "range of one point": (["--range", "lr=0.1:0.1"], ["0.1:0.1", "empty"]),
    "range outside the meaning": (["--range", "warmup=0.1:1.5"], ["1.5", "[0, 1)"]),
    "range that is no range": (["--range", "lr=0.1"], ["'0.1'", "LOW:HIGH"]),
    "logarithmic range from zero": (["--range", "weight_decay=0:0.1:log"], ["0:0.1:log", "above 0"]),
    "range of words": (["--range", "augmentation=weak,huge"], ["'huge'", "none, weak, strong"]),
    "unknown parameter in --set": (["--set", "learning_rate=0.1"], ["'learning_rate'", "lr"]),
    "unknown parameter in --range": (["--range", "alr.q=0.1:0.2"], ["'alr.q'", "entropy_weight"]),
    "illegal value": (["--set", "momentum=1"], ["1", "[0, 1)"]),
    "value that is no number": (["--set", "lr=fast"], ["'fast'", "(0, inf)"]),
    "value that is not finite": (["--set", "lr=nan"], ["nan", "(0, inf)"]),
    "set without a value": (["--set", "lr"], ["'lr'", "NAME=VALUE"]),
    "both a value and a range": (["--set", "lr=0.1", "--range", "lr=0.1:0.2"], ["lr", "--set or --range"]),
    "zero trials": (["--trials", "0"], ["'0'", "[1, inf)"]),
    "half a trial": (["--trials", "1.5"], ["'1.5'", "an integer"]),
    "zero epochs": (["--epochs", "0"], ["'0'", "[1, 1000000]"]),
    "one clean sample": (["--method", "mw-net", "--trusted", "1"], ["--trusted: 1", "mw-net", "[2, inf)"]),
    "one clean sample for all": (["--method", "all", "--trusted", "1"], ["--trusted: 1", "mw-net", "[2, inf)"]),
    "negative seed": (["--seed", "-1"], ["'-1'", "[0, inf)"]),
    "more CPUs than there are": (["--cpus-per-trial", "4096"], ["4096", "CPUs"]),
    "no CPU": (["--cpus-per-trial", "0"], ["'0'", "[0.0001, inf)"]),
    "less than Ray's unit of a CPU": (["--cpus-per-trial", "1e-300"], ["1e-300", "[0.0001, inf)"]),
    "less than Ray's unit of a GPU": (["--gpus-per-trial", "1e-300"], ["1e-300", "0.0001"]),
    "more trials than a float holds": (["--trials", "9" * 400], ["999", "an integer"]),
    "a batch beyond all bounds": (["--set", "batch_size=" + "9" * 400], ["999", "an integer in [2, "]),
    "a parameter of a method that is not searched": (["--method", "alr,ce", "--set", "gce.q=0.5"], ["'gce.q'", "known are"]),
    "more GPUs than there are": (["--gpus-per-trial", "64"], ["'64'", "[0, 1]"]),
    "one and a half GPUs": (["--gpus-per-trial", "1.5"], ["'1.5'", "[0, 1]"]),
    "a GPU where there is none": (["--gpus-per-trial", "1"], ["1", "0 GPUs"]),
    "an empty storage": (["--storage", ""], ["--storage: ''", "./runs"]),
    "an empty tracking URI": (["--tracking", " "], ["--tracking: ' '", "leave the flag out"]),
    "a tracking store in memory": (["--tracking", "sqlite:///"], ["'sqlite:///'", "sqlite:///FILE"]),
    "epochs beyond all bounds": (["--epochs", "9" * 20], ["999", "[1, 1000000]"]),
    "negative hours": (["--hours", "-1"], ["'-1'", "[0, inf)"]),
    "hours that are no number": (["--hours", "2h"], ["'2h'", "a number"]),
    "hours without end": (["--hours", "inf"], ["'inf'", "[0, inf)"]),
    "GPU-hours without a GPU": (["--gpu-hours", "3"], ["--gpu-hours: 3", "must be 0", "--gpus-per-trial"]),
    "a sweep that is not there to start from": (["--from", "lost"], ["'lost'", "there are: none"]),
    "a folder that is no sweep to start from": (["--from", "/"], ["'/'", "no folder of one"]),
    "nothing to start from": (["--from", ""], ["--from: ''"]),
    "tracking that is no address": (["--tracking", "mlruns"], ["'mlruns'", "http"]),
    "unknown flag": (["--learning-rate", "1"], ["--learning-rate"]),
}


@pytest.mark.parametrize("case", BAD_LAUNCHES)
def test_bad_launch(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, words = BAD_LAUNCHES[case]
    line = refused(capsys, "launch", "bad", "--storage", tmp_path / "runs", *flags)
    for word in words:
        assert word in line, line
    assert not (tmp_path / "runs").exists() or os.listdir(tmp_path / "runs") == []


@pytest.mark.parametrize("name", ["mlartifacts", "mlflow.db", "a/b", "../up", "", ".hidden", "with space", "-x" * 80])
def test_bad_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("launch", "resume", "best", "retrain", "stop"):
        refused(capsys, verb, "--storage", tmp_path / "runs", "--", name)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 10\n", ["'epoch'", "epochs"]),
        ("- 1\n- 2\n", ["KEY: VALUE"]),
        ("a: [1\n", ["cannot be read"]),
        ("epochs: many\n", ["'many'", "an integer"]),
        ("sampler: grid\n", ["'grid'", "tpe"]),
        ("scheduler: hyperband\n", ["'hyperband'", "asha"]),
        ("reduction_factor: 1\n", ["1", "[2, inf)"]),
        ("validation_fraction: 1.0\n", ["1.0", "(0, 1)"]),
        ("validation_fraction: 0.9999\n", ["training"]),
        ("epochs: 3\nepochs: 4\n", ["'epochs'", "twice"]),
        ("0\n", ["KEY: VALUE"]),
    ],
)
def test_bad_spec_file(text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    line = refused(capsys, "launch", "bad", "--storage", tmp_path / "runs", "--spec", tmp_path / "spec.yaml")
    for word in words:
        assert word in line, line


def test_spec_file_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.yaml" in refused(capsys, "launch", "bad", "--spec", tmp_path / "absent.yaml", "--storage", tmp_path / "runs")


def test_storage_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "launch", "bad", "--storage", tmp_path / "file" / "runs")
    assert "cannot be written" in line
    assert str(tmp_path / "file" / "runs") in line


def test_tracking_server_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused at once
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        line = refused(capsys, "launch", "bad", "--storage", tmp_path / "runs", "--tracking", uri)
    assert uri in line
    assert "does not answer" in line
    assert os.listdir(tmp_path / "runs") == []


@pytest.mark.parametrize("verb", ["resume", "best", "retrain", "stop"])
def test_sweep_that_does_not_exist(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_finished_sweep(tmp_path, "other")
    line = refused(capsys, verb, "lost", "--storage", tmp_path)
    assert "'lost'" in line
    assert "other" in line


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:", ["'sqlite:'", "sqlite:///FILE"]),
        ("http://127.0.0.1:9abc", ["'http://127.0.0.1:9abc' is not allowed", "9abc"]),
        ("https://", ["'https://' is not allowed", "no host"]),
        ("sqlite:////nowhere/at/all/x.db", ["/nowhere/at/all", "cannot be written"]),
        ("postgresql+nodriver://user@127.0.0.1:1/x", ["127.0.0.1:1/x", "cannot be opened"]),
        ("http://user:secret@127.0.0.1:1", ["'http://127.0.0.1:1' holds a user", "set MLFLOW_TRACKING_USERNAME and"]),
        ("postgresql://user:secret@127.0.0.1:1/x", ["'postgresql://127.0.0.1:1/x' holds a password", "set PGPASSWORD"]),
        ("postgresql://127.0.0.1:1/x?user=a&password=secret", ["'postgresql://127.0.0.1:1/x' holds a password", "PGPASSWORD"]),
        ("mysql+pymysql://user:secret@127.0.0.1:1/x", ["holds a password", "set up an MLflow server in front"]),
    ],
)
def test_tracking_database_that_cannot_be_opened(
    uri: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "launch", "bad", "--storage", tmp_path / "runs", "--tracking", uri)
    for word in words:
        assert word in line
    assert "secret" not in line
    assert not (tmp_path / "runs").exists() or os.listdir(tmp_path / "runs") == []


def test_sweep_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_finished_sweep(tmp_path, "taken")
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = refused(capsys, "launch", "taken", "--storage", tmp_path)
    assert f"resume taken --storage {tmp_path}" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trials", "0"], ["'0'"]),
        (["--trials", "2"], ["2 is not allowed", "3 trials"]),
        (["--concurrent", "-1"], ["'-1'"]),
        (["--hours", "-0.5"], ["'-0.5'", "[0, inf)"]),
        (["--gpu-hours", "1"], ["--gpu-hours: 1", "must be 0"]),
        (["--from", "kept"], ["--from"]),
        (["--cpus-per-trial", "4096"], ["4096"]),
        (["--epochs", "50"], ["--epochs"]),
        (["--set", "lr=1"], ["--set"]),
    ],
)
def test_bad_resume(flags: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_finished_sweep(tmp_path, "kept")
    line = refused(capsys, "resume", "kept", "--storage", tmp_path, *flags)
    for word in words:
        assert word in line, line


def test_failed_trials_do_not_count_where_trials_are_fewer(
    tmp_path: Path, migrated_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in --trials itself. Two failed and three ended well, of nine: three may be asked for, and two may not."""
    storage = new_storage(tmp_path / "runs", migrated_store)
    sweep = of_real_data(make_sweep(storage, "fewer", trials=9, epochs=1, scheduler="none"))
    coordinator = Coordinator(Ledger(sweep), total=9, concurrent=1)
    for number in range(5):
        coordinator.next(str(number))
        failed = number < 2
        epochs = [] if failed else [epoch_record(1, 0.5)]
        coordinator.result(str(number), epochs, failure="RuntimeError: out of paper" if failed else None, diverged=False)
        coordinator.released(str(number))
    assert "2 is not allowed; 3 trials" in refused(capsys, "resume", "fewer", "--storage", storage, "--trials", 2)
    assert search.main(["resume", "fewer", "--storage", str(storage), "--trials", "3"]) == 0
    assert "nothing was left to do: 3 of 3 trials" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_launch_where_something_else_has_the_name(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    if kind == "folder":
        other.mkdir()
    else:
        other.write_text("mine")
    line = refused(capsys, "launch", "other", "--storage", tmp_path)
    assert "'other' is taken" in line
    assert "choose another" in line
    assert "resume" not in line


def test_a_machine_without_git_notes_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert _provenance(dataset(make_spec({})))["commit"] == "unknown"


def test_resume_of_changed_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_finished_sweep(tmp_path, "kept")
    record = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(record.replace("noise_seed: 0", "noise_seed: 1"))
    assert "changed" in refused(capsys, "resume", "kept", "--storage", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["best", "x", "--top", "0"],
        ["retrain", "x", "--seeds", "none"],
        ["ui", "--port", "99999"],
        ["train", "absent.yaml"],
        ["train", "--method", "alr,ce"],
        ["train", "--method", "alrr"],
        ["train", "--epochs", "0"],
        ["fly"],
        [],
    ],
)
def test_other_bad_commands(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, *arguments)


def test_a_launch_on_a_sweep_that_runs_names_its_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, "busy")
    with sweep.files.lock("x"):
        line = refused(capsys, "launch", "busy", "--storage", tmp_path)
    assert f"sweep 'busy' is being run by process {os.getpid()} on {socket.gethostname()}" in line


@pytest.mark.parametrize(
    ("flag", "value", "word"),
    [("--tracking", "mlruns", "'mlruns' is not allowed"), ("--address", "127.0.0.1:1", "nothing answers there")],
)
def test_what_a_resume_refuses_is_not_kept(flag: str, value: str, word: str, tmp_path: Path) -> None:
    record = make_finished_sweep(tmp_path, "kept") / "sweep.yaml"
    before = record.read_text()
    assert word in call("resume", "kept", "--storage", tmp_path, "--trials", 9, flag, value, check=2).stderr
    assert record.read_text() == before


def test_pages_on_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port: {port} cannot be had" in refused(capsys, "ui", "--storage", tmp_path, "--port", port)


def test_dry_run_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "alr,ce", "--set", "alr.warmup=0.1", "--range", "lr=0.02:0.2:log", "--epochs", "27"]
    assert search.main(["launch", "dry", "--storage", str(tmp_path), "--dry-run", *flags]) == 0
    said = capsys.readouterr().out
    assert "rungs at 3, 9" in said
    assert "lr 0.02:0.2:log" in said
    assert "warmup=0.1" in said
    assert "realised rate 0.3999" in said  # 575 of 1,438 labels
    assert os.listdir(tmp_path) == []


def test_a_flag_wins_over_the_spec_file_hyperparameter_by_hyperparameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("method: alr\nset: {momentum: 0.5, memory: 0.05}\nrange: {batch_size: 16:32, lr: 0.01:0.02}\n")
    flags = ["--set", "lr=0.03", "--range", "memory=0.04:0.06"]
    assert search.main(["launch", "dry", "--storage", str(tmp_path / "runs"), "--dry-run", "--spec", str(spec), *flags]) == 0
    said = capsys.readouterr().out
    for word in ("momentum=0.5", "batch_size 16:32", "lr=0.03", "memory 0.04:0.06"):
        assert word in said


def test_a_parameter_of_a_method_that_is_not_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "alr,gce", "--set", "gce.q=0.5", "--dry-run"]
    assert search.main(["launch", "dry", "--storage", str(tmp_path), *flags]) == 0
    assert "q=0.5" in capsys.readouterr().out


def test_a_machine_with_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver keeps its data in main memory, and says what a trial that asks for no GPU does not use."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert search.main(["launch", "dry", "--storage", str(tmp_path), "--dry-run"]) == 0
    assert "trials run on the CPU; this machine has 2 GPUs: --gpus-per-trial" in capsys.readouterr().out
    assert search.main(["launch", "dry", "--storage", str(tmp_path), "--dry-run", "--gpus-per-trial", "0.5"]) == 0
    assert "trials run on the CPU" not in capsys.readouterr().out


def test_a_launch_that_was_killed_and_a_damaged_sweep_leave_the_list_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_finished_sweep(tmp_path, "good")
    for name in (".first.x1y2z3", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.yaml").write_text("spec: [1]\n")
    assert search.main(["list", "--storage", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["bad", "good"]
    assert "damaged" in lines[2]
    assert "3/3" in lines[3]
    assert "damaged" in refused(capsys, "best", "bad", "--storage", tmp_path)


def test_resume_of_a_finished_sweep_says_so(tmp_path: Path, migrated_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = tmp_path / "with space"
    storage.mkdir()
    shutil.copy(migrated_store, storage / "mlflow.db")
    folder = make_finished_sweep(storage, "done")
    assert search.main(["resume", "done", "--storage", str(storage)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    command = f"python search.py resume done --storage '{storage}'"
    assert last == f"nothing was left to do: 3 of 3 trials; for more: {command} --trials N"
    assert search.main(["train", str(folder / "best_config.yaml")]) == 0


def test_resume_says_that_the_program_is_another(
    tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = new_storage(tmp_path / "runs", migrated_store)
    folder = make_finished_sweep(storage, "old")
    for before, now, said in (("aaaaaaa", "bbbbbbb", True), ("aaaaaaa", "aaaaaaa", False), ("aaaaaaa", "unknown", False)):
        record = (folder / "sweep.yaml").read_text()
        (folder / "sweep.yaml").write_text(re.sub("commit: .*", f"commit: {before}", record))
        monkeypatch.setattr("tune.sweep._commit", lambda now=now: now)
        assert search.main(["resume", "old", "--storage", str(storage)]) == 0
        line = "'old' was launched with version aaaaaaa of this program, this is bbbbbbb; methods and ranges may differ"
        assert (line in capsys.readouterr().out) == said


def test_resume_says_which_budget_is_spent(tmp_path: Path, migrated_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three trials of nine ran, 1.5 seconds or more, where 0.36 were allowed."""
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    folder = make_finished_sweep(tmp_path, "short")
    record = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(record.replace("trials: 3", "trials: 9").replace("hours: 0.0", "hours: 0.0001", 1))
    assert search.main(["resume", "short", "--storage", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    spent = re.escape("nothing was left to do: ") + r"0\.000\d+ of 0\.0001 hours" + re.escape("; for more: ")
    assert re.fullmatch(spent + re.escape(f"python search.py resume short --storage {tmp_path} --hours N"), lines[-1])
    assert re.match(
        r"spent: 3 of 9 trials, 0\.000\d+ of 0\.0001 hours, 9 epochs, 0.00125 trial-hours; saved by ASHA:", lines[-2]
    )


def test_a_sweep_to_start_from_without_a_complete_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, "old", trials=3, epochs=3)
    play(Coordinator(Ledger(sweep), total=3, concurrent=3), keep=[0, 1, 2])
    line = refused(capsys, "launch", "new", "--storage", tmp_path, "--from", "old")
    assert line == "error: --from: sweep 'old' has no complete trial to start from\n"
    (sweep.folder / "journal.log").write_text("{}\n")
    assert "journal.log: line 1 is damaged" in refused(capsys, "launch", "new", "--storage", tmp_path, "--from", sweep.folder)
    assert os.listdir(tmp_path) == ["old"]


def test_dry_run_says_what_is_taken_from_an_earlier_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_finished_sweep(tmp_path, "old")
    flags = ["--method", "ce,alr", "--range", "weight_decay=0.4:0.5", "--hours", "2.5", "--epochs", "27"]
    assert search.main(["launch", "new", "--storage", str(tmp_path), "--from", "old", "--dry-run", *flags]) == 0
    said = capsys.readouterr().out
    assert "32 trials of 27 epochs, at most 2.5 hours, ASHA rungs at 3, 9" in said
    assert "trial 0 of old is left out: its weight_decay 0.0" in said
    assert "is outside 0.4:0.5" in said
    assert "from old: 0 of its best 3 configurations run first" in said
    assert os.listdir(tmp_path) == ["old"]


def test_trials_in_progress_wait_when_no_driver_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, "half", trials=3, epochs=3)
    play(Coordinator(Ledger(sweep), total=3, concurrent=2), keep=[1])
    with sweep.files.lock("python search.py resume half"):
        assert search.main(["best", "half", "--storage", str(tmp_path)]) == 0
        assert "running" in capsys.readouterr().out
        assert sweep.files.command() == "python search.py resume half"
    assert search.main(["best", "half", "--storage", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "waiting" in said
    assert "running" not in said


def test_a_retraining_that_failed_is_tried_again(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "some", trials=2, epochs=2)
    searched = Ledger(sweep)
    play(Coordinator(searched, total=2, concurrent=2))
    (sweep.folder / RETRAIN).mkdir()

    def retraining() -> Ledger:
        enqueue_retraining(Ledger(sweep, RETRAIN, create=True), searched.leaderboard()[:1], 2)
        return Ledger(sweep, RETRAIN)

    ledger = retraining()
    coordinator = Coordinator(ledger, total=ledger.total, concurrent=2)
    for name in ("a", "b"):
        coordinator.next(name)
    coordinator.result("a", [], failure="Traceback\nMemoryError", diverged=False)
    coordinator.released("a")
    play(coordinator)
    assert (ledger.total, num_missing(ledger), ledger.is_finished) == (2, 1, True)
    again = retraining()
    assert (again.total, num_missing(again), again.is_finished) == (3, 1, False)
    play(Coordinator(again, total=again.total, concurrent=2))
    assert (num_missing(again), again.is_finished) == (0, True)
    assert retraining().total == 3
    (row,) = retrain_rows(again)
    assert (row["seeds"], sorted(row["by_seed"])) == (2, ["0", "1"])


def test_output_that_nobody_reads_any_more(tmp_path: Path) -> None:
    """``launch | head -1``, or a terminal that is gone: the sweep goes on, in silence."""
    code = """
import sys
from tests.sweeps import make_sweep, play
from pathlib import Path
from tune.search.coordinator import Coordinator
from tune.report.display import Display
from tune.search.ledger import Ledger
from tune.report.output import outlast_readers

outlast_readers()
ledger = Ledger(make_sweep(Path(sys.argv[1]), "piped", trials=40))
with Display(ledger, 40) as display:
    play(Coordinator(ledger, total=40, concurrent=2, on_event=display.event))
print(ledger.num_counted(), file=sys.stderr)
"""
    for sink in ("| head -1", "> /dev/full"):
        place = tmp_path / sink.strip("|> /").replace(" ", "").replace("/", "")
        command = f"{sys.executable} -u -c '{code}' {place} {sink}"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "40\n"), sink


CLOSED = [
    ("best", ">&-", 0),
    ("best", "| true", 141),  # as of a process that the signal ends
    ("best", "> /dev/full", 2),
    ("resume", ">&- 2>&- <&-", 0),
    ("resume", "| true", 0),  # what runs a sweep goes on
]


def test_a_standard_output_that_is_closed(storage: Path) -> None:
    """No file of ours gets its number, nothing is said of it, and the work is done."""
    started = []
    for number, (verb, sink, _) in enumerate(CLOSED):
        folder = make_finished_sweep(storage, f"seen{number}")
        kept = (folder / "journal.log").read_bytes()
        command = f"{sys.executable} {ROOT}/search.py {verb} {folder.name} --storage {storage} {sink}; exit ${{PIPESTATUS[0]}}"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that it notices that nobody reads, however fast it is
        process = subprocess.Popen(["bash", "-c", command], stderr=subprocess.PIPE, text=True, env=environment)
        started.append((process, folder, kept))
    for (verb, sink, code), (process, folder, kept) in zip(CLOSED, started, strict=True):
        _, said = process.communicate(timeout=300)
        assert process.returncode == code, (verb, sink, said)
        assert said == ("error: [Errno 28] No space left on device\n" if code == 2 else ""), (verb, sink)
        assert (folder / "journal.log").read_bytes() == kept
        assert (folder / "best_config.yaml").is_file() is (verb == "resume")


def test_help_list_and_best_import_no_executor(tmp_path: Path) -> None:
    """They take seconds each, and a user waits for them: none of Ray, MLflow and torchvision."""
    make_finished_sweep(tmp_path, "seen")
    code = f"""
import sys, search
for words in (["--help"], ["list"], ["best", "seen"], ["best", "seen", "--json", "--rungs"], ["launch", "a", "--method", "x"]):
    try:
        search.main([*words, *(["--storage", {str(tmp_path)!r}] if words != ["--help"] else [])])
    except SystemExit:
        pass
print("imported:", sorted({{"ray", "mlflow", "torchvision"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")
    assert "complete" in done.stdout


@pytest.mark.parametrize("words", [["launch", "no-compiler"], ["train"]])
def test_a_compiler_that_is_missing_is_named_before_anything_starts(words: list[str], tmp_path: Path) -> None:
    storage = [] if words == ["train"] else ["--storage", str(tmp_path)]
    command = [sys.executable, "search.py", *words, "--method", "ce", "--compile", "on", *storage]
    environment = {**os.environ, "CXX": "/nonexistent"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2
    error = ended.stderr.strip().splitlines()[-1]
    assert error.startswith(
        "error: --compile: 'on' is not allowed; this machine cannot compile (InvalidCxxCompiler: No working C++"
    )
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "no-compiler").exists()
