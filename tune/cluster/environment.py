"""What Ray needs of its environment: a folder with short paths, a token, ports, and the time that a busy machine takes."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from errors import UserError

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # that the path of a Unix socket may take
SOCKET = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"  # below Ray's folder, at its longest
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
PATIENCE = {  # what Ray waits for while it starts; its own limits, 10 to 60 s, are passed on a busy machine
    "RAY_gcs_server_port_wait_time_s": "120",  # the control service
    "RAY_raylet_start_wait_time_s": "120",  # the node manager
    "RAY_agent_register_timeout_ms": "300000",  # the agent that prepares the environments of workers
    "RAY_worker_register_timeout_seconds": "300",
}


def short_folder() -> tuple[str, str]:
    """A folder in which Ray's sockets have paths that are short enough, empty where Ray's own choice is one, and a line for
    the user where it is not ``$TMPDIR``, which is too long: Slurm, for one, makes such folders.

    ValueError where ``$RAY_TMPDIR`` is too long, or no short folder can be written.
    """
    limit = SOCKET_BYTES - len(SOCKET) - 1
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    folder = os.path.abspath(os.environ[name]) if name else ""
    if len(os.fsencode(folder)) <= limit:
        return (folder if name == "RAY_TMPDIR" else ""), ""
    long = f"{name}: {folder!r} is too long for Ray's sockets"
    if name == "RAY_TMPDIR":
        raise UserError(f"{long}; its path must have at most {limit} bytes")
    short = next((short for short in SHORT_FOLDERS if os.access(short, os.W_OK | os.X_OK)), None)
    if short is None:
        raise UserError(f"{long}; set RAY_TMPDIR to a folder whose path has at most {limit} bytes")
    return short, f"{long}; they are kept in {short} (RAY_TMPDIR names another folder)"


def be_patient() -> None:
    """Has Ray wait longer for its own processes, where the user has set no other limits."""
    for name, limit in PATIENCE.items():
        os.environ.setdefault(name, limit)


def free_ports() -> dict[str, int]:
    """Ports on the loopback address for the agents of a Ray of our own, all of them different, by their names in Ray."""
    with ExitStack() as open_sockets:
        sockets = {name: open_sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for name in AGENT_PORTS}
        return {name: server.getsockname()[1] for name, server in sockets.items()}


def choose_folder() -> str:
    """Has Ray use the short folder; returns the line for the user."""
    folder, line = short_folder()
    if folder:
        os.environ["RAY_TMPDIR"] = folder
    return line


def choose_token() -> None:
    """Makes up a token for this process and those that it starts, where Ray could not keep one in the home folder."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir(parents=True, exist_ok=True)
        usable = os.access(path, os.R_OK) or os.access(path.parent, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # there is no home folder
        usable = False
    if not usable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def token_source() -> str:
    """Where Ray finds the token that a cluster is shown: ``RAY_AUTH_TOKEN``, or the path of a file. Empty without a token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return str(path) if path.is_file() and path.stat().st_size else ""


def show_token() -> None:
    """Has Ray show the token to the cluster that is joined, as it does by itself only for the address ``auto``."""
    if token_source():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
