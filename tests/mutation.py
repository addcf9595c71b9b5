"""Changes one constant of a method and asks whether the tests notice.

``python -m tests.mutation`` reads mutations as JSON from its input, applies each in a process of its own, in memory only, runs
the test that must notice it, and prints those that no test noticed.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AT_A_TIME = 2
# what looks for garbage at the end takes half a second each
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
FAILED = 1  # pytest: tests ran and failed; a mutant that cannot even be imported ends with another code


@dataclass(frozen=True)
class Mutation:
    """``before`` stands once in the file ``path`` of the project; with ``after`` in its place ``test`` must fail."""

    path: str
    before: str
    after: str
    test: str

    def mutant(self) -> str:
        """The file's text with the change."""
        text = (ROOT / self.path).read_text()
        assert text.count(self.before) == 1, f"{self.before!r} stands {text.count(self.before)} times in {self.path}"
        return text.replace(self.before, self.after)


def survivors(mutations: list[Mutation]) -> list[dict[str, Any]]:
    """Those that their test does not notice, each with pytest's exit code and output."""
    for mutation in mutations:
        mutation.mutant()
    given = json.dumps([dataclasses.asdict(mutation) for mutation in mutations])
    command = [sys.executable, "-m", "tests.mutation"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def become(mutation: Mutation, log: Path) -> int:
    """In a forked process: imports the mutant in place of the file and runs the test. Returns pytest's exit code."""
    import pytest

    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    path, code = str(ROOT / mutation.path), compile(mutation.mutant(), mutation.path, "exec")
    original = importlib.machinery.SourceFileLoader.get_code
    importlib.machinery.SourceFileLoader.get_code = (  # type: ignore[method-assign]
        lambda self, name: code if self.path == path else original(self, name)
    )
    return int(pytest.main([*OPTIONS, str(ROOT / mutation.test)]))


def examined(mutations: list[Mutation], folder: Path) -> Iterator[tuple[Mutation, int, str]]:
    """Each mutation with the exit code and the output of its test, ``AT_A_TIME`` at once; ``folder`` is for the outputs."""
    waiting = [(mutation, folder / str(i)) for i, mutation in enumerate(mutations)]
    running: dict[int, tuple[Mutation, Path]] = {}
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            mutation, log = waiting.pop(0)
            number = os.fork()
            if not number:
                os._exit(become(mutation, log))
            running[number] = mutation, log
        number, status = os.wait()
        mutation, log = running.pop(number)
        yield mutation, os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def main() -> None:
    import hypothesis  # noqa: F401  what a test imports anyway is imported once, before the forks
    import torch

    import tests.postgres  # noqa: F401
    import training.locations  # noqa: F401

    torch.set_num_threads(1)
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # it imports sympy at its first call: seconds, so before the forks
    mutations = [Mutation(**fields) for fields in json.load(sys.stdin)]
    with tempfile.TemporaryDirectory() as folder:
        unnoticed = [
            {"mutation": dataclasses.asdict(mutation), "exit": code, "output": output[-2000:]}
            for mutation, code, output in examined(mutations, Path(folder))
            if code != FAILED
        ]
    json.dump(unnoticed, sys.stdout)


if __name__ == "__main__":
    main()
