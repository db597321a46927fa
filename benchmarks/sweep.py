"""Every float32 number as a logit: the worst error of each kernel family over all 2^32.

    python -m benchmarks.sweep                   # all numbers: 75 minutes of a processor
    python -m benchmarks.sweep --step 4096       # every 4096th: half a minute

Each number is, in a row of four classes, the maximum, the target, another class, and all of them
(`tests/sweep.py`); right results are the formulas of the contract in float64.  Errors are relative,
those of the log-sum-exp to the maximum and of log-probabilities to 1 where they are less.  Exits
with 1 where one is larger than is promised, and names the row.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import fastce
from tests import families, sweep

NUMBERS = 1 << 32
BATCH = 1 << 19
SWEPT = (families.loss, families.stats, families.softmax)
# Way to lie, and every which number: other axes are gathered into the same tiles, and rows of many
# classes take 70 numbers for one.
WAYS = {"few classes": 1, "another axis": 16, "many classes": 1024, "many, another axis": 1024}

Worst = dict[tuple[str, str], tuple[float, float, str]]


def tried(way: str, start: int, step: int) -> Worst:
    """Worst error of each result and its promised bound, over a batch of numbers."""
    fastce.set_num_threads(1)
    found: Worst = {}
    count = min(BATCH, (NUMBERS - start + step - 1) // step)
    for part, batch in sweep.batches(sweep.patterns(start, step, count), start):
        rows = families.Lying(batch.logits, *families.WAYS[way], start)
        got: dict[str, Any] = {}
        for family in SWEPT:
            got |= family(rows, batch)
        for name, error, bound, row in families.errors(got, batch, families.FLOAT32):
            if error > found.get((way, name), (-1.0,))[0]:
                where = f"{part}: {batch.logits[row].tolist()}, target {batch.targets[row]}"
                found[way, name] = error, bound, where
    return found


def main() -> int:
    """Sweep on all processors and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step", type=int, default=1, help="every step-th number (default: 1)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    began = time.monotonic()
    worst: Worst = {}
    with ProcessPoolExecutor(options.processes) as pool:
        waiting = [
            pool.submit(tried, way, start, sparser * options.step)
            for way, sparser in WAYS.items()
            for start in range(0, NUMBERS, BATCH * sparser * options.step)
        ]
        for done, batch in enumerate(as_completed(waiting), 1):
            for key, found in batch.result().items():
                if found[0] > worst.get(key, (-1.0,))[0]:
                    worst[key] = found
            if done % 64 == 0 or done == len(waiting):
                spent = time.monotonic() - began
                print(f"{done} of {len(waiting)} batches, {spent:.0f} s", file=sys.stderr)
    broken = 0
    print(f"{'lanes':20} {'numbers':>11} {'result':20} {'worst':>8} {'promised':>9}")
    for (way, name), (error, bound, where) in sorted(worst.items()):
        kept = error <= bound
        broken += not kept
        numbers = (NUMBERS - 1) // (WAYS[way] * options.step) + 1
        print(
            f"{way:20} {numbers:11} {name:20} {error:8.2g} {bound:9.2g}"
            + ("" if kept else f"  BROKEN by {where}")
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
