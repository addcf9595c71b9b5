"""MLflow as a projection of the ledger: everything in it can be rebuilt from the study and ``metrics.jsonl``.

A study has one parent run, and a child of it for each trial. Metrics are sent in batches, at least once, with the times at
which they were recorded. MLflow keeps the same key, step, time and value as one row, so sending twice changes nothing. How far
the sending got is read off each run's latest values, so a run that lacks something gets it at the next start, whatever the
reason. ``tracker.jsonl`` notes which run belongs to which trial.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from tune.report.leaderboard import NOTES, cost_metrics, cost_text, markdown_table, noted_runs, plots_page, rows, short
from tune.report.mlflow_database import follow_run, follow_storage, is_own, prepare
from tune.report.stored_runs import StoredRuns, TimedClient, Waiting, is_empty
from tune.report.tracking import artifacts_uri, quiet, sqlite_path
from tune.search.ledger import SWEEP, Ledger, Record
from tune.search.recipes import best_config_text
from tune.store.base import NOISE

STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
}
PARENT = "mlflow.parentRunId"  # the tag by which MLflow's pages put a run below another
BATCH = 1000  # metrics in one request
TAG_LIMIT = 5000  # characters of a traceback that are kept in a tag
TABLE_PAUSE = 15.0  # seconds between two rewritings of the parent's table


class Projection:
    """Brings an MLflow store up to the ledger, whatever the store holds.

    Any of its calls may raise what MLflow raises. A new projection then goes on from what the store holds. ``say`` is told
    what was restored or mended.
    """

    def __init__(
        self,
        ledger: Ledger,
        uri: str,
        waiting: Waiting = nullcontext,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        load()
        self.ledger = ledger
        self.sweep = ledger.sweep
        self.uri = uri
        self.say = say
        self._prepare()
        from mlflow.tracking import MlflowClient

        with waiting():  # it connects to a database
            client = MlflowClient(tracking_uri=uri)
        self.client: Any = TimedClient(client, waiting)
        self.notes = ledger.lines(NOTES, fsync=False)
        self.metrics = ledger.lines("metrics.jsonl")
        notes = list(self.notes.read())
        noted = {note[role] for note in notes for role in ("parent", "run") if role in note}
        self.stored = StoredRuns(self.client, ledger, uri, noted, say)
        self.experiment_id = self.stored.experiment_id
        self.last_parent = next((note["parent"] for note in reversed(notes) if "parent" in note), None)
        self.latest: dict[str, Mapping[str, float]] = {}  # run id -> the latest values that it held when it was found
        self.parent = self._parent()
        self.runs: dict[int, str] = {}  # trial number -> run id, once its parameters are there
        self.status: dict[str, str] = {}  # run id -> status in the store
        self.num_finished: int | None = None  # finished trials that the parent's curve holds, once that was looked at
        self.table_written_at = 0.0
        self._find_runs()
        if restored := self.stored.num_restored:
            runs, verb = ("1 run", "is") if restored == 1 else (f"{restored} runs", "are")
            self.say(f"{runs} of {self.sweep.name!r} had been deleted in MLflow and {verb} restored")

    # -- finding what is there ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """A database file is made or mended first, and told where the storage lies now."""
        path, storage = sqlite_path(self.uri), self.sweep.storage
        if path:
            prepare(path, self.say)
        if isinstance(storage, Path) and is_own(self.uri, storage):
            follow_storage(storage)

    def _parent(self) -> str:
        existing = self.stored.choose(self.stored.search("sweep", deleted=True), {}, self.last_parent)
        if existing:
            run_id, params, artifacts = str(existing.info.run_id), existing.data.params, str(existing.info.artifact_uri)
            self.latest[run_id] = existing.data.metrics
            self.client.update_run(run_id, status="RUNNING")
        else:
            name = self.sweep.name if self.ledger.kind == SWEEP else f"{self.sweep.name} {self.ledger.kind}"
            started = int(self.sweep.provenance["created"] * 1000)
            run = self.client.create_run(self.experiment_id, start_time=started, tags=self.stored.tags("sweep"), run_name=name)
            run_id, params, artifacts = str(run.info.run_id), {}, str(run.info.artifact_uri)
        self._follow(run_id, artifacts)
        spec = {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in self._record().items()}
        self._send_params(run_id, spec, params)
        if run_id not in self.stored.noted:
            self.notes.append([{"parent": run_id}])
        return run_id

    def _follow(self, run_id: str, artifacts: str) -> None:
        """Sets the place of the parent's ``artifacts`` to where the storage is now, also in a database that lies elsewhere."""
        location = artifacts_uri(self.uri, self.sweep.storage, self.sweep.name)
        if location and not artifacts.startswith(f"{location}/"):
            follow_run(self.uri, run_id, location)

    def _record(self) -> dict[str, Any]:
        return {**self.sweep.spec.to_dict(), **{f"made_with.{k}": v for k, v in self.sweep.provenance.items()}}

    def _find_runs(self) -> None:
        """Takes over the runs that an earlier process made. Parameters and notes that it did not get to write are added."""
        last = noted_runs(self.ledger)  # those of another store, where the sweep was tracked to one in between
        runs_by_trial: dict[int, list[Any]] = {}
        for run in self.stored.search("trial", deleted=True):
            runs_by_trial.setdefault(int(run.data.tags["trial"]), []).append(run)
        for number, runs in runs_by_trial.items():
            record = self.ledger.records.get(number)
            run = self.stored.choose(runs, self._params(record), last.get(number)) if record else None
            if record and run:
                self._take_over(record, run)
        missing = [{"trial": number, "run": run} for number, run in self.runs.items() if last.get(number) != run]
        if missing:
            self.notes.append(missing)

    def _take_over(self, record: Record, run: Any) -> None:
        run_id = str(run.info.run_id)
        self._send_params(run_id, self._params(record), run.data.params)
        if run.data.tags.get(PARENT) != self.parent:
            self._set_tag(run_id, PARENT, self.parent)
        self.status[run_id] = run.info.status
        self.latest[run_id] = run.data.metrics
        self.runs[record.number] = run_id

    # -- bringing the store up to date --------------------------------------------------------------------------------

    def sync(self) -> None:
        """Sends what the store lacks. When it returns, the store holds all that the ledger held when it was called."""
        with self.ledger.lock:
            records = list(self.ledger.records.values())
            finished = [record for record in records if record.finished]
            live = {record.number: "RUNNING" for record in records if not record.finished}
        for record in records:
            if record.number not in self.runs:
                self._create(record)
        self._send_metrics()
        for record in finished:
            if self.status[self.runs[record.number]] != STATUS[record.state]:
                self._terminate(record)
        for number in live:
            self._set_status(self.runs[number], "RUNNING")
        self._update_parent(sorted(finished, key=lambda record: record.ended_at))

    def _create(self, record: Record) -> None:
        tags = self.stored.tags("trial") | {"trial": str(record.number), "method": record.method, PARENT: self.parent}
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

    def _send_params(self, run_id: str, params: Mapping[str, Any], stored: Mapping[str, str]) -> None:
        """Sends the parameters that are not ``stored``. MLflow takes a parameter once, and a resume may change resources."""
        from mlflow.entities import Param

        missing = [Param(key, str(value)) for key, value in params.items() if key not in stored]
        if missing:
            self._log(run_id, params=missing)

    def _log(self, run_id: str, **what: Any) -> None:
        """Sends a batch, and returns when the store has it: the environment may ask MLflow to send it later, from a thread that
        tells nobody what was refused."""
        self.client.log_batch(run_id, synchronous=True, **what)

    def _set_tag(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value, synchronous=True)

    def _send_metrics(self) -> None:
        """Sends the epochs that were recorded since the last call. The first call sends each run what it lacks."""
        from mlflow.entities import Metric

        unsent: dict[int, list[Any]] = {}
        for line in self.metrics.read():
            number = line["trial"]
            if number not in self.ledger.records:
                continue
            values = {"val/objective": line["objective"], **line["metrics"]}
            at = int(line["time"] * 1000)
            unsent.setdefault(number, []).extend(Metric(k, v, at, line["epoch"]) for k, v in values.items())
            if are_latest(self.latest.get(self.runs.get(number, ""), {}), values):  # and so all that was sent before it
                del unsent[number]
        self.latest = {self.parent: self.latest.get(self.parent, {})}
        for number, metrics in unsent.items():
            if number not in self.runs:
                self._create(self.ledger.records[number])
            self._log_metrics(self.runs[number], metrics)

    def _log_metrics(self, run_id: str, metrics: list[Any]) -> None:
        """Sends metrics in the order of their epochs, so that a run that holds one holds all before it."""
        for start in range(0, len(metrics), BATCH):
            self._log(run_id, metrics=metrics[start : start + BATCH])

    def _terminate(self, record: Record) -> None:
        from mlflow.entities import RunTag

        run_id = self.runs[record.number]
        summary = record.summary
        tags = {"state": record.status, "epochs": summary["epochs"]}
        if "error" in summary:
            tags["error"] = summary["error"][-TAG_LIMIT:]
        self._log(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        self.client.set_terminated(run_id, STATUS[record.state], end_time=int(record.ended_at * 1000))
        self.status[run_id] = STATUS[record.state]

    def _set_status(self, run_id: str, status: str) -> None:
        if self.status[run_id] != status:
            self.client.update_run(run_id, status=status)
            self.status[run_id] = status

    def _update_parent(self, finished: list[Record]) -> None:
        """Sends the best value so far and what became of the trials, in the order in which they ended, and now and then the
        table."""
        from mlflow.entities import Metric

        if len(finished) == self.num_finished:
            return
        curve = self._curve(finished)
        if self.num_finished is None:
            self.num_finished = num_sent(self.latest.get(self.parent, {}), curve)
        new = enumerate(zip(finished, curve, strict=True), 1)
        metrics = [
            Metric(name, value, int(record.ended_at * 1000), step)
            for step, (record, values) in new
            if step > self.num_finished
            for name, value in values.items()
        ]
        self._log_metrics(self.parent, metrics)
        self.num_finished = len(finished)
        if metrics and time.monotonic() - self.table_written_at > TABLE_PAUSE:
            self._write_table()

    def _curve(self, finished: list[Record]) -> list[dict[str, float]]:
        """The values of the parent's metrics after each trial that has ended."""
        best, counts, curve = -1.0, dict.fromkeys(STATUS, 0), []
        for record, cost in zip(finished, cost_metrics(finished, self.sweep.spec.epochs), strict=True):
            counts[record.state] += 1
            if record.state is TrialState.COMPLETE and record.value is not None:
                best = max(best, record.value)
            values: dict[str, float] = {count_name(state): count for state, count in counts.items()}
            curve.append(values | cost | ({"val/objective": best} if best >= 0 else {}))
        return curve

    def _write_table(self) -> None:
        self.table_written_at = time.monotonic()
        top = rows(self.ledger, self.runs, self.ledger.leaderboard()[:5])
        self._set_tag(self.parent, "mlflow.note.content", f"{markdown_table(top)}\n\n{cost_text(self.ledger)}.")
        best = self.ledger.best()
        if best:
            self._set_tag(self.parent, "best_run_id", self.runs[best.number])
            self._set_tag(self.parent, "best_params", json.dumps({"method": best.method, **best.values}))

    def close(self, *, finished: bool) -> None:
        """Writes the artifacts of the parent and leaves no run RUNNING.

        ``finished`` says that the budget is used up. Otherwise the sweep and unfinished trials are SCHEDULED until a resume.
        """
        self.sync()
        for record in self.ledger.unfinished():
            self._set_status(self.runs[record.number], "SCHEDULED")
        if finished:
            self.client.set_terminated(self.parent, "FINISHED")
        else:
            self.client.update_run(self.parent, status="SCHEDULED")
        self._delete_duplicates()
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

    def _delete_duplicates(self) -> None:
        """Deletes runs that were made by a call whose answer did not come: they would be RUNNING for ever."""
        own = {self.parent, *self.runs.values()}
        for role in ("sweep", "trial"):
            for run in self.stored.search(role, condition=" and attributes.status = 'RUNNING'"):
                if run.info.run_id not in own and is_empty(run):
                    self.client.delete_run(run.info.run_id)


def load() -> None:
    """Imports MLflow, which takes seconds, and many on a slow disk."""
    quiet()
    importlib.import_module("mlflow.tracking")


def count_name(state: TrialState) -> str:
    """The name of the metric that counts trials which ended so."""
    return f"trials/{state.name.lower()}"


def are_latest(latest: Mapping[str, float], values: Mapping[str, float]) -> bool:
    """Whether a run's latest values are these, which include seconds and a loss to the last digit."""
    return all(
        latest.get(name) == value or (value != value and math.isnan(latest.get(name, 0.0))) for name, value in values.items()
    )


def num_sent(latest: Mapping[str, float], curve: list[dict[str, float]]) -> int:
    """The step up to which the parent holds its curve: the counts of trials add up to it."""
    step = int(sum(latest.get(count_name(state), 0.0) for state in STATUS))
    return step if 0 < step <= len(curve) and are_latest(latest, curve[step - 1]) else 0


def run_name(record: Record) -> str:
    """Number, method and its key parameters, the method's own ones first, for a person to read."""
    names = sorted((name for name in record.params if name != "method"), key=lambda name: "." not in name)
    words = [f"{name.split('.')[-1]}={short(record.params[name])}" for name in names]
    return " ".join([f"{record.number:03d}", record.method, *words[:4]])
