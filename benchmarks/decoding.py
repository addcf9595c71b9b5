"""How fast a folder of images becomes a table: this version beside another checkout's, in turn, in one run.

    python benchmarks/decoding.py FOLDER [--beside CHECKOUT] [--repeats 3]

FOLDER holds a folder per class. Every build starts from an empty cache, in a process of its own; a first one that does not
count brings the files into memory. Processor time counts, not wall time: decoding uses every core, and so may others.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = """
import resource, sys
from data.cache import open_table
from data.sources import Options, find_source
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before = used()
table = open_table(find_source("folder:" + sys.argv[1], Options(image_size=32)), fresh=True)
print(used() - before, len(table.images), table.checksum)
"""


def build(checkout: Path, folder: Path) -> tuple[float, int, str]:
    """Seconds of processor time, number of images, and the table's checksum."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NOISY_LABEL_CACHE": cache, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", BUILD, str(folder)]
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, number, checksum = done.stdout.split()
    return float(seconds), int(number), checksum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--beside", type=Path, help="another checkout of this program")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    checkouts = [ROOT, *([options.beside.resolve()] if options.beside else [])]
    folder = options.folder.resolve()
    build(ROOT, folder)
    rounds = [[build(checkout, folder) for checkout in checkouts] for _ in range(options.repeats)]
    _, number, checksum = rounds[0][0]
    for position, checkout in enumerate(checkouts):
        seconds = [one[position][0] for one in rounds]
        name = "this version" if checkout == ROOT else "the other one"
        rate = number / statistics.median(seconds)
        print(f"{name}: {statistics.median(seconds):.1f} s for {number} images, {rate:.0f} images per second of processor time")
    if options.beside:
        ratios = [one[0][0] / one[1][0] for one in rounds]
        same = "the same" if all(one[1][2] == checksum for one in rounds) else "another"
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {same} table")


if __name__ == "__main__":
    main()
