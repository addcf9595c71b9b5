"""Ray Tune as the executor: started or joined, run until the desk is done, and thrown away."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from data.folders import cache_folder, data_folder
from tune.desk import Desk
from tune.driver import Interruption
from tune.spec import SweepSpec

ROOT = Path(__file__).resolve().parent.parent


class NotStarted(Exception):
    """Ray of this machine's own did not come up; a later attempt may succeed."""


def _prepare() -> None:
    """What Ray and Tune read when they are imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences its announcement
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's tables; ours is the display
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # a trial that lost its process gets one line of ours, which says why
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours says how to go on
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)  # Tune's own snapshots are not used
    os.environ["NOISY_LABEL_CACHE"] = str(cache_folder())  # workers have a working directory of their own
    os.environ["NOISY_LABEL_DATA"] = str(data_folder())
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # at the end it calls every lost process a trial


def run(desk: Desk, spec: SweepSpec, interruption: Interruption) -> None:
    """Starts or joins Ray, runs Tune until the desk is done, and ends what it started."""
    _prepare()
    if not spec.address:  # Ray's servers then listen on the loopback address; the name is from where Ray does so by itself
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    try:
        with contextlib.suppress(KeyboardInterrupt):  # ours, or what Ray makes of it
            connect(spec.address)
            interruption.listen()  # Ray's core puts a handler before ours that makes the alarm at the end of the grace abort
            held = capacity(spec)
            desk.concurrent = min(spec.concurrent or held, held)
            _tune(desk, spec)
    except NotStarted as error:
        desk.problem = str(error)
    finally:
        ray.shutdown()
        interruption.listen()


def connect(address: str) -> None:
    """A Ray of our own, or the cluster at ``address``. ValueError where there is none or it refuses us, NotStarted where our
    own does not come up."""
    import ray
    from ray._private import utils

    shipped: dict[str, Any] | None = None
    if address:
        places = {name: os.environ[name] for name in ("NOISY_LABEL_CACHE", "NOISY_LABEL_DATA")}
        shipped = {"working_dir": str(ROOT), "excludes": [".git", ".venv", "runs"], "env_vars": places}
    raise_exit = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None  # Ray's would exit without a word; ours stay
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if not address else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=shipped,
        )
    except ray.exceptions.AuthenticationError as error:
        raise ValueError(f"Ray refuses its token: {str(error).split('. ')[0]}") from error
    except Exception as error:  # Ray raises a bare one where a node does not come up in time
        reason = " ".join(str(error).split())
        if address:
            raise ValueError(f"Ray cluster {address!r} cannot be joined: {reason}") from error
        raise NotStarted(f"Ray did not start: {reason}") from error
    finally:
        utils.set_sigterm_handler = raise_exit


def check_cluster(spec: SweepSpec) -> None:
    """ValueError where the cluster cannot be joined or none of its nodes holds a trial."""
    _prepare()
    import ray

    try:
        connect(spec.address)
        capacity(spec)
    finally:
        ray.shutdown()


def capacity(spec: SweepSpec) -> int:
    """How many trials the nodes hold at a time. ValueError where no node holds even one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    total = 0
    for node in nodes:
        fits = [how_many(node.get("CPU", 0.0), spec.cpus_per_trial)]
        if spec.gpus_per_trial >= 1:
            fits.append(how_many(node.get("GPU", 0.0), spec.gpus_per_trial))
        elif spec.gpus_per_trial > 0:
            fits.append(int(node.get("GPU", 0.0)) * how_many(1, spec.gpus_per_trial))  # a fraction does not span two GPUs
        total += min(fits)
    if not total:
        most = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}
        raise ValueError(
            f"no node holds a trial of {spec.cpus_per_trial:g} CPUs and {spec.gpus_per_trial:g} GPUs; "
            f"the largest have {most['CPU']:g} CPUs and {most['GPU']:g} GPUs"
        )
    return total


def how_many(have: float, need: float) -> int:
    """How often ``need`` goes into ``have``, in Ray's units of a ten-thousandth."""
    return round(have * 10_000) // round(need * 10_000)


def _tune(desk: Desk, spec: SweepSpec) -> None:
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(desk.concurrent)  # start the first ones together
    from ray import tune
    from ray.tune.execution import class_cache

    from tune.scheduler import LedgerScheduler
    from tune.searcher import LedgerSearcher
    from tune.trial import TrialActor

    passed_on: set[str] = class_cache.ENV_VARS_TO_PROPAGATE  # to the workers, by way of an agent that logs their values
    passed_on -= {name for name in passed_on if name.startswith("AWS_")}
    scratch = tempfile.mkdtemp(prefix="noisy-label-search-")
    try:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, {"cpu": spec.cpus_per_trial, "gpu": spec.gpus_per_trial}),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(desk),
                scheduler=LedgerScheduler(desk),
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
