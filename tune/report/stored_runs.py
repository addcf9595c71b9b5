"""The experiment and the runs that an MLflow store holds of a study. They are found by their tags, and restored if deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from tune.report.tracking import artifacts_uri
from tune.search.ledger import Ledger

Waiting = Callable[[], AbstractContextManager[None]]


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


class StoredRuns:
    """What an MLflow store holds of one study. ``noted`` are the ids of runs that the study's notes name.

    ``say`` is told that an experiment was restored; ``num_restored`` counts the runs that were.
    """

    def __init__(self, client: Any, ledger: Ledger, uri: str, noted: set[str], say: Callable[[str], None]) -> None:
        self.client = client
        self.sweep = ledger.sweep
        self.study = ledger.kind
        self.noted = noted
        self.say = say
        self.num_restored = 0
        self.experiment_id = self._experiment(uri)

    def _experiment(self, uri: str) -> str:
        """The id of the sweep's experiment, which is made where there is none."""
        experiment = self.client.get_experiment_by_name(self.sweep.name)
        if experiment:
            if experiment.lifecycle_stage == "deleted":
                self._restore_experiment(str(experiment.experiment_id))
            return str(experiment.experiment_id)
        location = artifacts_uri(uri, self.sweep.storage, self.sweep.name)
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

    def tags(self, role: str) -> dict[str, str]:
        """What marks a run as this study's: its parent (``sweep``), or one of its trials (``trial``)."""
        return {"sweep": self.sweep.name, "sweep_id": self.sweep.provenance["id"], "study": self.study, "role": role}

    def _pages(self, experiment_id: str, query: str, *, deleted: bool) -> list[Any]:
        """The runs that an MLflow query finds, with the deleted ones if ``deleted``."""
        from mlflow.entities import ViewType

        view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([experiment_id], query, run_view_type=view, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def search(self, role: str, condition: str = "", *, deleted: bool = False) -> list[Any]:
        """The study's runs of a role, of which ``condition``, a further part of MLflow's query, holds."""
        query = " and ".join(f"tags.{key} = '{value}'" for key, value in self.tags(role).items()) + condition
        return self._pages(self.experiment_id, query, deleted=deleted)

    def choose(self, runs: Iterable[Any], params: Mapping[str, Any], last: str | None = None) -> Any | None:
        """Returns the run that goes on, of ``runs`` with the same tags; None where none can be it.

        An active run comes before a deleted one, then ``last``, the one that was noted last, then any that was noted, then one
        that holds something. A deleted one is restored. Of the others, an active run is deleted if it was noted or holds
        nothing: it was replaced, or made by a call whose answer did not come. A run that was not noted and holds something
        belongs to a copy of the sweep on the same server; it certainly does where its parameters are others than ``params``.
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
        stored = run.data.params
        return run.info.run_id in self.noted or all(stored.get(key, str(value)) == str(value) for key, value in params.items())


def is_deleted(run: Any) -> bool:
    return bool(run.info.lifecycle_stage == "deleted")


def is_empty(run: Any) -> bool:
    """Whether nothing but its tags was ever sent to a run: its parameters come right after it."""
    return not run.data.params
