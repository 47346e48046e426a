"""Damages input and says what came of it: `python tests/fuzz/run.py [--seconds 600] [--only CATEGORY ...] [--case N]`.

Each case ends as the contract for bad input has it, or is printed with its number, and the exit code is 1.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from isolation import OUTSIDE, WITHIN, Result, Worker, context  # noqa: E402

CATEGORIES = {
    "images": "damaged_images",
    "tars": "damaged_tars",
    "parquet": "damaged_parquet",
    "folders": "odd_folders",
    "recipes": "nonsense_recipes",
    "runs": "damaged_runs",
    "checkpoints": "damaged_checkpoints",
    "processors": "damaged_processors",
    "calls": "nonsense_calls",
}


def run_cases(category: str, numbers: Iterable[int], seed: int = 0, seconds: float = 20.0) -> Iterator[Result]:
    """The results of these cases of one category; each may take so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(CATEGORIES[category], seed, Path(folder), seconds)
        try:
            yield from map(worker.run, numbers)
        finally:
            worker.close()


def describe(category: str, result: Result) -> str:
    message = result.message.replace("\n", "\n    ")
    return f"{category} --case {result.number}: {result.outcome}: {result.what}\n    {message}"


def print_table(counts: dict[str, Counter[str]]) -> None:
    columns = ("cases", *WITHIN, *OUTSIDE)
    print(f"\n{'':12}" + "".join(f"{column:>{len(column) + 2}}" for column in columns))
    for category, count in counts.items():
        row = {**count, "cases": count.total()}
        print(f"{category:12}" + "".join(f"{row.get(column, 0):>{len(column) + 2}}" for column in columns))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of all categories together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="CATEGORY", choices=CATEGORIES, default=[*CATEGORIES])
    parser.add_argument("--case", type=int, help="this one alone")
    options = parser.parse_args()
    context.set_forkserver_preload(["transformers_radio.training.train"])
    processes = min(os.cpu_count() or 1, len(options.only))
    share = options.seconds * processes / len(options.only)
    counts: dict[str, Counter[str]] = {category: Counter() for category in options.only}

    def run(category: str) -> None:
        numbers = itertools.count() if options.case is None else [options.case]
        end = 0.0
        for result in run_cases(category, numbers, options.seed):
            end = end or time.monotonic() + share  # without the seconds that its start takes
            counts[category][result.outcome] += 1
            if result.outcome in OUTSIDE or options.case is not None:
                print(f"\r{describe(category, result)}", flush=True)
            done = sum(count.total() for count in counts.values())
            outside = sum(count[outcome] for count in counts.values() for outcome in OUTSIDE)
            if sys.stderr.isatty() or done % 1000 == 0:
                print(
                    f"\r{done} cases, {outside} outside the contract; {category} ", end="", file=sys.stderr, flush=True
                )
            if time.monotonic() > end:
                break

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, options.only))
    print_table(counts)
    return int(any(count[outcome] for count in counts.values() for outcome in OUTSIDE))


if __name__ == "__main__":
    sys.exit(main())
