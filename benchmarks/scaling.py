"""How the time of a training pass grows with length, pairs, vocabulary and layers: fitted exponents.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --rounds 9 --json scaling.json

One pass forward and backward of a small Llama on made-up pairs, as `train` runs it. One size grows at a time, the
others stay. An exponent of 1 is time in proportion; attention pulls that of the length towards 2, and what does not
depend on a size pulls its exponent towards 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import ROUNDS, alternate, medians, write

from ctpd_jax.data.loader import plan_updates
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.job.recipe import recipe
from ctpd_jax.models.config import DecoderConfig, LayerKind
from ctpd_jax.models.decoder import init_params
from ctpd_jax.settings import default_config
from ctpd_jax.sharding import make_mesh

MODEL = DecoderConfig(
    family="llama",
    vocab_size=32_768,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    kinds=(LayerKind(),),
    layer_kinds=(0,) * 8,
    attention_scale=0.125,
    tied=True,
)
SIZES = {
    "length": (256, 512, 1024, 2048),  # tokens of a response and its prompt
    "pairs": (1, 2, 4, 8),
    "vocabulary": (16_384, 32_768, 65_536, 131_072),
    "layers": (4, 8, 16, 32),
}
USUAL = {"length": 256, "pairs": 2, "vocabulary": MODEL.vocab_size, "layers": MODEL.num_layers}


def training_pass(length: int, pairs: int, vocabulary: int, layers: int) -> Callable[[], Any]:
    """One pass over so many pairs, whose responses and prompts have `length` tokens together."""
    decoder = replace(MODEL, vocab_size=vocabulary, num_layers=layers, layer_kinds=(0,) * layers)
    what = recipe(default_config(), "train", decoder, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    response = ScoredResponse(np.ones(length * 3 // 4, np.int32), np.ones(length * 3 // 4, np.float32), start=0.0)
    items = [PairItem(np.ones(length // 4, np.int32), response, response)] * pairs
    (batch,) = plan_updates(items, 0, 1, pairs, pairs, PackingConfig()).batches(0)
    accumulate, _ = what.programs()
    params = init_params(decoder, jax.random.key(0))
    gradient = jax.tree.map(jnp.zeros_like, params)

    def run() -> None:
        nonlocal gradient
        gradient, _ = jax.block_until_ready(accumulate(params, {}, gradient, batch))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    exponents, times = {}, {}
    for name, sizes in SIZES.items():
        sides = {str(size): training_pass(**(USUAL | {name: size})) for size in sizes}
        times[name] = medians(alternate(sides, args.rounds))
        exponents[name] = float(np.polyfit(np.log(sizes), np.log(list(times[name].values())), 1)[0])
        cells = ", ".join(f"{int(size):,}: {seconds:.2f} s" for size, seconds in times[name].items())
        print(f"{name:10} exponent {exponents[name]:.2f}   {cells}", flush=True)
    write(args.json, "scaling", exponents=exponents, seconds=times)


if __name__ == "__main__":
    main()
