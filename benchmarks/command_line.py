"""What a user waits for: processor seconds and memory of the verbs that run nothing, each in a process of its own.

    python benchmarks/command_line.py [--storage FOLDER --name SWEEP]

Without a sweep it measures help and refusals only. Standard library only: memory counts what the parent held when it forked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTHING = ("--storage", "/nonexistent")


def measure(words: list[str]) -> tuple[int, float, float]:
    """Exit code, processor seconds and megabytes at most of ``search.py WORDS``."""
    command = [sys.executable, str(ROOT / "search.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--name", help="a sweep in it that does not run")
    options = parser.parse_args()
    commands = [["--help"], ["launch", "--help"], ["launch", "x", "--bad-flag"], ["launch", "x", "--method", "no-such"]]
    commands += [["best", "no-such", *NOTHING], ["list", *NOTHING]]
    if options.name:
        place = ["--storage", options.storage]
        commands += [["list", *place], ["stop", options.name, *place]]
        commands += [["best", options.name, *place], ["best", options.name, "--json", *place]]
    print(f"{'command':60} code  CPU s    MB")
    for words in commands:
        code, seconds, megabytes = measure(words)
        print(f"{' '.join(words)[:60]:60} {code:4d} {seconds:6.2f} {megabytes:5.0f}")


if __name__ == "__main__":
    main()
