"""MLflow as a projection of the ledger: everything in it can be rebuilt from the study and ``metrics.jsonl``.

One parent run per study, one child per trial, found again by their tags before one is created; what was deleted in MLflow and
can be restored is restored. Metrics are sent in batches, at least once, with the times at which they were recorded: MLflow
keeps the same key, step, time and value as one row, so sending twice changes nothing. How far the sending got is read off each
run's latest values, so that a run that lacks something, for whatever reason, gets it at the next start. ``tracker.jsonl`` notes
which run is which trial's.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from tune.report.leaderboard import NOTES, cost_metrics, cost_text, markdown_table, noted_runs, plots_page, rows, short
from tune.report.mlflow_database import follow_run, follow_storage, is_own, prepare
from tune.report.tracking import artifacts_uri, quiet, sqlite_path
from tune.search.ledger import SWEEP, Ledger, Record
from tune.search.recipes import best_config_text
from tune.store.base import NOISE

STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
}
Waiting = Callable[[], AbstractContextManager[None]]
PARENT = "mlflow.parentRunId"  # the tag by which MLflow's pages put a run below another
BATCH = 1000  # metrics in one request
TAG_LIMIT = 5000  # characters of a traceback that are kept in a tag
NOTE_PAUSE = 15.0  # seconds between two rewritings of the parent's table


class TimedClient:
    """An MLflow client that makes every call inside ``waiting()``, by which the tracker knows how long it has taken."""

    def __init__(self, client: Any, waiting: Waiting) -> None:
        self._client = client
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self._waiting():
                return call(*arguments, **options)

        return timed


class Projection:
    """Brings an MLflow store up to the ledger, from wherever it is. Any of its calls may raise what MLflow raises; a new
    projection then goes on from what the store holds. ``say`` is told what was restored or mended."""

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
        self.experiment_id = self._experiment()
        notes = list(self.notes.read())
        self.noted = {note[role] for note in notes for role in ("parent", "run") if role in note}
        self.last_parent = next((note["parent"] for note in reversed(notes) if "parent" in note), None)
        self.latest: dict[str, Mapping[str, float]] = {}  # run id -> the latest values that it held when it was found
        self.num_restored = 0
        self.parent = self._parent()
        self.runs: dict[int, str] = {}  # trial number -> run id, once its parameters are there
        self.status: dict[str, str] = {}  # run id -> status in the store
        self.num_finished: int | None = None  # finished trials that the parent's curve holds, once that was looked at
        self.noted_at = 0.0
        self._find_runs()
        if self.num_restored:
            runs = "1 run" if self.num_restored == 1 else f"{self.num_restored} runs"
            self.say(
                f"{runs} of {self.sweep.name!r} had been deleted in MLflow and {'is' if runs == '1 run' else 'are'} restored"
            )

    # -- finding what is there ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """A database file is made or mended first, and told where the storage lies now."""
        path, storage = sqlite_path(self.uri), self.sweep.storage
        if path:
            prepare(path, self.say)
        if isinstance(storage, Path) and is_own(self.uri, storage):
            follow_storage(storage)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.sweep.name)
        if found:
            if found.lifecycle_stage == "deleted":
                self._restore_experiment(str(found.experiment_id))
            return str(found.experiment_id)
        location = artifacts_uri(self.uri, self.sweep.storage, self.sweep.name)
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the pages for training runs, not those for chats
        return str(self.client.create_experiment(self.sweep.name, artifact_location=location, tags=tags))

    def _restore_experiment(self, experiment_id: str) -> None:
        """MLflow keeps a deleted experiment's name, and restores all runs with it; those of others are deleted again."""
        others = [run for run in self._pages(experiment_id, "", deleted=True) if not self._is_ours(run)]
        self.client.restore_experiment(experiment_id)
        for run in others:
            self.client.delete_run(run.info.run_id)
        rest = f"; {len(others)} other runs in it stay deleted" if others else ""
        self.say(f"MLflow's experiment {self.sweep.name!r} had been deleted and is restored{rest}")

    def _is_ours(self, run: Any) -> bool:
        return bool(run.data.tags.get("sweep_id") == self.sweep.provenance["id"])

    def _tags(self, role: str) -> dict[str, str]:
        return {"sweep": self.sweep.name, "sweep_id": self.sweep.provenance["id"], "study": self.ledger.kind, "role": role}

    def _pages(self, experiment_id: str, wanted: str, *, deleted: bool) -> list[Any]:
        """The runs that a filter finds, the deleted ones too if asked for."""
        from mlflow.entities import ViewType

        view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([experiment_id], wanted, run_view_type=view, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _search(self, role: str, also: str = "", *, deleted: bool = False) -> list[Any]:
        wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in self._tags(role).items()) + also
        return self._pages(self.experiment_id, wanted, deleted=deleted)

    def _choose(self, runs: Iterable[Any], params: Mapping[str, Any], last: str | None = None) -> Any | None:
        """The one run that goes on, of those with the same tags: an active one before a deleted one, then ``last``, the one
        that was noted last, then any that was noted, then one that holds something. A deleted one is restored.

        Of the rest what is active goes if it was noted, or holds nothing: it was made by a call whose answer did not come, or
        was replaced. One that was not noted and holds something belongs to a copy of the sweep on the same server, surely so
        where its parameters are others.
        """

        def order(run: Any) -> tuple[bool, ...]:
            run_id = run.info.run_id
            return is_deleted(run), run_id != last, run_id not in self.noted, is_empty(run)

        candidates = sorted((run for run in runs if self._may_be(run, params)), key=order)
        for run in candidates[1:]:
            if not is_deleted(run) and (is_empty(run) or run.info.run_id in self.noted):
                self.client.delete_run(run.info.run_id)
        chosen = candidates[0] if candidates else None
        if chosen and is_deleted(chosen):
            self.client.restore_run(chosen.info.run_id)
            self.num_restored += 1
        return chosen

    def _may_be(self, run: Any, params: Mapping[str, Any]) -> bool:
        if is_deleted(run) and is_empty(run):
            return False
        known = run.data.params
        return run.info.run_id in self.noted or all(known.get(key, str(value)) == str(value) for key, value in params.items())

    def _parent(self) -> str:
        found = self._choose(self._search("sweep", deleted=True), {}, self.last_parent)
        if found:
            run_id, known, place = str(found.info.run_id), found.data.params, str(found.info.artifact_uri)
            self.latest[run_id] = found.data.metrics
            self.client.update_run(run_id, status="RUNNING")
        else:
            name = self.sweep.name if self.ledger.kind == SWEEP else f"{self.sweep.name} {self.ledger.kind}"
            started = int(self.sweep.provenance["created"] * 1000)
            run = self.client.create_run(self.experiment_id, start_time=started, tags=self._tags("sweep"), run_name=name)
            run_id, known, place = str(run.info.run_id), {}, str(run.info.artifact_uri)
        self._follow(run_id, place)
        spec = {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in self._record().items()}
        self._send_params(run_id, spec, known)
        if run_id not in self.noted:
            self.notes.append([{"parent": run_id}])
        return run_id

    def _follow(self, run_id: str, place: str) -> None:
        """The parent's artifacts go to where the storage is now, in a database of its own as well."""
        location = artifacts_uri(self.uri, self.sweep.storage, self.sweep.name)
        if location and not place.startswith(f"{location}/"):
            follow_run(self.uri, run_id, location)

    def _record(self) -> dict[str, Any]:
        return {**self.sweep.spec.to_dict(), **{f"made_with.{k}": v for k, v in self.sweep.provenance.items()}}

    def _find_runs(self) -> None:
        """Runs that an earlier process made; what it did not get to, their parameters or a note of them, is made up for."""
        last = noted_runs(self.ledger)  # those of another store, where the sweep was tracked to one in between
        found: dict[int, list[Any]] = {}
        for run in self._search("trial", deleted=True):
            found.setdefault(int(run.data.tags["trial"]), []).append(run)
        for number, runs in found.items():
            record = self.ledger.records.get(number)
            run = self._choose(runs, self._params(record), last.get(number)) if record else None
            if record and run:
                self._take_over(record, run)
        lacking = [{"trial": number, "run": run} for number, run in self.runs.items() if last.get(number) != run]
        if lacking:
            self.notes.append(lacking)

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
        self._update_parent(sorted(ended, key=lambda record: record.ended_at))

    def _create(self, record: Record) -> None:
        tags = self._tags("trial") | {"trial": str(record.number), "method": record.method, PARENT: self.parent}
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
            self._log(run_id, params=missing)

    def _log(self, run_id: str, **what: Any) -> None:
        """Sends a batch, and returns when the store has it: the environment may ask MLflow to send it later, from a thread that
        tells nobody what was refused."""
        self.client.log_batch(run_id, synchronous=True, **what)

    def _set_tag(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value, synchronous=True)

    def _send_metrics(self) -> None:
        """Sends the epochs that were recorded since the last call; at the first one, of each run those that it lacks."""
        from mlflow.entities import Metric

        waiting: dict[int, list[Any]] = {}
        for line in self.metrics.read():
            number = line["trial"]
            if number not in self.ledger.records:
                continue
            values = {"val/objective": line["objective"], **line["metrics"]}
            at = int(line["time"] * 1000)
            waiting.setdefault(number, []).extend(Metric(k, v, at, line["epoch"]) for k, v in values.items())
            if holds(self.latest.get(self.runs.get(number, ""), {}), values):  # and so all that was sent before it
                del waiting[number]
        self.latest = {self.parent: self.latest.get(self.parent, {})}
        for number, metrics in waiting.items():
            if number not in self.runs:
                self._create(self.ledger.records[number])
            self._log_metrics(self.runs[number], metrics)

    def _log_metrics(self, run_id: str, metrics: list[Any]) -> None:
        """In the order of their epochs, so that a run that holds one holds all before it."""
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

    def _update_parent(self, ended: list[Record]) -> None:
        """The best value so far and what became of the trials, in the order in which they ended; now and then the table."""
        from mlflow.entities import Metric

        if len(ended) == self.num_finished:
            return
        curve = self._curve(ended)
        if self.num_finished is None:
            self.num_finished = num_held(self.latest.get(self.parent, {}), curve)
        new = enumerate(zip(ended, curve, strict=True), 1)
        metrics = [
            Metric(name, value, int(record.ended_at * 1000), step)
            for step, (record, values) in new
            if step > self.num_finished
            for name, value in values.items()
        ]
        self._log_metrics(self.parent, metrics)
        self.num_finished = len(ended)
        if metrics and time.monotonic() - self.noted_at > NOTE_PAUSE:
            self._write_table()

    def _curve(self, ended: list[Record]) -> list[dict[str, float]]:
        """What the parent shows after each trial that has ended."""
        best, counts, curve = -1.0, dict.fromkeys(STATUS, 0), []
        for record, cost in zip(ended, cost_metrics(ended, self.sweep.spec.epochs), strict=True):
            counts[record.state] += 1
            if record.state is TrialState.COMPLETE and record.value is not None:
                best = max(best, record.value)
            values: dict[str, float] = {counted(state): count for state, count in counts.items()}
            curve.append(values | cost | ({"val/objective": best} if best >= 0 else {}))
        return curve

    def _write_table(self) -> None:
        self.noted_at = time.monotonic()
        top = rows(self.ledger, self.runs, self.ledger.leaderboard()[:5])
        self._set_tag(self.parent, "mlflow.note.content", f"{markdown_table(top)}\n\n{cost_text(self.ledger)}.")
        best = self.ledger.best()
        if best:
            self._set_tag(self.parent, "best_run_id", self.runs[best.number])
            self._set_tag(self.parent, "best_params", json.dumps({"method": best.method, **best.values}))

    def close(self, *, finished: bool) -> None:
        """The last word: artifacts on the parent, and no run left RUNNING. ``finished``: the budget is used up; otherwise the
        sweep and its unfinished trials wait (SCHEDULED) for a resume."""
        self.sync()
        for record in self.ledger.unfinished():
            self._set_status(self.runs[record.number], "SCHEDULED")
        if finished:
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


def load() -> None:
    """Imports MLflow, which takes seconds, and on a slow disk many."""
    quiet()
    importlib.import_module("mlflow.tracking")


def counted(state: TrialState) -> str:
    """The name of the metric that counts trials which ended so."""
    return f"trials/{state.name.lower()}"


def holds(latest: Mapping[str, float], values: Mapping[str, float]) -> bool:
    """Whether a run's latest values are these, which include seconds and a loss to the last digit."""
    return all(
        latest.get(name) == value or (value != value and math.isnan(latest.get(name, 0.0))) for name, value in values.items()
    )


def num_held(latest: Mapping[str, float], curve: list[dict[str, float]]) -> int:
    """Up to which step the parent holds its curve: the counts of trials add up to it."""
    step = int(sum(latest.get(counted(state), 0.0) for state in STATUS))
    return step if 0 < step <= len(curve) and holds(latest, curve[step - 1]) else 0


def is_deleted(run: Any) -> bool:
    return bool(run.info.lifecycle_stage == "deleted")


def is_empty(run: Any) -> bool:
    """Whether nothing but its tags was ever sent to a run: its parameters come right after it."""
    return not run.data.params


def run_name(record: Record) -> str:
    """Number, method and its key parameters, the method's own ones first, for a person to read."""
    names = sorted((name for name in record.params if name != "method"), key=lambda name: "." not in name)
    words = [f"{name.split('.')[-1]}={short(record.params[name])}" for name in names]
    return " ".join([f"{record.number:03d}", record.method, *words[:4]])
