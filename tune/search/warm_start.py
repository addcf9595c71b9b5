"""The best configurations of an earlier sweep, which a new one runs before anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from optuna.trial import TrialState

from errors import UserError
from hparams import Value
from tune.search.ledger import Ledger, Record
from tune.search.space import Space
from tune.spec import SweepSpec
from tune.store.base import NAME, RECORD, SweepStore
from tune.store.folder import FolderStore
from tune.store.locate import as_store
from tune.store.stored_sweep import Sweep

NUM_TAKEN = 5  # complete trials of the earlier sweep that are looked at


class WarmStart(NamedTuple):
    """Parameters for the new sweep, best first, what the user is told of them, and what ``sweep.yaml`` notes."""

    params: list[dict[str, Value]]
    lines: list[str]
    provenance: dict[str, Any]


def warm_start(old: str, store: Path | SweepStore, spec: SweepSpec, space: Space, num_classes: int = 10) -> WarmStart:
    """What a sweep of ``spec`` on that many classes takes over from ``old``, a sweep in the same storage or the path of one's
    folder. UserError where there is none, or it has no complete trial."""
    sweep = _find(old, as_store(store))
    ledger = Ledger(sweep, read_only=True)
    best = [record for record in ledger.leaderboard() if record.state is TrialState.COMPLETE][:NUM_TAKEN]
    if not best:
        raise UserError(f"--from: sweep {old!r} has no complete trial to start from")
    configurations: dict[int, dict[str, Value]] = {}
    lines = []
    for record in best:
        params, misfit = _translated(record, ledger.space, space, spec, num_classes)
        same = next((number for number, others in configurations.items() if others == params), None)
        if misfit or same is not None:
            lines.append(
                f"trial {record.number} of {sweep.name} is left out: {misfit or f'it is the same here as trial {same}'}"
            )
        else:
            configurations[record.number] = params
    numbers = f" (trials {', '.join(map(str, configurations))})" if configurations else ""
    lines.append(f"from {sweep.name}: {len(configurations)} of its best {len(best)} configurations run first{numbers}")
    origin = {"sweep": sweep.name, "id": sweep.provenance["id"], "trials": list(configurations)}
    return WarmStart(list(configurations.values()), lines, {"from": origin})


def _find(old: str, store: SweepStore) -> Sweep:
    if NAME.fullmatch(old) and old in store.names():
        return Sweep.find(store, old)
    folder = Path(old).resolve()
    if (folder / RECORD).is_file():
        return Sweep.find(FolderStore(folder.parent), folder.name)
    known = ", ".join(store.names()) or "none"
    raise UserError(f"--from: {old!r} is no sweep in {store.display_name} and no folder of one; there are: {known}")


def _translated(record: Record, old: Space, new: Space, spec: SweepSpec, num_classes: int) -> tuple[dict[str, Value], str]:
    """A trial's configuration in the new space, where what the old one did not search is at its default; or why it has no
    place there."""
    if record.method not in new.methods:
        return {}, f"{record.method} is not searched"
    searched = {parameter.field for parameter in old.parameters[record.method] if parameter.range}
    params, _ = new.defaults(record.method, spec, num_classes)
    for parameter in new.parameters[record.method]:
        field, search_range = parameter.field, parameter.range
        value = record.values[field]
        if field not in searched:
            continue
        if search_range is None and value != parameter.fixed:
            return {}, f"its {field} {value} is not the {parameter.fixed} that is fixed here"
        if search_range is not None and search_range.nearest(value) != value:
            return {}, f"its {field} {value} is outside {search_range}"
        if search_range is not None:
            params[parameter.name] = value
    return params, ""
