"""How long a host takes to lay out the batch of one update, by its size: what it has to hide behind the devices' work.

    python benchmarks/input.py
    python benchmarks/input.py --pairs 16 256 4096

Pairs are made up: responses of log-normal length, 200 tokens in the middle, cut at 384; rows of 1,024 tokens, a prompt
shared by both responses, one device for each pair.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from timing import write

from ctpd_jax.data.loader import plan_updates
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import PairItem, ScoredResponse

UPDATES = 5


def made_up(count: int, random: np.random.Generator) -> list[PairItem]:
    """Pairs of token ids that are all 1: only lengths matter."""

    def response() -> ScoredResponse:
        length = int(np.clip(random.lognormal(np.log(200), 0.6), 10, 384))
        return ScoredResponse(np.ones(length, np.int32), np.ones(length, np.float32))

    return [PairItem(np.ones(random.integers(20, 129), np.int32), response(), response()) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 256, 4096], help="of an update")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args, records = parser.parse_args(), []
    for pairs in args.pairs:
        items = made_up(UPDATES * pairs, np.random.default_rng(0))
        rows = PackingConfig("shared", packed=True, buckets=4, multiple=128, length=1024, row_multiple=pairs)
        began = time.perf_counter()
        updates = plan_updates(items, 0, UPDATES, pairs, pairs, rows)
        planned, times = time.perf_counter() - began, []
        for step in range(UPDATES):
            began = time.perf_counter()
            updates.batches(step)
            times.append(time.perf_counter() - began)
        records.append({"pairs": pairs, "seconds": min(times), "planned": planned})
        print(f"{pairs:5,} pairs an update: {1000 * min(times):7.1f} ms; shapes planned in {planned:.2f} s")
    write(args.json, "input", records=records)


if __name__ == "__main__":
    main()
