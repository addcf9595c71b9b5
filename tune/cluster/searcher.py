"""Ray Tune's searcher door to the coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from tune.search.coordinator import FINISHED, Coordinator


class LedgerSearcher(Searcher):
    """Hands out trials that lost their process first, then asks Optuna; tells the study how a trial ended.

    Tune's own trial ids last as long as one process of a trial; the ledger's numbers are what a user sees. ``on_suggest`` is
    called before each proposal, many times a second.
    """

    def __init__(self, coordinator: Coordinator, on_suggest: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.coordinator = coordinator
        self.on_suggest = on_suggest

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher into its folder; nothing of ours belongs there

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        self.on_suggest()
        proposal = self.coordinator.next(trial_id)
        if proposal is None:
            return None
        if proposal == FINISHED:
            return Searcher.FINISHED
        return {"trial": json.dumps(self.coordinator.config(proposal))}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.coordinator.released(trial_id)  # of one that lost its process the coordinator has heard from the scheduler

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""
