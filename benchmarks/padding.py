"""How much of the batches is padding, for every layout, packed and not; and what a shared prompt saves.

    python benchmarks/padding.py PAIRS.jsonl TOKENIZER
    python benchmarks/padding.py PAIRS.jsonl TOKENIZER --multiple 128 --json padding.json

PAIRS are preference pairs as `ctpd run` reads them, TOKENIZER is a folder or a hub id. The batches are those of a
training stage, one after the other; no model is needed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from timing import write

from ctpd_jax.annotate.scorer import plain_item
from ctpd_jax.data.loader import plan_updates, steps_per_epoch
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import PairItem
from ctpd_jax.errors import UserError
from ctpd_jax.text.preferences import load_preferences
from ctpd_jax.text.prepare import Limits, prepare_pairs
from ctpd_jax.text.prompts import load_text_model

# Pairs of an update, all of them in one pass, and devices: what the share of padding may be, where it is bounded.
PACKED = {(16, 1): 0.13, (64, 1): 0.05, (16, 8): None, (64, 8): None}


def measure(
    items: list[PairItem], rows: PackingConfig, batch_size: int, micro_batch: int, epochs: int
) -> dict[str, Any]:
    """The batches of `epochs` passes over the items, counted."""
    steps = epochs * steps_per_epoch(len(items), batch_size)
    began = time.perf_counter()
    updates = plan_updates(items, 0, steps, batch_size, micro_batch, rows)
    seconds = time.perf_counter() - began
    tokens = size = scored = slots = 0
    for step in range(steps):
        for batch in updates.batches(step):
            tokens, size = tokens + int((batch.layout.segment > 0).sum()), size + batch.tokens.size
            scored, slots = scored + int((batch.pair >= 0).sum()), slots + batch.pair.size
    return {
        "layout": rows.layout,
        "packed": rows.packed,
        "pairs": batch_size,
        "micro_batch": micro_batch,
        "devices": rows.row_multiple,
        "tokens_per_pair": tokens / (steps * batch_size),
        "size_per_pair": size / (steps * batch_size),
        "padding": 1 - tokens / size,
        "padding_of_scored": 1 - scored / slots,
        "shapes": [[shape.rows, shape.length, shape.scored] for shape in updates.shapes],
        "plan_seconds": seconds,
    }


def with_long_prompts(items: list[PairItem], tokens: int) -> list[PairItem]:
    """The same responses behind prompts of `tokens` tokens each, made from the prompts one after another."""
    stream = np.concatenate([item.prompt for item in items])
    starts = np.cumsum([0] + [len(item.prompt) for item in items[:-1]])
    return [
        item._replace(prompt=np.take(stream, np.arange(start, start + tokens), mode="wrap"))
        for item, start in zip(items, starts)
    ]


def table(records: list[dict[str, Any]]) -> str:
    lines = ["layout    packed  pairs  a pass  devices  padding  of scored  planned in  shapes (rows, length, scored)"]
    for r in records:
        shapes = " ".join(f"({rows}, {length}, {scored})" for rows, length, scored in r["shapes"])
        lines.append(
            f"{r['layout']:9} {'yes' if r['packed'] else 'no':6} {r['pairs']:6} {r['micro_batch']:7} {r['devices']:8}"
            f" {r['padding']:8.1%} {r['padding_of_scored']:10.1%} {r['plan_seconds']:9.2f} s  {shapes}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, at most")
    parser.add_argument("--response", type=int, default=512, help="tokens of a response, at most")
    parser.add_argument("--long-prompt", type=int, default=400, help="tokens of each prompt, for the shared prompts")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--buckets", type=int, default=4)
    parser.add_argument("--multiple", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")
    args = parser.parse_args()
    try:
        text = load_text_model(args.tokenizer, "auto")
        raw, _ = load_preferences(args.pairs, "train", None)
        pairs, _ = prepare_pairs(raw, text, text, Limits(args.prompt, args.response))
    except UserError as error:
        parser.error(str(error))
    items = [plain_item(pair, "student") for pair in pairs]
    lengths = [[len(item.prompt), *(len(response.tokens) for response in item.responses)] for item in items]
    means = np.mean(lengths, axis=0)
    print(
        f"{len(items):,} pairs; tokens of prompt, chosen, rejected on average: " + ", ".join(f"{n:.0f}" for n in means)
    )

    def rows(layout: str, packed: bool, devices: int = 1) -> PackingConfig:
        return PackingConfig(layout, packed, args.buckets, args.multiple, row_multiple=devices)

    records = [
        measure(items, replace(rows("response", False), buckets=buckets), 16, micro_batch, args.epochs)
        for buckets, micro_batch in ((1, 16), (args.buckets, 16), (args.buckets, 4))
    ]
    missed = []
    for layout in ("response", "shared"):
        for (batch_size, devices), bound in PACKED.items():
            found = measure(items, rows(layout, True, devices), batch_size, batch_size, args.epochs)
            records.append(found)
            if bound is not None and found["padding"] > bound:
                missed.append(f"{layout}, {batch_size} pairs: {found['padding']:.1%}, at most {bound:.0%} wanted")
    print(table(records))
    print("Bounds on one device, 13% at 16 pairs and 5% at 64: " + ("; ".join(missed) or "kept") + ".")

    long_items = with_long_prompts(items, args.long_prompt)
    apart, shared = (measure(long_items, rows(layout, True), 64, 64, args.epochs) for layout in ("response", "shared"))
    prompt = args.long_prompt
    expected = prompt / (2 * prompt + means[1] + means[2])
    print(f"\nPrompts of {prompt} tokens, 64 pairs an update:")
    print(table([apart, shared]))
    for name, what in (("tokens_per_pair", "tokens"), ("size_per_pair", "tokens, padding included")):
        saved = 1 - shared[name] / apart[name]
        print(f"a shared prompt saves {saved:.1%} of {what}: {apart[name]:.0f} a pair apart, {shared[name]:.0f} shared")
    print(f"arithmetic, one prompt of two: {expected:.1%}")
    write(args.json, "padding", records=[*records, apart, shared])


if __name__ == "__main__":
    main()
