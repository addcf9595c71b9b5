"""MLflow as a projection of the ledger: everything in it can be rebuilt from the study and ``metrics.jsonl``.

One parent run per study, one child per trial, found again by their tags before one is created. Metrics are sent in batches, at
least once, with the times at which they were recorded: MLflow keeps the same key, step, time and value as one row, so sending
twice changes nothing. How far the sending got stands in ``tracker.jsonl``; without that file it starts from the beginning.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from training.locations import Location, Remote
from tune.files import NOISE
from tune.ledger import SWEEP, Ledger, Record
from tune.report import best_config_text, cost_metrics, cost_text, markdown_table, plots_page, rows, short

STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
}
NOTES = "tracker.jsonl"  # how far the sending got, and which run is which trial's
BATCH = 1000  # metrics in one request
TAG_LIMIT = 5000  # characters of a traceback that are kept in a tag
PAUSE = 3.0  # seconds between two looks at the ledger: a batch costs the driver less than its parts
NOTE_PAUSE = 15.0  # seconds between two rewritings of the parent's table


def quiet() -> None:
    """Telemetry off unless the user turned it on; dead servers answer within seconds; what it raises is
    not logged by it as well, and no page's address is printed for each run that has ended."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a call whose answer is late may have been carried out
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.ERROR)


def tracking_uri(storage: Location, asked: str) -> str:
    """Where the runs go: what the user asked for, else a database in the storage folder. ValueError where that is a URL."""
    if not asked and isinstance(storage, Remote):
        raise ValueError(f"--storage: {str(storage)!r} holds no database of MLflow's; give a server's address with --tracking")
    return asked or f"sqlite:///{storage / 'mlflow.db'}"


def artifacts_uri(uri: str, storage: Location, name: str) -> str | None:
    """Where the artifacts of a sweep's runs go: a server decides for itself; else into the storage."""
    if uri.startswith("http"):
        return None
    if isinstance(storage, Remote) and uri.startswith("sqlite:///"):
        storage = Path(uri.removeprefix("sqlite:///")).parent  # beside it: MLflow has clients of its own for object stores
    return (storage / "mlartifacts" / name).as_uri()


def noted_runs(ledger: Ledger) -> dict[int, str]:
    """MLflow's run id of each trial, as far as they were noted."""
    return {note["trial"]: note["run"] for note in ledger.lines(NOTES).read() if "trial" in note}


class Answering:
    """An MLflow client that says when a call came back with an answer."""

    def __init__(self, client: Any, answered: Callable[[], None]) -> None:
        self._client = client
        self._answered = answered

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def answering(*arguments: Any, **options: Any) -> Any:
            answer = call(*arguments, **options)
            self._answered()
            return answer

        return answering


class Projection:
    """Brings an MLflow store up to the ledger, from wherever it is. Any of its calls may raise what MLflow raises; a new
    projection then goes on from what was noted as sent."""

    def __init__(self, ledger: Ledger, uri: str, answered: Callable[[], None] = lambda: None) -> None:
        quiet()
        from mlflow.tracking import MlflowClient

        self.ledger = ledger
        self.sweep = ledger.sweep
        self.uri = uri
        self.client: Any = Answering(MlflowClient(tracking_uri=uri), answered)
        self.notes = ledger.lines(NOTES, fsync=False)
        self.metrics = ledger.lines("metrics.jsonl")
        self.experiment_id = self._experiment()
        notes = list(self.notes.read())
        self.noted = {note[role] for note in notes for role in ("parent", "run") if role in note}
        self.parent = self._parent()
        self.runs: dict[int, str] = {}  # trial number -> run id, once its parameters are there
        self.status: dict[str, str] = {}  # run id -> status in the store
        self.num_finished = 0  # finished trials that the parent's curve holds
        self.noted_at = 0.0
        for note in notes:
            if note.get("parent") == self.parent:
                self.metrics.offset, self.metrics.line = note["offset"], note["line"]
                self.num_finished = note.get("finished", 0)
        self._find_runs()

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.sweep.name)
        if found:
            return str(found.experiment_id)
        location = artifacts_uri(self.uri, self.sweep.storage, self.sweep.name)
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the pages for training runs, not those for chats
        return str(self.client.create_experiment(self.sweep.name, artifact_location=location, tags=tags))

    def _tags(self, role: str) -> dict[str, str]:
        return {"sweep": self.sweep.name, "sweep_id": self.sweep.provenance["id"], "study": self.ledger.kind, "role": role}

    def _search(self, role: str, also: str = "") -> list[Any]:
        """The runs of that role: those that are noted first, and those last that nothing was ever sent to."""
        wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in self._tags(role).items()) + also
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], wanted, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda run: (run.info.run_id not in self.noted, is_empty(run)))

    def _parent(self) -> str:
        found = self._search("sweep")
        if found:
            run_id, known = str(found[0].info.run_id), found[0].data.params
            self.client.update_run(run_id, status="RUNNING")
            for double in filter(is_empty, found[1:]):
                self.client.delete_run(double.info.run_id)
        else:
            name = self.sweep.name if self.ledger.kind == SWEEP else f"{self.sweep.name} {self.ledger.kind}"
            started = int(self.sweep.provenance["created"] * 1000)
            run = self.client.create_run(self.experiment_id, start_time=started, tags=self._tags("sweep"), run_name=name)
            run_id, known = str(run.info.run_id), {}
        spec = {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in self._record().items()}
        self._send_params(run_id, spec, known)
        return run_id

    def _record(self) -> dict[str, Any]:
        return {**self.sweep.spec.to_dict(), **{f"made_with.{k}": v for k, v in self.sweep.provenance.items()}}

    def _find_runs(self) -> None:
        """Runs that an earlier process made; what it did not get to, their parameters or a note of them, is made up for. A
        second one of a trial, made by a call whose answer did not come, goes; one that holds something belongs to a copy of the
        sweep on the same server."""
        for run in self._search("trial"):
            number, run_id = int(run.data.tags["trial"]), str(run.info.run_id)
            if number in self.runs and is_empty(run):
                self.client.delete_run(run_id)
            elif number not in self.runs and number in self.ledger.records:
                self.status[run_id] = run.info.status
                self._send_params(run_id, self._params(self.ledger.records[number]), run.data.params)
                self.runs[number] = run_id
        last = noted_runs(self.ledger)  # those of another store, where the sweep was tracked to one in between
        lacking = [{"trial": number, "run": run} for number, run in self.runs.items() if last.get(number) != run]
        if lacking:
            self.notes.append(lacking)

    # -- bringing the store up to date --------------------------------------------------------------------------------

    def sync(self) -> None:
        """Sends what the store lacks. When it returns, the store holds all that the ledger held when it was called."""
        with self.ledger.lock:
            records = list(self.ledger.records.values())
            ended = [record for record in records if record.finished]
            live = {record.number: "RUNNING" for record in records if not record.finished}
        for record in records:
            if record.number not in self.runs:
                self._create(record)
        self._send_metrics()
        for record in ended:
            if self.status[self.runs[record.number]] != STATUS[record.state]:
                self._terminate(record)
        for number in live:
            self._set_status(self.runs[number], "RUNNING")
        self._update_parent(sorted(ended, key=lambda record: record.ended))

    def _create(self, record: Record) -> None:
        tags = self._tags("trial") | {"trial": str(record.number), "method": record.method, "mlflow.parentRunId": self.parent}
        tags |= {key: str(value) for key, value in record.attrs.items() if key in ("source", "seed")}
        run = self.client.create_run(
            self.experiment_id, start_time=int(record.started * 1000), tags=tags, run_name=run_name(record)
        )
        self.status[run.info.run_id] = "RUNNING"
        self._send_params(run.info.run_id, self._params(record), {})
        self.runs[record.number] = str(run.info.run_id)
        self.notes.append([{"trial": record.number, "run": run.info.run_id}])

    def _params(self, record: Record) -> dict[str, Any]:
        return {"method": record.method, **record.values, "seed": self.ledger.seed(record)}

    def _send_params(self, run_id: str, params: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Those that a run lacks: MLflow takes a parameter once, and a resume may change resources."""
        from mlflow.entities import Param

        missing = [Param(key, str(value)) for key, value in params.items() if key not in known]
        if missing:
            self.client.log_batch(run_id, params=missing)

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric

        waiting: dict[int, list[Any]] = {}
        for line in self.metrics.read():
            if line["trial"] not in self.ledger.records:
                continue
            values = {"val/objective": line["objective"], **line["metrics"]}
            at = int(line["time"] * 1000)
            waiting.setdefault(line["trial"], []).extend(Metric(k, v, at, line["epoch"]) for k, v in values.items())
        if not waiting:
            return
        for number, metrics in waiting.items():
            if number not in self.runs:
                self._create(self.ledger.records[number])
            for start in range(0, len(metrics), BATCH):
                self.client.log_batch(self.runs[number], metrics=metrics[start : start + BATCH])
        self._note_progress()

    def _note_progress(self) -> None:
        sent = {"offset": self.metrics.offset, "line": self.metrics.line, "finished": self.num_finished}
        self.notes.append([{"parent": self.parent, **sent}])

    def _terminate(self, record: Record) -> None:
        from mlflow.entities import RunTag

        run_id = self.runs[record.number]
        summary = record.summary
        tags = {"state": record.word, "epochs": summary["epochs"]}
        if "error" in summary:
            tags["error"] = summary["error"][-TAG_LIMIT:]
        self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        self.client.set_terminated(run_id, STATUS[record.state], end_time=int(record.ended * 1000))
        self.status[run_id] = STATUS[record.state]

    def _set_status(self, run_id: str, status: str) -> None:
        if self.status[run_id] != status:
            self.client.update_run(run_id, status=status)
            self.status[run_id] = status

    def _update_parent(self, ended: list[Record]) -> None:
        """The best value so far and what became of the trials, in the order in which they ended; now and then the table."""
        from mlflow.entities import Metric

        if len(ended) == self.num_finished:
            return
        best, counts, curve = -1.0, dict.fromkeys(STATUS, 0), []
        costs = cost_metrics(ended, self.sweep.spec.epochs)
        for step, (record, cost) in enumerate(zip(ended, costs, strict=True), 1):
            counts[record.state] += 1
            if record.state is TrialState.COMPLETE and record.value is not None:
                best = max(best, record.value)
            if step > self.num_finished:
                values: dict[str, float] = {f"trials/{state.name.lower()}": count for state, count in counts.items()}
                values |= cost | ({"val/objective": best} if best >= 0 else {})
                curve += [Metric(name, value, int(record.ended * 1000), step) for name, value in values.items()]
        for start in range(0, len(curve), BATCH):
            self.client.log_batch(self.parent, metrics=curve[start : start + BATCH])
        self.num_finished = len(ended)
        self._note_progress()
        if time.monotonic() - self.noted_at > NOTE_PAUSE:
            self._write_table()

    def _write_table(self) -> None:
        self.noted_at = time.monotonic()
        top = rows(self.ledger, self.runs, self.ledger.leaderboard()[:5])
        self.client.set_tag(self.parent, "mlflow.note.content", f"{markdown_table(top)}\n\n{cost_text(self.ledger)}.")
        best = self.ledger.best()
        if best:
            self.client.set_tag(self.parent, "best_run_id", self.runs[best.number])
            self.client.set_tag(self.parent, "best_params", json.dumps({"method": best.method, **best.values}))

    def close(self, *, spent: bool) -> None:
        """The last word: artifacts on the parent, and no run left RUNNING. ``spent``: the budget is used up; otherwise the
        sweep and its unfinished trials wait (SCHEDULED) for a resume."""
        self.sync()
        for record in self.ledger.unfinished():
            self._set_status(self.runs[record.number], "SCHEDULED")
        if spent:
            self.client.set_terminated(self.parent, "FINISHED")
        else:
            self.client.update_run(self.parent, status="SCHEDULED")
        self._drop_doubles()
        self._write_table()  # from here on it is the pages that take their time
        best = self.ledger.best() if self.ledger.kind == SWEEP else None  # retraining compares means, not single runs
        if best:
            self.client.log_text(self.parent, best_config_text(self.ledger, best), "best_config.yaml")
        table = json.dumps(rows(self.ledger, self.runs), indent=1)
        self.client.log_text(self.parent, table, "leaderboard.json")
        page = plots_page(self.ledger) if best else ""
        if page:
            self.client.log_text(self.parent, page, "plots.html")
        noise = self.sweep.files.read(NOISE) if self.ledger.kind == SWEEP else None  # retraining draws its own
        if noise:
            self.client.log_text(self.parent, noise, NOISE)

    def _drop_doubles(self) -> None:
        """Runs that were made without this process hearing of it: the sweep is over, or waits, and they would run for ever."""
        own = {self.parent, *self.runs.values()}
        for role in ("sweep", "trial"):
            for run in self._search(role, also=" and attributes.status = 'RUNNING'"):
                if run.info.run_id not in own and is_empty(run):
                    self.client.delete_run(run.info.run_id)


def is_empty(run: Any) -> bool:
    """Whether nothing but its tags was ever sent to a run: its parameters come right after it."""
    return not run.data.params


def run_name(record: Record) -> str:
    """Number, method and its key parameters, the method's own ones first, for a person to read."""
    names = sorted((name for name in record.params if name != "method"), key=lambda name: "." not in name)
    words = [f"{name.split('.')[-1]}={short(record.params[name])}" for name in names]
    return " ".join([f"{record.number:03d}", record.method, *words[:4]])


class Tracker:
    """Keeps a projection up to date from a thread of its own, so that a slow or absent server never holds up a trial."""

    def __init__(self, ledger: Ledger, uri: str, say: Callable[[str], None] = lambda line: None) -> None:
        self.ledger = ledger
        self.uri = uri
        self.say = say
        self.problem = ""
        self._projection: Projection | None = None
        self._answered_at = time.monotonic()
        self._stop = threading.Event()
        self._spent = False
        self._deadline = 0.0  # after which a last word that was refused is not tried again
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE):
            self._attempt(lambda projection: projection.sync())
        while not self._attempt(lambda projection: projection.close(spent=self._spent)) and time.monotonic() < self._deadline:
            time.sleep(min(1.0, PAUSE))

    def _attempt(self, action: Callable[[Projection], None]) -> bool:
        try:
            if self._projection is None:
                self._projection = Projection(self.ledger, self.uri, self._answered)
            action(self._projection)
        except Exception as error:  # noqa: BLE001  the tracker's boundary: a store that fails is tried again, whatever it raises
            before, self.problem = self.problem, (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._projection = None  # found anew from its tags
            if not before and not self._stop.is_set():
                self.say(f"MLflow is behind the ledger ({self.problem}); the sweep goes on, and sends it the rest when it can")
            return False
        if self.problem and not self._stop.is_set():
            self.say("MLflow is up to date again")
        self.problem = ""
        return True

    def _answered(self) -> None:
        self._answered_at = time.monotonic()

    def close(self, *, spent: bool, patience: float = 30.0, within: float = math.inf) -> None:
        """Sends the rest, for as long as the store answers; ``problem`` says what stood in the way, if anything did. It gives
        up when calls have failed for ``patience`` seconds, or one has not come back for as long, or ``within`` are over."""
        began = time.monotonic()
        patience = min(patience, within)
        self._spent, self._deadline = spent, began + patience
        self._answered()
        self._stop.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if time.monotonic() > self._answered_at + patience:
                self.problem = self.problem or f"no answer for {patience:.3g} s"
                return
            if time.monotonic() > began + within:
                self.problem = self.problem or "it had no time to be brought up to date"
                return
