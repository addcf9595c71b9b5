"""What is said of a sweep when it ends."""

from __future__ import annotations

from optuna.trial import TrialState

from tune.search.budget import CONFIGURATIONS
from tune.search.ledger import Ledger


def closing_words(ledger: Ledger, command: str, idle: bool) -> list[str]:
    """The lines below the table of a sweep whose budget is spent. ``idle`` says that it was spent before this command."""
    lines = [] if ledger.best() else ["no trial is complete: every one was stopped, diverged or failed"]
    over = [budget for budget in ledger.budgets() if budget.over]
    if idle or any(budget.name != "trials" for budget in over):
        lead = "nothing was left to do" if idle else "the budget is spent"
        if any(budget.name == CONFIGURATIONS for budget in over):
            more = f"wider ranges in a sweep of its own: launch NAME --from {ledger.sweep.name} --range ..."
        else:
            more = " ".join([command, *(f"{budget.flag} N" for budget in over)])
        lines.append(f"{lead}: {', '.join(map(str, over))}; for more: {more}")
    return lines


def num_missing(ledger: Ledger) -> int:
    """How many pairs of a configuration and a seed failed and have no other run that ended well."""
    pairs: dict[TrialState, set[tuple[int, int]]] = {state: set() for state in TrialState}
    for record in ledger.records.values():
        pairs[record.state].add((record.attrs["source"], record.attrs["seed"]))
    return len(pairs[TrialState.FAIL] - pairs[TrialState.COMPLETE] - pairs[TrialState.PRUNED])
