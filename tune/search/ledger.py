"""The sweep's durable record: an Optuna study, what hangs on its trials, and every epoch's metrics beside it.

Order of writing: an epoch's metrics first, then its value in the study; at a trial's end its summary first, then its state. A
trial is finished when its state says so, so whatever a kill cuts off is either done again or done already, never half done.
A trial that lost its process stays RUNNING and is handed out again under its own number.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from data.seeds import derive
from errors import UserError
from hparams import Value
from training.epoch_record import EpochRecord
from tune.search.budget import CONFIGURATIONS, HOUR, Account, Budget
from tune.search.record import Record as Record
from tune.search.record import rank, speaks_for_itself
from tune.search.sampler import Distinct, GroupedTPE
from tune.search.space import Space
from tune.spec import MAX_LOST
from tune.store.journal import DamagedFile, Journal, Lines, open_storage
from tune.store.stored_sweep import Sweep
from tune.store.studies import RETRAIN as RETRAIN
from tune.store.studies import SWEEP as SWEEP
from tune.store.studies import other_studies, study_name

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Ledger:
    """The only writer of a study while a sweep runs. ``kind`` is the sweep itself or its retraining, in the same journal.

    ``read_only`` looks at it, while another process may be writing, and changes nothing. ``space`` is the sweep's, where the
    caller has resolved it already. Raises UserError where a file is damaged or the study is missing.
    """

    def __init__(
        self, sweep: Sweep, kind: str = SWEEP, *, space: Space | None = None, create: bool = False, read_only: bool = False
    ) -> None:
        self.sweep = sweep
        self.kind = kind
        self.read_only = read_only
        self._space = space
        self.checkpoints = (sweep.folder if kind == SWEEP else sweep.folder / kind) / "checkpoints"
        self.metrics = self.lines("metrics.jsonl")
        self.records: dict[int, Record] = {}
        self.account = Account()
        self.taken: set[int] = set()  # configurations that have begun, by their numbers, where the space holds a number of them
        self.states: Counter[TrialState] = Counter()
        self._ranked: list[Record] = []  # finished trials, best first
        self.lock = threading.RLock()  # the tracker reads from its own thread
        self.journal = Journal(sweep.files.lines("journal.log"))
        self.storage = storage = open_storage(self.journal)
        names = {kind: name for kind in (SWEEP, RETRAIN) if (name := study_name(storage, kind))}
        self.kinds = set(names)  # that the journal holds
        if create and kind not in names:
            storage.create_new_study([StudyDirection.MAXIMIZE], study_name=kind)
        elif kind not in names:
            raise UserError(f"sweep {sweep.name!r} has no study named {kind!r}; {other_studies(storage)}")
        self._unused = optuna.samplers.RandomSampler()  # between proposals: creating a trial then costs no proposal
        self.study = optuna.load_study(study_name=names.get(kind, kind), storage=storage, sampler=self._unused)
        self._storage_ids: dict[int, int] = {}  # the storage's, by the numbers of trials that are not finished
        self._read()

    @property
    def space(self) -> Space:
        """The space of the sweep's methods. Resolving it imports them, and torch, which the leaderboard does without."""
        if self._space is None:
            self._space = Space(self.sweep.spec)
        return self._space

    def lines(self, name: str, *, fsync: bool = True) -> Lines:
        """An append-only file beside the study, from its beginning."""
        return self.sweep.files.lines(name if self.kind == SWEEP else f"{self.kind}/{name}", fsync=fsync)

    def _sampler(self, trial: optuna.trial.FrozenTrial) -> optuna.samplers.BaseSampler:
        """A sampler whose random numbers belong to one trial (to the rest of its proposal, where a kill cut that off), so that
        a resumed search neither repeats itself nor differs from one that was never interrupted."""
        seed = derive("sampler", self.sweep.spec.seed, trial.number, len(trial.params)) % 2**32
        random = self.sweep.spec.sampler == "random"
        sampler = optuna.samplers.RandomSampler(seed=seed) if random else GroupedTPE(self.space, seed)
        return sampler if self.size is None else Distinct(sampler, self.space, self.taken, seed)

    def _read(self) -> None:
        """Builds the records from the study, and puts into the study what a kill left in the metrics alone."""
        trials = self.study.get_trials(deepcopy=False)
        self.num_stored = len(trials)  # those in the queue, too
        self._first_ends: dict[str, datetime] = {}  # when the first trial ended that has a parameter of that name
        for trial in trials:
            if ended := trial.datetime_complete:
                for name in trial.params:
                    self._first_ends[name] = min(ended, self._first_ends.get(name, ended))
        self._speaks_for_itself = self.read_only and speaks_for_itself(trials, self.sweep.spec.method)
        self.size = None if self._speaks_for_itself else self.space.size  # configurations of the space; None: no end of them
        for trial in trials:
            if trial.state is not TrialState.WAITING:
                self._adopt(trial)
        for line in self.metrics.read():
            try:
                epoch = EpochRecord(line["epoch"], float(line["time"]), float(line["objective"]), dict(line["metrics"]))
                record, _ = self.records.get(line["trial"]), float(epoch.metrics["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                place = f"{self.metrics.display_name}: line {self.metrics.line}"
                raise DamagedFile(f"{place} is damaged; the file was left as it is") from error
            if record is None:
                continue
            if epoch.epoch not in record.objectives and not record.finished and not self.read_only:
                self._set_objectives(record, [epoch])
            self._note(record, epoch)

    def _adopt(self, trial: optuna.trial.FrozenTrial) -> Record:
        """A record for a stored trial; one whose proposal was cut off gets the rest of its parameters."""
        if trial.state is TrialState.RUNNING and not self.read_only and not self.space.is_whole(trial.params):
            try:
                self.study.sampler = self._sampler(trial)
                self.space.suggest(optuna.Trial(self.study, self._storage_id(trial.number)))
                self.study.sampler = self._unused
            except ValueError as error:
                raise self._damaged(trial) from error
            trial = self.storage.get_trial(self._storage_id(trial.number))
        started = trial.datetime_start or trial.datetime_complete
        assert started is not None
        record = Record(
            trial.number,
            trial.state,
            str(trial.params.get("method", self.sweep.spec.method[0])),
            lambda: self._values(trial),
            dict(trial.params),
            dict(trial.user_attrs),
            dict(trial.intermediate_values),
            epochs=max(trial.intermediate_values, default=0),
            started=started.timestamp(),
            ended_at=trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0,
        )
        if not self._speaks_for_itself and (values := record.values) and self.size is not None:
            number = self.space.number(record.method, values)
            self.taken |= set() if number is None else {number}
        with self.lock:
            self.records[record.number] = record
            self.states[record.state] += 1
            if record.finished:
                bisect.insort(self._ranked, record, key=rank)
        return record

    def _values(self, trial: optuna.trial.FrozenTrial) -> dict[str, Value]:
        """All fields of a trial's Config; none while its proposal is being written. DamagedFile where it lacks some."""
        ended = trial.datetime_complete  # a parameter that only later trials have is newer than this one
        names = {name for name, first in self._first_ends.items() if first < ended} if ended else None
        try:
            return self.space.read(trial.params, names)[1]
        except ValueError as error:
            if trial.state.is_finished() or not self.read_only:
                raise self._damaged(trial) from error
            return {}

    def _damaged(self, trial: optuna.trial.FrozenTrial) -> DamagedFile:
        what = f"what it says of trial {trial.number} is damaged; the file was left as it is"
        return DamagedFile(f"{self.journal.lines.display_name}: {what}")

    def _storage_id(self, number: int) -> int:
        """The storage's own number of a trial, which its methods want."""
        if number not in self._storage_ids:
            study_id = self.storage.get_study_id_from_name(self.study.study_name)
            self._storage_ids[number] = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._storage_ids[number]

    # -- proposing ----------------------------------------------------------------------------------------------------

    def enqueue(self, params: dict[str, Value], attrs: dict[str, Any] | None = None) -> None:
        """Makes ``params`` one of the next trials."""
        self.study.enqueue_trial(params, user_attrs=attrs)
        self.num_stored += 1

    def ask(self) -> Record:
        """The next trial: an enqueued one first, else the sampler's proposal."""
        return self._adopt(self.storage.get_trial(self._storage_id(self.study.ask().number)))

    def count(self, *states: TrialState) -> int:
        return sum(self.states[state] for state in states)

    @property
    def total(self) -> int:
        """How many trials were asked for."""
        return self.sweep.spec.trials if self.kind == SWEEP else self.num_stored

    def num_counted(self) -> int:
        """Trials that count towards the total: in a sweep a failed one is made up for, in a retraining it is not."""
        states = [TrialState.COMPLETE, TrialState.PRUNED]
        return self.count(*states, *([] if self.kind == SWEEP else [TrialState.FAIL]))

    def budgets(self, total: int | None = None, live: int = 0, clock: float = 0.0) -> list[Budget]:
        """What limits the study, and how much of each is spent; the first that is over ends it. A driver that runs counts its
        ``live`` trials, which may yet end well, and the seconds that its ``clock`` says are spent where that is more."""
        trials = Budget("trials", self.num_counted() + live, self.total if total is None else total)
        if self.kind != SWEEP:
            return [trials]
        spec, usage = self.sweep.spec, self.account.usage
        hours, gpu_hours = max(usage.seconds, clock) / HOUR, usage.gpu_seconds / HOUR
        budgets = [trials, Budget("hours", hours, spec.hours), Budget("gpu_hours", gpu_hours, spec.gpu_hours)]
        if self.size is not None and self.size < trials.limit + self.count(TrialState.FAIL):  # the rest cannot count
            budgets.append(Budget(CONFIGURATIONS, len(self.taken), self.size))
        return budgets

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to run."""
        return any(budget.over for budget in self.budgets()) and not self.unfinished()

    def unfinished(self) -> list[Record]:
        return [record for record in self.records.values() if not record.finished]

    def seed(self, record: Record) -> int:
        """Initialisation and order of a trial: from (sweep seed, trial number), or what retraining asked for."""
        retrain_seed = record.attrs.get("seed")
        return derive("trial", self.sweep.spec.seed, record.number if retrain_seed is None else f"retrain-{retrain_seed}")

    # -- recording ----------------------------------------------------------------------------------------------------

    def report(self, record: Record, epochs: Iterable[EpochRecord]) -> list[EpochRecord]:
        """Writes the epochs that the ledger lacks, metrics first, and returns them. OSError where the disk takes nothing."""
        new = [epoch for epoch in epochs if epoch.epoch not in record.objectives]
        if new:
            self.metrics.append([{"trial": record.number, **dataclasses.asdict(epoch)} for epoch in new])
            self._set_objectives(record, new)
        for epoch in new:
            self._note(record, epoch)
        return new

    def _set_objectives(self, record: Record, epochs: list[EpochRecord]) -> None:
        with self.journal.at_once():
            for epoch in epochs:
                self.storage.set_trial_intermediate_value(self._storage_id(record.number), epoch.epoch, epoch.objective)
        for epoch in epochs:
            record.objectives[epoch.epoch] = epoch.objective
            record.epochs = max(record.epochs, epoch.epoch)

    def _note(self, record: Record, epoch: EpochRecord) -> None:
        record.usage = self.account.add(epoch)
        record.arrived[epoch.epoch] = record.usage.epochs
        record.metrics.update(epoch.metrics)
        record.seconds += epoch.metrics["seconds"]
        record.gpu_seconds += epoch.metrics.get("gpu_seconds", 0.0)

    def complete(self, record: Record) -> None:
        assert record.value is not None
        self._tell(record, TrialState.COMPLETE, values=[record.value])

    def prune(self, record: Record, *, diverged: bool = False) -> None:
        """Stopped early at its last epoch; ``diverged`` where that was because its numbers were no longer finite."""
        self._tell(record, TrialState.PRUNED, diverged=diverged)

    def fail(self, record: Record, error: str) -> None:
        """Failed for good, with the traceback or the reason."""
        self._tell(record, TrialState.FAIL, error=error)

    def _tell(self, record: Record, state: TrialState, values: list[float] | None = None, **attrs: Any) -> None:
        summary = {
            "epochs": record.epochs,
            "seconds": record.seconds,
            "test_accuracy": record.metrics.get("test/accuracy"),
            **{name: value for name, value in attrs.items() if value},
        }
        self._set_attr(record, "summary", summary)
        storage_id = self._storage_id(record.number)
        trial = optuna.Trial(self.study, storage_id)  # by its number Optuna would look through all of them
        self.study.tell(trial, values=values, state=state)
        ended = self.storage.get_trial(storage_id).datetime_complete
        assert ended is not None
        with self.lock:
            self.states[record.state] -= 1
            self.states[state] += 1
            record.state, record.ended_at = state, ended.timestamp()
            bisect.insort(self._ranked, record, key=rank)

    def lost(self, record: Record) -> bool:
        """Counts a lost process; from 1 again where the trial got ahead since the last one, as one does that is preempted now
        and then. Returns whether it may run again; otherwise it has failed."""
        count, epochs = record.attrs.get("lost", (0, 0))
        count = count + 1 if record.epochs == epochs else 1
        self._set_attr(record, "lost", [count, record.epochs])
        if count < MAX_LOST:
            return True
        details, _, why = record.lost_because.rpartition("\n")
        error = f"lost its process {count} times in a row; the last epoch reported was {record.epochs}"
        self.fail(record, "\n".join(filter(None, [details, f"{error}; the last time {why}" if why else error])))
        return False

    def _set_attr(self, record: Record, key: str, value: Any) -> None:
        if record.attrs.get(key) == value:
            return  # from before a kill; a driver that is killed after every single write gets ahead all the same
        self.storage.set_trial_user_attr(self._storage_id(record.number), key, value)
        record.attrs[key] = value

    # -- reading ------------------------------------------------------------------------------------------------------

    def leaderboard(self) -> list[Record]:
        """Best first: complete trials by value, then those stopped early by (epoch, value), then running, then failed."""
        with self.lock:
            good = self.count(TrialState.COMPLETE, TrialState.PRUNED)
            return [*self._ranked[:good], *sorted(self.unfinished(), key=rank), *self._ranked[good:]]

    def best(self) -> Record | None:
        """The best complete trial; None before the first."""
        first = next(iter(self._ranked), None)
        return first if first and first.state is TrialState.COMPLETE else None
