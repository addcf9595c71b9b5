"""A trial as Ray Tune runs it: a thin shell around a TrialRun, in an actor that serves one trial after another."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import time
import traceback
from typing import Any

from ray.tune import Trainable

from errors import UserError
from training.locations import Away, location
from training.watchdog import Watchdog, allowed_seconds

log = logging.getLogger(__name__)
CUDA_CONTEXT_BYTES = 768 * 2**20  # what a process takes on a GPU beside its tensors: its context, loaded kernels


class TrialActor(Trainable):
    """Each ``step`` trains until a rung, the end, or ``report_seconds``, and returns those epochs.

    An exception does not leave it: it is reported as the trial's failure, with its traceback, and the actor lives on; running
    out of memory is one. But where the storage does not hand out a checkpoint the process counts as lost, so that the trial is
    tried again and keeps what it has saved. An epoch that hangs ends the process. ``setup`` touches nothing on disk, since Tune
    may call it for a trial that already runs elsewhere.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self.trial: dict[str, Any] = json.loads(config["trial"])
        self.experiment: Any = None
        self.begun = False  # whether it has trained an epoch here

    def step(self) -> dict[str, Any]:
        epochs: list[Any] = []
        failure, diverged = None, False
        try:
            with Watchdog(location(self.trial["folder"])) as watchdog:  # an actor that waits for the driver does not hang
                diverged = self._advance(epochs, watchdog)
        except Away:
            raise
        except Exception:  # noqa: BLE001  the trial's boundary: whatever a trial raises is its own failure, not the sweep's
            failure = traceback.format_exc()
        if failure or diverged:
            self.experiment = None  # its state is that of no epoch's end: nothing is left for cleanup to save
            self._free_memory()
        return {"epochs": [dataclasses.asdict(epoch) for epoch in epochs], "failure": failure, "diverged": diverged}

    def _advance(self, epochs: list[Any], watchdog: Watchdog) -> bool:
        """Adds the epochs to report. Returns whether the trial diverged."""
        watchdog.expect(allowed_seconds(self.trial["hang_seconds"], 0.0, not self.begun))
        from training.fit import Diverged

        if self.experiment is None:
            self.experiment = self._build()
            self.saved_at = time.monotonic()
            epochs += [epoch for epoch in self.experiment.history if epoch.epoch > self.trial["reported"]]
        if epochs and self._pauses(epochs[-1].epoch):
            return False
        stop_at = time.monotonic() + self.trial["report_seconds"]
        longest = max((epoch.metrics["seconds"] for epoch in self.experiment.history), default=0.0)
        while True:
            watchdog.expect(allowed_seconds(self.trial["hang_seconds"], longest, not self.begun))
            try:
                epochs.append(self.experiment.advance())
                if self.trial["gpus"]:  # with the epoch, as a resume may give the trial another number of them
                    epochs[-1].metrics["gpu_seconds"] = self.trial["gpus"] * epochs[-1].metrics["seconds"]
            except Diverged as error:
                log.warning("trial %d: %s", self.trial["number"], error)
                return True
            self.begun, longest = True, max(longest, epochs[-1].metrics["seconds"])
            pauses = self._pauses(epochs[-1].epoch)
            if pauses or time.monotonic() - self.saved_at >= self.trial["checkpoint_seconds"]:
                self._save()
            if pauses or time.monotonic() >= stop_at:
                return False

    def _pauses(self, epoch: int) -> bool:
        """Whether the driver decides about the trial at this epoch."""
        return epoch in self.trial["rungs"] or epoch == self.trial["recipe"]["epochs"]

    def _build(self) -> Any:
        import torch

        from training.trial_run import Recipe, TrialRun

        torch.set_num_threads(max(1, int(self.trial["cpus"])))
        if 0 < self.trial["gpus"] < 1:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(memory_fraction(self.trial["gpus"], total))
        device = "cuda" if self.trial["gpus"] else "cpu"  # Ray does not hide a GPU from a trial that asked for none
        return TrialRun(Recipe(**self.trial["recipe"]), location(self.trial["folder"]), self.trial["rungs"], device)

    def _free_memory(self) -> None:
        """Gives back what a failed trial held, so that the next one does not fail for it. After some errors, an illegal access
        to memory for one, nothing can run on the GPU in this process any more: then an error is raised, which ends it."""
        gc.collect()
        if self.trial["gpus"]:
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _save(self) -> None:
        try:
            self.experiment.save()
        except OSError as error:  # a full disk costs the epochs since the last checkpoint, not the trial
            log.warning("trial %d was not saved: %s", self.trial["number"], error)
        self.saved_at = time.monotonic()

    def cleanup(self) -> None:
        """Called when the actor is stopped: an interrupted trial is saved where it stands."""
        if self.experiment is not None:
            self._save()


def memory_fraction(share: float, total: int) -> float:
    """How much of a GPU of ``total`` bytes a trial's tensors may take, in (0, 1): its share of it without its CUDA context, so
    that it cannot take its neighbours' memory. ValueError where that is nothing."""
    left = share - CUDA_CONTEXT_BYTES / total
    if left <= 0:
        raise UserError(
            f"--gpus-per-trial: {share:g} of this GPU's {total / 2**30:.0f} GiB is no more than a process takes beside its"
            f" tensors ({CUDA_CONTEXT_BYTES / 2**30:g} GiB)"
        )
    return left
