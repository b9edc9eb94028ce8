"""Which attention back end can do what, as data; `attention.make_attend` builds them.

plain            written out here, softmax in float32; can do everything
xla              jax.nn.dot_product_attention as XLA compiles it
cudnn            the same by cuDNN's flash attention
splash           Pallas' splash attention for TPUs, who sees whom as an array
splash_segments  the same, who sees whom from the segment ids: for rows in which no prompt is shared
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig

Backend = Literal["plain", "xla", "cudnn", "splash", "splash_segments"]
BACKENDS: tuple[Backend, ...] = ("plain", "xla", "cudnn", "splash", "splash_segments")

# What a run may ask of a back end. A "gpu" has cuDNN's flash attention, an "other gpu" has not.
FEATURES = (
    "soft cap", "sliding window", "packed segments", "prompt sharing", "head_dim over 128", "head_dim not by 8",
    "float32", "bfloat16", "cpu", "gpu", "other gpu", "tpu",
)  # fmt: skip

_NO_SOFTCAP = "jax.nn.dot_product_attention has no soft cap of the scores"
_NOT_NVIDIA = "it runs on NVIDIA GPUs of compute capability 8.0 or later"
_NOT_TPU = "its kernels are for TPUs; elsewhere they are only interpreted, for tests"
# Everything that is not here is supported.
REFUSED: Mapping[tuple[str, str], str] = {
    ("xla", "soft cap"): _NO_SOFTCAP,
    ("cudnn", "soft cap"): _NO_SOFTCAP,
    ("cudnn", "head_dim over 128"): "larger heads need a Hopper GPU, which is not tested",
    ("cudnn", "head_dim not by 8"): "it takes heads of a multiple of 8 dimensions",
    ("cudnn", "float32"): "it computes in bfloat16 only",
    **{("cudnn", platform): _NOT_NVIDIA for platform in ("cpu", "other gpu", "tpu")},
    **{
        (splash, feature): why
        for splash in ("splash", "splash_segments")
        for feature, why in {
            "float32": "it would multiply float32 with the precision of bfloat16",
            "cpu": _NOT_TPU,
            "gpu": _NOT_TPU,
            "other gpu": _NOT_TPU,
        }.items()
    },
    ("splash_segments", "prompt sharing"): "segment ids cannot say that a response reads its prompt",
}

# What config.attention may be, and the back ends that it stands for, the preferred ones first.
CHOICES: Mapping[str, tuple[Backend, ...]] = {
    "plain": ("plain",),
    "xla": ("xla",),
    "cudnn": ("cudnn",),
    "splash": ("splash_segments", "splash"),
}
_AUTO: Mapping[str, tuple[Backend, ...]] = {"tpu": (*CHOICES["splash"], "plain"), "gpu": ("cudnn", "plain")}


def platform_of(device: Any) -> str:
    """A jax.Device as one of FEATURES' platforms."""
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return "gpu" if capability and int(capability[1]) >= 8 else "other gpu"


def features(
    config: DecoderConfig, dtype: str | None = None, shared: bool | None = None, platform: str | None = None
) -> list[str]:
    """What a decoder asks of its back end; None says that it is not known."""
    asked = {
        "soft cap": config.attention_softcap is not None,
        "sliding window": any(kind.window is not None for kind in config.kinds),
        "prompt sharing": shared,
        "head_dim over 128": config.head_dim > 128,
        "head_dim not by 8": config.head_dim % 8 != 0,
    }
    return [name for name, needed in asked.items() if needed] + [name for name in (dtype, platform) if name]


def check_backend(
    backend: Backend,
    config: DecoderConfig,
    dtype: str | None = None,
    shared: bool | None = None,
    platform: str | None = None,
) -> None:
    """Refuses a back end by name where it cannot do what is asked of it; what is None is not checked.

    Args:
        dtype: of the computation, "float32" or "bfloat16".
        shared: whether a prompt may be shared by several responses of a row (rows.layout "shared").
        platform: see `platform_of`.

    Raises:
        UserError: the first reason against it.
    """
    for feature in features(config, dtype, shared, platform):
        if (backend, feature) in REFUSED:
            raise UserError(
                f"The attention back end {backend!r} cannot be used with {feature}: {REFUSED[backend, feature]}. "
                "Set --config.attention=auto, or plain, which can do everything."
            )


def choose_backend(choice: str, config: DecoderConfig, dtype: str, shared: bool, platform: str) -> Backend:
    """The back end that config.attention stands for; "auto" takes the fastest that can do it.

    Raises:
        UserError: what was asked for by name cannot do it.
    """
    candidates = _AUTO.get(platform, ("plain",)) if choice == "auto" else CHOICES[choice]
    for backend in candidates[:-1]:
        try:
            check_backend(backend, config, dtype, shared, platform)
        except UserError:
            continue
        return backend
    check_backend(candidates[-1], config, dtype, shared, platform)
    return candidates[-1]
