"""The attention back ends: which can do what, as data; the choice among them; and each of them built.

plain            written out here, softmax in float32; can do everything
xla              jax.nn.dot_product_attention as XLA compiles it
cudnn            the same by cuDNN's flash attention
splash           Pallas' splash attention for TPUs, who sees whom as an array
splash_segments  the same, who sees whom from the segment ids: for rows in which no prompt is shared
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ctpd_jax.errors import UserError
from ctpd_jax.models import attention
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.schema import RowLayout
from ctpd_jax.sharding import on_own_rows

Backend = Literal["plain", "xla", "cudnn", "splash", "splash_segments"]
_SPLASH: tuple[Backend, ...] = ("splash_segments", "splash")  # the preferred one first

# Back ends, what a run may ask of them, and the reason why these cannot be had of those. All else is supported.
_REASONS = (
    (("xla", "cudnn"), ("soft cap",), "jax.nn.dot_product_attention has no soft cap of the scores"),
    (("cudnn",), ("head_dim over 128",), "larger heads need a Hopper GPU, which is not tested"),
    (("cudnn",), ("head_dim not by 8",), "it takes heads of a multiple of 8 dimensions"),
    (("cudnn",), ("float32",), "it computes in bfloat16 only"),
    (("cudnn",), ("cpu", "other gpu", "tpu"), "it runs on NVIDIA GPUs of compute capability 8.0 or later"),
    (_SPLASH, ("float32",), "it would multiply float32 with the precision of bfloat16"),
    (_SPLASH, ("cpu", "gpu", "other gpu"), "its kernels are for TPUs; elsewhere they are only interpreted, for tests"),
    (("splash_segments",), ("prompt sharing",), "segment ids cannot say that a response reads its prompt"),
)
REFUSED: dict[tuple[str, str], str] = {}
for _backends, _features, _reason in _REASONS:
    REFUSED |= dict.fromkeys(product(_backends, _features), _reason)

# What config.attention may be, and the back ends that it stands for, the preferred ones first.
CHOICES: Mapping[str, tuple[Backend, ...]] = {
    "plain": ("plain",),
    "xla": ("xla",),
    "cudnn": ("cudnn",),
    "splash": _SPLASH,
}
_AUTO: Mapping[str, tuple[Backend, ...]] = {"tpu": (*_SPLASH, "plain"), "gpu": ("cudnn", "plain")}


def platform_of(device: Any) -> str:
    """Return the platform of a jax.Device; a "gpu" has cuDNN's flash attention, an "other gpu" has not."""
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return "gpu" if capability and int(capability[1]) >= 8 else "other gpu"


def usual_dtype(platform: str) -> str:
    """Return the dtype of a run's products where nothing else is asked for: what the platform multiplies fastest."""
    return "bfloat16" if platform in ("tpu", "gpu") else "float32"


def check_backend(
    backend: Backend,
    config: DecoderConfig,
    dtype: str | None = None,
    shared: bool | None = None,
    platform: str | None = None,
) -> None:
    """Refuse a back end by name where it cannot do what is asked of it; what is None is not checked.

    Args:
        dtype: of the computation, "float32" or "bfloat16".
        shared: whether a prompt may be shared by several responses of a row (rows.layout "shared").
        platform: see `platform_of`.

    Raises:
        UserError: the first reason against it.
    """
    # What the config and the run ask for; "packed segments" every back end has.
    asked = {
        "soft cap": config.attention_softcap is not None,
        "sliding window": any(kind.window is not None for kind in config.kinds),
        "prompt sharing": shared,
        "head_dim over 128": config.head_dim > 128,
        "head_dim not by 8": config.head_dim % 8 != 0,
        dtype: True,
        platform: True,
    }
    for feature, needed in asked.items():
        if feature is not None and needed and (backend, feature) in REFUSED:
            raise UserError(
                f"The attention back end {backend!r} cannot be used with {feature}: {REFUSED[backend, feature]}. "
                "Set --config.attention=auto, or plain, which can do everything."
            )


def choose_backend(choice: str, config: DecoderConfig, dtype: str, shared: bool, platform: str) -> Backend:
    """Return the back end that config.attention stands for; "auto" takes the fastest that can do it.

    Raises UserError where what was asked for by name cannot do it.
    """
    # The last candidate is not tried but checked: its reason is the one to tell.
    candidates = _AUTO.get(platform, ("plain",)) if choice == "auto" else CHOICES[choice]
    for backend in candidates[:-1]:
        try:
            check_backend(backend, config, dtype, shared, platform)
        except UserError:
            continue
        return backend
    check_backend(candidates[-1], config, dtype, shared, platform)
    return candidates[-1]


# ------------------------------------------------------------------------------------------------ building them

# Queries [R, T, H, D], keys and values [R, T, K, D], the kind of the layer, int32 [] and maybe traced -> [R, T, H, D].
# Letters as in `attention.py`.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def make_attend(backend: Backend, config: DecoderConfig, row: RowLayout, mesh: Mesh | None = None) -> Attend:
    """Make the function by which every layer attends; what is the same for all layers is computed here, once.

    "splash_segments" takes it for granted that every token's parent is its own segment, that a segment is one piece of
    its row and that its positions rise by one. On a `mesh` each device attends in its own rows, with its own heads:
    nothing is exchanged.

    Raises:
        UserError: the back end cannot do what the config asks for; what depends on dtype, device and rows is not known
            here and for the caller to check, with `check_backend`.
    """
    check_backend(backend, config)
    scale, softcap = config.attention_scale, config.attention_softcap
    if backend in ("splash", "splash_segments"):
        from ctpd_jax.models import splash  # Pallas takes an eighth of a second to import, and few need it

        if backend == "splash_segments":
            windows = tuple(kind.window for kind in config.kinds)
            return splash.segmented_attend(windows, jnp.asarray(row.segment), scale, softcap, mesh)
        return splash.masked_attend(attention.masks(config, row), scale, softcap, mesh)
    # The others take who sees whom as an array.
    seen = attention.masks(config, row)
    if backend == "plain":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        plain = partial(attention.attend, scale=scale, softcap=softcap, row_by_row=platform == "cpu")
        local = on_own_rows(mesh, plain)
    else:
        local = on_own_rows(mesh, _library_attend("cudnn" if backend == "cudnn" else "xla", seen.shape[-1], scale))
    return lambda q, k, v, kind: local(q, k, v, seen[kind])


def _library_attend(implementation: Literal["xla", "cudnn"], length: int, scale: float) -> Callable[..., jax.Array]:
    """Make jax.nn.dot_product_attention a function of (q, k, v, seen), with seen, bool [R, T, T], as its mask."""
    if implementation == "cudnn" and length % 2:
        raise UserError(
            f"The attention back end 'cudnn' needs rows of an even length, not {length}: make "
            "config.rows.multiple even."
        )

    @jax.checkpoint
    def library(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        # Without the precision float32 would be multiplied as bfloat16 on a TPU and as TF32 on a GPU.
        with jax.default_matmul_precision("highest"):
            return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale, implementation=implementation)

    return library
