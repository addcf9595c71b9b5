"""The thread that keeps MLflow's projection of a sweep up to date while the sweep runs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tune.report.projection import Projection
from tune.search.ledger import Ledger

PAUSE = 3.0  # seconds between two looks at the ledger: a batch costs the driver less than its parts


class Tracker:
    """Keeps a projection up to date from a thread of its own, so that a slow or absent server never holds up a trial."""

    def __init__(self, ledger: Ledger, uri: str, say: Callable[[str], None] = lambda line: None) -> None:
        self.ledger = ledger
        self.uri = uri
        self.say = say
        self.problem = ""
        self._projection: Projection | None = None
        self._asked_at = math.inf  # when the call was made that has not come back yet
        self._stop = threading.Event()
        self._finished = False
        self._patience = 0.0  # seconds for which a last word that is refused is tried again
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE):
            self._attempt(lambda projection: projection.sync())
        deadline = None
        while not self._attempt(lambda projection: projection.close(finished=self._finished)):
            deadline = deadline or time.monotonic() + self._patience
            if time.monotonic() >= deadline:
                return
            time.sleep(min(1.0, PAUSE))

    def _attempt(self, action: Callable[[Projection], None]) -> bool:
        try:
            if self._projection is None:
                self._projection = Projection(self.ledger, self.uri, self._waiting, self.say)
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

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._asked_at = time.monotonic()
        try:
            yield
        finally:
            self._asked_at = math.inf

    def close(self, *, finished: bool, patience: float = 30.0, within: float = math.inf) -> None:
        """Sends the rest, for as long as the store answers; ``problem`` says what stood in the way, if anything did. It gives
        up when calls have failed for ``patience`` seconds, or one has not come back for as long, or ``within`` are over. What
        takes its time on this side, such as importing MLflow from a slow disk, counts for the last of these only."""
        began = time.monotonic()
        self._finished, self._patience = finished, min(patience, within)
        self._stop.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if time.monotonic() > max(self._asked_at, began) + self._patience:
                self.problem = self.problem or f"no answer for {self._patience:.3g} s"
                return
            if time.monotonic() > began + within:
                self.problem = self.problem or "it had no time to be brought up to date"
                return
