"""Ray Tune as the executor: started or joined, run until the coordinator is done, and thrown away."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.processors import num_processors
from errors import UserError
from tune.cluster.environment import choose_folder, choose_token
from tune.cluster.interruption import Interruption
from tune.cluster.nodes import LOOK_SECONDS, SILENT_SECONDS, Nodes, address_of, capacity, check_answers
from tune.search.coordinator import Coordinator
from tune.spec import SweepSpec
from tune.store.stored_sweep import Sweep

ROOT = Path(__file__).resolve().parent.parent.parent
STARTS = 3  # attempts to start a Ray of our own
PACKAGES = ("errors.py", "hparams.py", "data", "losses", "models", "methods", "training", "tune")


class NotStarted(Exception):
    """Ray of this machine's own did not come up; a later attempt may succeed."""


def places() -> dict[str, str]:
    """Where the user wants data sets and tables to lie, for processes that have a working directory of their own.

    What the user has not said is not passed on: another node may have another user, and so another home folder.
    """
    named = {name: os.environ.get(name) for name in ("NOISY_LABEL_CACHE", "NOISY_LABEL_DATA")}
    return {name: str(Path(folder).absolute()) for name, folder in named.items() if folder}


def _prepare() -> None:
    """What Ray and Tune read when they are imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences its announcement
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's tables; ours is the display
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # a trial that lost its process gets one line of ours, which says why
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours says how to go on
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)  # Tune's own snapshots are not used
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(10**9)  # read once; how many there are is the coordinator's to say
    os.environ["RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE"] = "1"  # else Tune runs such a trial again beside the coordinator
    os.environ.setdefault(
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
    )  # under ``uv run`` it ships the working directory, and imports it
    os.environ.update(places())
    others = [os.path.abspath(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *others]))
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # at the end it calls every lost process a trial


def run(coordinator: Coordinator, spec: SweepSpec, interruption: Interruption, say: Callable[[str], None]) -> None:
    """Starts or joins Ray, runs Tune until the coordinator is done, and ends what it started. ValueError where it cannot."""
    _prepare()
    address = address_of(spec)
    if not address:  # Ray's servers then listen on the loopback address; the name is from where Ray does so by itself
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        choose_token()
        if line := choose_folder():
            say(line)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # ours, or what Ray makes of it
            connect(address)
            interruption.listen()  # Ray's core puts a handler before ours that makes the alarm at the end of the grace abort
            interruption.why_ray_died = silent() if address else ended()
            if address:
                with Nodes(coordinator.ledger.sweep, spec) as nodes:
                    held = nodes.check()
                    said = address if spec.address else f"{address} (RAY_ADDRESS)"
                    say(f"joined the Ray cluster {said}; it holds {held} trials at a time")
                    coordinator.concurrent = spec.concurrent or held
                    _tune(coordinator, spec, lambda: nodes.follow(coordinator, say))
            else:
                held = capacity(spec)
                coordinator.concurrent = min(spec.concurrent or held, held)
                _tune(coordinator, spec)
    except NotStarted as error:
        coordinator.problem = str(error)
    finally:
        interruption.why_ray_died = lambda: ""
        shut_down()
        interruption.listen()


def ended() -> Callable[[], str]:
    """Asks after the processes of our own Ray."""
    from ray._private import worker

    node: Any = worker._global_node
    held = [info[0].process for kind, info in node.all_processes.items() if kind in ("raylet", "gcs_server")]
    return lambda: "Ray on this machine has ended" if any(process.poll() is not None for process in held) else ""


def silent() -> Callable[[], str]:
    """Asks after a cluster's head, now and then. Where it stays away, Ray would end this process after a minute."""
    import ray

    address = ray.get_runtime_context().gcs_address
    asked = answered = time.monotonic()

    def look() -> str:
        nonlocal asked, answered
        if time.monotonic() - asked > LOOK_SECONDS:
            with contextlib.suppress(ValueError):
                check_answers(address)
                answered = time.monotonic()
            asked = time.monotonic()
        return f"the head of the Ray cluster {address} does not answer" if asked - answered > SILENT_SECONDS else ""

    return look


def connect(address: str) -> None:
    """A Ray of our own, or the cluster at ``address``. ValueError where there is none or it refuses us, NotStarted where our
    own does not come up, also not when it is tried again: Ray gives itself 30 s, and a busy machine may need more."""
    from ray._private import services, utils, worker
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger("ray").setLevel(logging.ERROR)  # its import has set another
    if address:
        check_answers(address)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # Ray does so for "auto" alone
    vars(worker)["print_to_stdstream"] = lambda *told, **how: None  # pages of its log for each node that dies
    if sys.platform == "linux":  # elsewhere they end with the driver because they are of its group
        own_session = functools.partial(subprocess.Popen, start_new_session=True)
        vars(services)["ConsolePopen"] = own_session  # a terminal that goes away is for us to notice, not for Ray's processes
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None  # Ray's would exit without a word; ours stay
    try:
        for left in reversed(range(1 if address else STARTS)):
            try:
                _join(address) if address else _start()
                return
            except Exception as error:  # Ray raises a bare one where a node does not come up in time
                if not left or "timed out" not in str(error):
                    raise reason(error, address) from error
                end_half_started(error)
    finally:
        utils.set_sigterm_handler = set_handler


def _start() -> None:
    """Starts a Ray of our own. Workers import from the folder that we are in first, so that is the program's meanwhile."""
    import ray

    with contextlib.chdir(ROOT):
        ray.init(
            address="local",
            num_cpus=num_processors(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _join(address: str) -> None:
    """Joins a cluster. With a working directory of their own, an empty one, workers import neither from the folder that we are
    in, which may be there on other nodes, too, nor from this program's, where they may hold another version of it."""
    import ray

    with tempfile.TemporaryDirectory() as empty:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=shipped(empty))


def shut_down() -> None:
    """Ends our own Ray, or leaves the cluster. What is garbage by then refers to Ray's core, which ends this process at once
    where another thread, as the one that sends to MLflow, happens to collect it while the core goes."""
    import ray

    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def end_half_started(error: Exception) -> None:
    """Ends the processes of a Ray that did not come up, on which nothing but the error's traceback has a hold."""
    from ray._private.node import Node

    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False)


def reason(error: Exception, address: str) -> Exception:
    """What is said of a Ray that could not be started or joined."""
    import ray

    said = " ".join(str(error).split())
    if not address:
        return NotStarted(f"Ray did not start: {said}")
    refused = isinstance(error, ray.exceptions.AuthenticationError) or said.startswith("Failed to connect")
    advice = f"; {token_advice()}" if refused else ""
    return UserError(f"Ray cluster {address!r} cannot be joined: {said.split('. ')[0]}{advice}")


def shipped(empty: str) -> dict[str, Any]:
    """The runtime environment that a cluster's workers get: our packages by name, in the folder ``empty``, and nothing else.

    In a job (``ray job submit``) it is added to the job's own, which must not say the same: what the job has stays.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    ours = {name: folder for name, folder in places().items() if name not in job.get("env_vars", {})}
    folder = {} if "working_dir" in job else {"working_dir": empty}
    return {"py_modules": [str(ROOT / name) for name in PACKAGES], "env_vars": ours, **folder}


def token_advice() -> str:
    """Which token the cluster was shown, where a refusal does not say so: Ray gives up after 20 s without naming it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the token shown to it is that of RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if path.is_file() and path.stat().st_size:
        return f"the token shown to it is that of {path}"
    return "no token was shown to it; one is looked for in RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, and ~/.ray/auth_token"


def check_cluster(sweep: Sweep) -> None:
    """ValueError where the cluster cannot be joined, none of its nodes holds a trial, or one cannot run it."""
    _prepare()

    try:
        connect(address_of(sweep.spec))
        with Nodes(sweep, sweep.spec) as nodes:
            nodes.check()
    finally:
        shut_down()


def own_folder(sweep: Sweep) -> Path:
    """A folder for what Tune writes, which nobody reads. Those that killed drivers of the sweep left on this machine go."""
    prefix = f"noisy-label-search-{hashlib.sha256(str(sweep.folder).encode()).hexdigest()[:16]}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix))


def _tune(coordinator: Coordinator, spec: SweepSpec, look: Callable[[], None] = lambda: None) -> None:
    from ray import tune
    from ray.tune.execution import class_cache
    from ray.tune.progress_reporter import TrialProgressCallback

    from tune.cluster.scheduler import LedgerScheduler
    from tune.cluster.searcher import LedgerSearcher
    from tune.cluster.trial import TrialActor

    passed_on: set[str] = class_cache.ENV_VARS_TO_PROPAGATE  # to the workers, by way of an agent that logs their values
    passed_on -= {name for name in passed_on if name.startswith("AWS_")}
    progress = TrialProgressCallback()
    vars(progress)["_print"] = lambda line: None
    scratch = own_folder(coordinator.ledger.sweep)
    try:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, {"cpu": spec.cpus_per_trial, "gpu": spec.gpus_per_trial}),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(coordinator, look),
                scheduler=LedgerScheduler(coordinator),
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[progress],
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
