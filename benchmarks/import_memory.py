"""How much memory the import of a large checkpoint takes: the peak of the process (VmHWM) against the weights' size.

    python benchmarks/import_memory.py                          # 2 billion parameters, bfloat16, one CPU device
    python benchmarks/import_memory.py --layers 4 --json import_memory.json

Writes a Llama-shaped checkpoint of several files into a temporary folder (4.1 GB; TMPDIR says where), imports it in a
process of its own with `load_hf(folder, dtype="bfloat16")`, and removes it. Linux only: the peak stands in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from timing import write

BOUND = 1.5e9  # bytes that the import may take besides the parameters
SHARD = 2_000_000_000
_POOL = 1 << 20  # random values, of which every tensor is a repetition from a place of its own


def config_of(layers: int) -> dict[str, Any]:
    """config.json of a Llama of 0.53 billion parameters in the vocabulary and 0.061 billion in each layer."""
    return {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the synthetic checkpoint holds under a name: bfloat16, other values under every name."""
    pool = np.random.default_rng(0).normal(scale=0.02, size=_POOL).astype(np.float32).astype(ml_dtypes.bfloat16)
    return np.resize(np.roll(pool, zlib.crc32(name.encode())), shape)


def write_checkpoint(folder: Path, layers: int) -> int:
    """Writes the model folder and returns the bytes of its tensors."""
    from ctpd_jax.artifacts import write_json
    from ctpd_jax.models.hf.config import from_hf, to_hf
    from ctpd_jax.models.hf.load import checkpoint_shapes, tensor_names, tensor_table
    from ctpd_jax.models.hf.save import write_weights

    config = from_hf(config_of(layers))
    shapes, tensors, dtype = checkpoint_shapes(config), [], np.dtype(ml_dtypes.bfloat16)
    for path, entry in tensor_table(config).items():
        shape = shapes[path][entry.count("{}") :]
        for name in tensor_names(config, entry):
            tensors.append((name, shape, dtype, lambda name=name, shape=shape: values(name, shape)))
    write_weights(folder, tensors, SHARD)
    write_json(folder / "config.json", to_hf(config, "bfloat16"))
    return sum(2 * int(np.prod(shape)) for _, shape, *_ in tensors)


def import_and_measure(folder: Path) -> dict[str, Any]:
    """Runs in the process that is measured. Raises AssertionError where a parameter is not what was written."""
    import jax

    from ctpd_jax.models.hf.load import load_hf, tensor_table

    jax.devices()
    before, start = peak(), time.perf_counter()
    config, params = load_hf(folder, dtype="bfloat16")
    jax.block_until_ready(params)
    seconds, after = time.perf_counter() - start, peak()
    for path, entry in tensor_table(config).items():
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        last = config.num_layers - 1
        found = np.asarray(leaf[last] if "{}" in entry else leaf)
        assert np.array_equal(found, values(entry.format(last), found.shape)), entry
    return {"before": before, "peak": after, "seconds": seconds, "jax": jax.__version__}


def peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("This system does not tell a process's peak memory: there is no VmHWM in /proc/self/status.")


def measure(layers: int) -> dict[str, Any]:
    """Writes a checkpoint, imports it in another process, removes it; bytes of its tensors and of the peak."""
    with tempfile.TemporaryDirectory(prefix="ctpd-import-") as temporary:
        folder = Path(temporary)
        size = write_checkpoint(folder, layers)
        child = [sys.executable, str(Path(__file__).resolve()), "--inside", temporary]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(child, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"The import failed:\n{done.stderr[-4000:]}")
        return {"layers": layers, "size": size, "files": len(list(folder.glob("*.safetensors"))), "bound": BOUND} | (
            json.loads(done.stdout.splitlines()[-1])
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=25, help="25 make 2.05 billion parameters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(import_and_measure(arguments.inside)))
        return
    found = measure(arguments.layers)
    print(
        f"{found['size'] / 2e9:.2f} billion parameters, {found['size'] / 1e9:.2f} GB in {found['files']} files, "
        f"imported in {found['seconds']:.1f} s\n"
        f"peak of the process (VmHWM): {found['peak'] / 1e9:.2f} GB, the weights and "
        f"{(found['peak'] - found['size']) / 1e9:.2f} GB (at most {BOUND / 1e9} GB are allowed; Python and JAX alone "
        f"took {found['before'] / 1e9:.2f} GB)"
    )
    write(arguments.json, "import_memory", **found)


if __name__ == "__main__":
    main()
