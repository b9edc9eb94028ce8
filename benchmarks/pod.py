"""What surrounds the devices when there are many pairs: the store, and everything between `ctpd train` and its first
update.

    python benchmarks/pod.py                # 61,000 pairs about as long as UltraFeedback's; about 2.5 GB of memory
    python benchmarks/pod.py --pairs 6100
    python benchmarks/pod.py --data PAIRS --teacher DIR --student DIR       # and preparing, with their tokenizers

No model is needed: pairs are random tokens in random spans, scores are random numbers.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from timing import write

from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.store import open_store, shard_ranges, to_record, write_store
from ctpd_jax.data.loader import plan_updates
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.job import prepared
from ctpd_jax.schema import SIDES, Aligned, AlignedPair, Counters, TokenSide
from ctpd_jax.settings import default_config

SCORERS = ("reference", "positive", "negative", "start")
PROMPT, RESPONSE = 110, 230  # tokens, medians of lengths that are spread log-normally, cut at 512


def pairs_of(count: int) -> Iterator[AlignedPair]:
    """Random pairs: a span is one or two tokens on either side."""
    rng = np.random.default_rng(0)

    def aligned(spans: int) -> Aligned:
        sides = []
        for _ in range(2):
            ids = np.repeat(np.arange(spans, dtype=np.int32), rng.integers(1, 3, spans))
            sides.append(TokenSide(rng.integers(5, 30_000, len(ids), dtype=np.int32), ids))
        return Aligned(np.arange(spans + 1, dtype=np.int32) * 5, *sides)

    lengths = rng.lognormal(np.log([PROMPT, RESPONSE, RESPONSE]), 0.7, (count, 3)).clip(8, 512).astype(int)
    for number, (prompt, *responses) in enumerate(lengths.tolist()):
        chosen, rejected = (aligned(max(1, 2 * tokens // 3)) for tokens in responses)
        prompts = rng.integers(5, 30_000, (2, prompt), dtype=np.int32)
        yield AlignedPair(f"{number}", *prompts, chosen, rejected, 5 * chosen.num_spans, 5 * rejected.num_spans)


def scores_of(pair: AlignedPair) -> dict[str, dict[str, np.ndarray]]:
    """What every scorer says of the pair's spans."""
    rng = np.random.default_rng(int(pair.id))
    return {
        side: {name: -rng.random(pair.response(number).num_spans, np.float32) for name in SCORERS}
        for number, side in enumerate(SIDES)
    }


def megabytes() -> float:
    """The most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(found: dict[str, Any], name: str, action: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = action()
    found[name] = {"seconds": time.perf_counter() - began, "megabytes": megabytes()}
    print(f"{name:36} {found[name]['seconds']:8.1f} s   at most {found[name]['megabytes']:8,.0f} MB so far", flush=True)
    return result


def preparing(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Pairs of text prepared with two real tokenizers, by all cores, and opened again."""
    from ctpd_jax.text.parallel import Source, prepare_in_processes, workers_for
    from ctpd_jax.text.preferences import load_preferences
    from ctpd_jax.text.prepare import Limits, prepare_pairs
    from ctpd_jax.text.prompts import load_text_model

    raw, _ = load_preferences(str(arguments.data), "train", arguments.texts)
    sources = Source(arguments.teacher, "auto", ""), Source(arguments.student, "auto", "")
    models, limits = (load_text_model(*sources[0]), load_text_model(*sources[1])), Limits(512, 512)
    timed(found, f"{len(raw):,} texts by one process", lambda: prepare_pairs(raw, *models, limits))
    workers = workers_for(max(len(raw), 1 << 16))
    timed(
        found,
        f"{len(raw):,} texts by {workers} processes",
        lambda: prepare_in_processes(raw, sources, models, limits, workers),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What surrounds the devices when there are many pairs.")
    parser.add_argument("--pairs", type=int, default=61_000)
    parser.add_argument("--dir", type=Path, help="keep the store there; an existing one is opened")
    parser.add_argument("--data", type=Path, help="texts to prepare")
    parser.add_argument("--texts", type=int, default=8192, help="of them, at most")
    parser.add_argument("--teacher", help="a folder or hub id, for its tokenizer")
    parser.add_argument("--student", help="likewise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    if arguments.data:
        if not (arguments.teacher and arguments.student):
            parser.error("--data needs --teacher and --student.")
        preparing(arguments, found)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.dir or Path(temporary)
        count, config = arguments.pairs, default_config()
        # 1. The prepared pairs, and the store made of them.
        if not (folder / "store" / "manifest.json").exists():
            pairs = list(pairs_of(count))
            timed(found, "prepared pairs kept", lambda: prepared.write(folder / "pairs", pairs, Counters(), {}))
            del pairs
            kept, _ = prepared.read(folder / "pairs", {}) or sys.exit("the prepared pairs cannot be read")
            ranges = shard_ranges(count, config.annotate.pairs_per_shard)
            scored = lambda shard, part: (to_record(kept[i], scores_of(kept[i])) for i in part)  # noqa: E731
            timed(found, "store written", lambda: write_store(folder / "store", ranges, scored, SCORERS, {}))
        timed(found, "prepared pairs opened", lambda: prepared.read(folder / "pairs", {}))
        # 2. What `ctpd train` does before its first update, models and compiling aside.
        store = timed(found, "store opened, checksums held", lambda: open_store(folder / "store"))
        items, _ = timed(found, "read, weighed", lambda: training_items(store, config.weights, config.train, 0))
        rows = PackingConfig("shared", packed=True, row_multiple=16)
        updates = timed(found, "rows planned", lambda: plan_updates(items, 0, count // 16, 16, 16, rows))
        timed(found, "first update laid out", lambda: updates.batches(0))
    write(arguments.json, "pod", pairs=count, steps=found)
    print(json.dumps({name: round(value["seconds"], 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
