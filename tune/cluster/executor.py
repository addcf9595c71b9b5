"""Ray Tune as the executor: started or joined, run until the coordinator is done, and thrown away."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from data.processors import num_processors
from errors import UserError
from tune.cluster import quirks
from tune.cluster.environment import be_patient, choose_folder, choose_token, free_ports, show_token, token_source
from tune.cluster.interruption import Interruption
from tune.cluster.nodes import LOOK_SECONDS, SILENT_SECONDS, Nodes, capacity, check_answers
from tune.search.coordinator import Coordinator
from tune.spec import SweepSpec
from tune.store.stored_sweep import Sweep

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("errors.py", "hparams.py", "data", "losses", "models", "methods", "training", "tune")
SERVERS = ("raylet", "gcs_server")  # Ray's node manager and its control service


class NotStarted(Exception):
    """Ray of this machine's own did not come up; a later attempt may succeed."""


def data_folders() -> dict[str, str]:
    """Where the user wants data sets and tables to lie, for processes that have a working directory of their own.

    What the user has not said is not passed on: another node may have another user, and so another home folder.
    """
    named = {name: os.environ.get(name) for name in ("NOISY_LABEL_CACHE", "NOISY_LABEL_DATA")}
    return {name: str(Path(folder).absolute()) for name, folder in named.items() if folder}


def _prepare(address: str = "") -> None:
    """Sets what Ray and Tune read when they are imported; ``address`` is that of a cluster that is to be joined."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences its announcement
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's tables; ours is the display
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # a trial that lost its process gets one line of ours, which says why
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours says how to go on
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)  # Tune's own snapshots are not used
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(10**9)  # read once; how many there are is the coordinator's to say
    os.environ["RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE"] = "1"  # else Tune runs such a trial again beside the coordinator
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under ``uv run`` it ships the working directory
    os.environ.update(data_folders())
    others = [os.path.abspath(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *others]))
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # at the end it calls every lost process a trial
    if address:
        show_token()
    else:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray then listens on the loopback address alone
        be_patient()


def run(
    coordinator: Coordinator, spec: SweepSpec, interruption: Interruption, say: Callable[[str], None], address: str = ""
) -> None:
    """Starts a Ray of our own or joins the cluster at ``address``, runs Tune until the coordinator is done, and ends what it
    started. ValueError where it cannot."""
    _prepare(address)
    if not address:
        choose_token()
        if line := choose_folder():
            say(line)
    own_ray = OwnRay()
    try:
        with contextlib.suppress(KeyboardInterrupt):  # ours, or what Ray makes of it
            interruption.why_ray_died = (lambda: "") if address else own_ray.why_died
            connect(address)
            interruption.listen()  # Ray's core puts a handler before ours that makes the alarm at the end of the grace abort
            if address:
                interruption.why_ray_died = watch_head()
                with Nodes(coordinator.ledger.sweep, spec) as nodes:
                    num_trials = nodes.check()
                    origin = "" if spec.address else " (RAY_ADDRESS)"
                    say(f"joined the Ray cluster {address}{origin}; it holds {num_trials} trials at a time")
                    coordinator.concurrent = spec.concurrent or num_trials
                    _tune(coordinator, spec, lambda: nodes.follow(coordinator, say))
            else:
                num_trials = capacity(spec)
                coordinator.concurrent = min(spec.concurrent or num_trials, num_trials)
                _tune(coordinator, spec)
    except NotStarted as error:
        interruption.why_ray_died = lambda: ""
        own_ray.kill()
        coordinator.problem = str(error)
    finally:
        interruption.why_ray_died = lambda: ""
        shut_down()
        interruption.listen()


class OwnRay:
    """The processes of a Ray that this process starts, beginning with those of its servers."""

    def __init__(self) -> None:
        self._others = set(psutil.Process().children(recursive=True))
        self._servers: set[psutil.Process] = set()

    def why_died(self) -> str:
        """The reason for the driver to end where a server has died, also while Ray starts: Ray itself would wait on."""
        if len(self._servers) < len(SERVERS):
            with contextlib.suppress(psutil.NoSuchProcess):  # a process has ended while it was asked for its name
                self._servers |= {child for child in psutil.Process().children() if child.name() in SERVERS}
        return "Ray on this machine has ended" if any(has_ended(server) for server in self._servers) else ""

    def kill(self) -> None:
        """Kills what is left of a Ray that did not come up."""
        for process in set(psutil.Process().children(recursive=True)) - self._others:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is no more, or only its exit code is left."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def watch_head() -> Callable[[], str]:
    """A function that tells why the driver must end where the cluster's head stays away: Ray would end this process after a
    minute, without a word. It asks the head now and then."""
    import ray

    address = ray.get_runtime_context().gcs_address
    asked_at = answered_at = time.monotonic()

    def why_died() -> str:
        nonlocal asked_at, answered_at
        if time.monotonic() - asked_at > LOOK_SECONDS:
            with contextlib.suppress(ValueError):
                check_answers(address)
                answered_at = time.monotonic()
            asked_at = time.monotonic()
        silent = asked_at - answered_at > SILENT_SECONDS
        return f"the head of the Ray cluster {address} does not answer" if silent else ""

    return why_died


def connect(address: str) -> None:
    """Starts a Ray of our own, or joins the cluster at ``address``. ValueError where there is none or it refuses us, NotStarted
    where our own does not come up."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)  # its import has set another
    if address:
        check_answers(address)
    quirks.quiet_about_dead_nodes()
    with quirks.sigterm_handler_kept():
        try:
            _join(address) if address else _start()
        except Exception as error:  # Ray raises a bare one where a node does not come up in time
            said = " ".join(str(error).split())
            if not address:
                raise NotStarted(f"Ray did not start: {said}") from error
            refused = isinstance(error, ray.exceptions.AuthenticationError) or said.startswith("Failed to connect")
            advice = f"; {token_advice()}" if refused else ""
            raise UserError(f"Ray cluster {address!r} cannot be joined: {said.split('. ')[0]}{advice}") from error


def _start() -> None:
    """Starts a Ray of our own. Workers import first from the folder that this process is in, so that is the program's
    meanwhile."""
    import ray

    with (
        contextlib.chdir(ROOT),
        quirks.servers_in_their_own_session(),
        quirks.ports_of_agents(free_ports()),
        quirks.fewer_servers(),
    ):
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


def shipped(empty: str) -> dict[str, Any]:
    """The runtime environment that a cluster's workers get: our packages by name, in the folder ``empty``, and nothing else.

    In a job (``ray job submit``) it is added to the job's own, which must not say the same: what the job has stays.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    ours = {name: folder for name, folder in data_folders().items() if name not in job.get("env_vars", {})}
    folder = {} if "working_dir" in job else {"working_dir": empty}
    return {"py_modules": [str(ROOT / name) for name in PACKAGES], "env_vars": ours, **folder}


def token_advice() -> str:
    """Which token the cluster was shown, where a refusal does not say so: Ray gives up after 20 s without naming it."""
    if source := token_source():
        return f"the token shown to it is that of {source}"
    return "no token was shown to it; one is looked for in RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, and ~/.ray/auth_token"


def check_cluster(sweep: Sweep, address: str) -> None:
    """ValueError where the cluster at ``address`` cannot be joined, none of its nodes holds a trial, or one cannot run it."""
    _prepare(address)
    try:
        connect(address)
        with Nodes(sweep, sweep.spec) as nodes:
            nodes.check()
    finally:
        shut_down()


def own_folder(sweep: Sweep) -> Path:
    """A folder for what Tune writes, which nobody reads. Those that killed drivers of the sweep left on this machine go."""
    prefix = f"noisy-label-search-{hashlib.sha256(str(sweep.folder).encode()).hexdigest()[:16]}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix))


def _tune(coordinator: Coordinator, spec: SweepSpec, on_suggest: Callable[[], None] = lambda: None) -> None:
    """Runs Tune until the coordinator is done; ``on_suggest`` is called before each proposal."""
    from ray import tune

    from tune.cluster.quiet_progress import NoProgress
    from tune.cluster.scheduler import LedgerScheduler
    from tune.cluster.searcher import LedgerSearcher
    from tune.cluster.trial import TrialActor

    quirks.aws_keys_not_passed_on()
    scratch = own_folder(coordinator.ledger.sweep)
    try:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, {"cpu": spec.cpus_per_trial, "gpu": spec.gpus_per_trial}),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(coordinator, on_suggest),
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
                callbacks=[NoProgress()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
