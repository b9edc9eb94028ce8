"""Random preference files: either pairs come out, the same ones twice, or a sentence that names the file."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ctpd_jax.errors import UserError
from ctpd_jax.text.columns import Reading
from ctpd_jax.text.dialogue import HH_SEPARATOR
from ctpd_jax.text.preferences import load_preferences, load_prompts, read_preferences
from fuzz import Found, peak_megabytes, texts

MOST_SECONDS = 20.0
MOST_MEGABYTES = 1500
WORDS = (
    "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "[INST] hi [/INST]",
    "</s>",
    "<eos>",
    "\n\nHuman: a\n\nAssistant: b",
)
KEYS = (
    *(
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "conversations",
        "history",
        "system",
        "question",
        "instruction",
        "input",
    ),
    *(
        "completions",
        "completion",
        "response",
        "responses",
        "answers",
        "answer",
        "output",
        "text",
        "context",
        "rank",
        "score",
    ),
    *("response_a", "response_b", "response1", "response2", "response_0", "response_1", "better_response_id", "winner"),
    *("winner_model_a", "winner_model_b", "winner_tie", "human_ref_A", "human_ref_B", "labels", "label", "preference"),
    *("weight", "margin", "score_chosen", "score_rejected", "id", "role", "content", "from", "value", "type", "tools"),
    *("images", "input_ids", "chosen_input_ids", "overall_preference", "preference_strength", "metadata", "Prompt", ""),
)
ROLES = ("user", "assistant", "system", "human", "gpt", "tool", "USER", "", "model", "developer")
NUMBERS = (0, 1, -1, 0.5, 2**63, -(2**64), 10**400, 1e308, float("inf"), float("nan"), True, False, None, -0.0)


def text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.1:
        return ""
    if kind < 0.15:
        return texts.text(rng, WORDS) + rng.choice(("\ud800", "\udcff", "\udbff\udbff"))
    if kind < 0.2:
        return json.dumps([{"role": "user", "content": texts.text(rng, WORDS)}, {"role": "assistant", "content": "a"}])
    if kind < 0.23:
        return rng.choice(("[", "[{'role': ", "{'content': 1}", "[[", '[{"role": "user"', "[" * 9999)) + texts.text(
            rng, ()
        )
    if kind < 0.26:
        return texts.text(rng, WORDS) * rng.randrange(1, 3000)
    return texts.text(rng, WORDS)


def messages(rng: random.Random) -> list[Any]:
    said = [{"role": rng.choice(ROLES[:2]), "content": text(rng)} for _ in range(rng.randrange(4))]
    for message in said:
        if rng.random() < 0.15:
            message[rng.choice(KEYS)] = value(rng, 1)
        if rng.random() < 0.1:
            message["role"] = value(rng, 0) if rng.random() < 0.3 else rng.choice(ROLES)
    return said


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any value of JSON, and what Python's decoder takes besides."""
    kind = rng.randrange(9)
    if kind < 3 or not depth:
        return text(rng)
    if kind == 3:
        return rng.choice(NUMBERS)
    if kind == 4:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(KEYS): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 6:
        return messages(rng)
    if kind == 7:
        return [{"completion": text(rng), "rank": rng.choice(NUMBERS)} for _ in range(rng.randrange(4))]
    return [text(rng) for _ in range(2)]


def row(rng: random.Random) -> Any:
    """A row, of a known layout mostly, with something wrong with it sometimes."""
    kind = rng.random()
    if kind < 0.5:
        found: dict[str, Any] = {"prompt": text(rng), "chosen": text(rng), "rejected": text(rng)}
    elif kind < 0.65:
        asked = messages(rng)
        found = {side: [*asked, {"role": "assistant", "content": text(rng)}] for side in ("chosen", "rejected")}
    elif kind < 0.72:
        asked = f"\n\nHuman: {text(rng)}{HH_SEPARATOR}"
        found = {side: f"{asked} {text(rng)}" for side in ("chosen", "rejected")}
    elif kind < 0.8:
        found = {"prompt": text(rng), "completions": value(rng), "response_a": text(rng), "response_b": text(rng)}
        found["winner"] = rng.choice(("a", "b", "model_a", "tie", 0, 1, 2, None))
    elif kind < 0.97:
        found = {rng.choice(KEYS): value(rng) for _ in range(rng.randrange(6))}
    else:
        return value(rng)
    while rng.random() < 0.2:
        found[rng.choice(KEYS)] = value(rng)
    if rng.random() < 0.05 and found:
        del found[rng.choice(list(found))]
    return found


# ------------------------------------------------------------------------------------------------ files


def _json_text(one: Any, rng: random.Random) -> str:
    said = json.dumps(one, ensure_ascii=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.03:
        return said[: rng.randrange(len(said) + 1)]
    if kind < 0.06:
        place = rng.randrange(len(said) + 1)
        return (
            said[:place]
            + rng.choice(("}", "{", '"', "\\", "\x00", "\\ud800", "NaN", "[" * 20000, "1" * 5000))
            + said[place:]
        )
    if kind < 0.07:
        return '{"prompt": ' + "[" * 30000 + "]" * 30000 + "}"
    if kind < 0.08:
        return said.replace("{", '{"prompt": "x", ', 1)
    return said


def _lines(rng: random.Random, rows: list[Any]) -> bytes:
    lines = [_json_text(one, rng) for one in rows]
    return rng.choice(("\n", "\n", "\r\n", "\n\n", "\r")).join(lines).encode("utf-8", "surrogatepass")


def _array(rng: random.Random, rows: list[Any]) -> bytes:
    inside = rng.choice((",", ",\n", " , ", "")).join(_json_text(one, rng) for one in rows)
    whole = "[" + inside + rng.choice(("]", "]", "]", "", ",]", "] x"))
    return whole.encode("utf-8", "surrogatepass")


def _table(rng: random.Random, rows: list[Any]) -> bytes:
    mark = rng.choice((",", ",", ";", "\t"))
    columns = rng.choice((("prompt", "chosen", "rejected"), tuple(rng.choices(KEYS, k=4)), ()))

    def cell(one: Any) -> str:
        said = one if isinstance(one, str) else json.dumps(one)
        return said if rng.random() < 0.1 else '"' + said.replace('"', '""') + '"'

    lines = [mark.join(columns)]
    lines += [mark.join(cell(one.get(name)) for name in columns) for one in rows if isinstance(one, dict)]
    return rng.choice(("\n", "\r\n", "\r")).join(lines).encode("utf-8", "surrogatepass")


def _parquet(rng: random.Random, rows: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    columns: dict[str, Any] = {}
    for name in rng.choice((("prompt", "chosen", "rejected"), tuple(dict.fromkeys(rng.choices(KEYS, k=4))))):
        cells = [one.get(name) if isinstance(one, dict) else None for one in rows]
        try:
            columns[name] = pyarrow.array(cells)
        except (pyarrow.ArrowException, ValueError, OverflowError, UnicodeEncodeError, TypeError):
            said = [json.dumps(one).encode() if one is not None else None for one in cells]
            columns[name] = pyarrow.array(said, pyarrow.binary() if rng.random() < 0.5 else pyarrow.string())
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression=rng.choice(("none", "zstd", "snappy")))
    except pyarrow.ArrowException:  # a record without fields cannot be stored
        return b""
    return sink.getvalue().to_pybytes()


KINDS: dict[str, Callable[[random.Random, list[Any]], bytes]] = {
    ".jsonl": _lines, ".json": _array, ".csv": _table, ".tsv": _table, ".parquet": _parquet
}  # fmt: skip


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Other encodings, bytes that are no text, ends that are missing."""
    kind = rng.random()
    if kind < 0.7:
        return data
    if kind < 0.76:
        return b"\xef\xbb\xbf" + data
    if kind < 0.8:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-16-be", "utf-7")))
    if kind < 0.84:
        return data.decode("utf-8", "replace").encode(rng.choice(("latin-1", "cp1252", "shift-jis")), "replace")
    if kind < 0.9:
        return data[: rng.randrange(len(data) + 1)]
    if kind < 0.97:
        place = rng.randrange(len(data) + 1)
        return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place + rng.randrange(9) :]
    return rng.choice((b"", b"\n", b"\x00" * 99, rng.randbytes(999), b"[]", b"{}", b"null", b"[" * 99999))


def write(rng: random.Random, folder: Path) -> tuple[Path, int]:
    """A random file in `folder`, or a folder where a file should be; and how many rows were meant to be in it."""
    rows = [row(rng) for _ in range(rng.choice((0, 1, 2, 5, 9, 20, 40)))]
    if rows and rng.random() < 0.2:
        rows += [rng.choice(rows) for _ in range(3)]
    if rng.random() < 0.01:
        rows.append({"prompt": "long", "chosen": "a" * 5_000_000, "rejected": "b\n" * 20_000})
    suffix = rng.choice(list(KINDS))
    path = folder / f"train{suffix}"
    if rng.random() < 0.02:
        path.mkdir()
        return path, 0
    data = damaged(rng, KINDS[suffix](rng, rows))
    kind = rng.random() if suffix != ".parquet" else 1.0
    if kind < 0.1:
        path = folder / f"train{suffix}.gz"
        data = damaged(rng, gzip.compress(data)) if rng.random() < 0.3 else gzip.compress(data)
    elif kind < 0.2:
        path = folder / f"train{suffix}.zst"
        packed = pyarrow.compress(data, "zstd", asbytes=True)
        data = damaged(rng, packed) if rng.random() < 0.3 else packed
    path.write_bytes(data)
    return path, len(rows)


# ------------------------------------------------------------------------------------------------ what must hold


def reading(rng: random.Random) -> Reading:
    ignored = frozenset(rng.choices(KEYS, k=2)) if rng.random() < 0.3 else frozenset()
    named = {"prompt": rng.choice(KEYS), "chosen": rng.choice(KEYS)} if rng.random() < 0.1 else {}
    ranked, strip = rng.choice(("best_worst", "all")), rng.random() < 0.3
    return Reading(named, ignored, ranked, strip, rng.choice((0.0, 0.0, 0.5)))


def check(path: Path, limit: int | None, how: Reading) -> str:
    """Read a file; returns how that ended. Raises where an invariant is broken."""
    began = time.thread_time()
    separator = HH_SEPARATOR
    spec = str(path)
    try:
        pairs, report = read_preferences(spec, "train", limit, None, separator, how)
    except UserError as error:
        said = str(error)
        assert str(path) in said and len(said.split()) > 4, f"not told by its name: {said}"
        return "refused"
    again, counted = read_preferences(spec, "train", limit, None, separator, how)
    assert (again, counted) == (pairs, report), "read twice, two things"
    assert report["kept"] == len(pairs) and (limit is None or len(pairs) <= limit)
    assert len({pair.id for pair in pairs}) == len(pairs), "two pairs of one id"
    for pair in pairs:
        said = [pair.chosen, pair.rejected, *(message.content for message in pair.prompt)]
        "".join(said).encode("utf-8")
        assert pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected
        assert all(message.role in ("system", "user", "assistant") for message in pair.prompt)
        assert pair.weight > 0 and pair.weight < float("inf") and pair.source.startswith(str(path))
        assert pair.source.removeprefix(f"{path}:").isdigit(), "the line is not told"
    for reason in report.left_out:
        assert str(path) in report.first(reason), f"no row is named of: {reason}"
    # What judges the whole file, and what takes the prompts alone.
    for ask in (
        lambda: load_preferences(spec, limit=limit, reading=how),
        lambda: load_prompts(spec, "train", limit, how),
    ):
        try:
            ask()
        except UserError as error:
            assert str(path) in str(error), f"not told by its name: {error}"
    assert time.thread_time() - began < MOST_SECONDS, "it took too long"
    return "read" if pairs else "left out"


def run_batch(rng: random.Random, folder: Path, seed: str, found: Found) -> None:
    """Twenty files. One that fails is kept in `folder`, by the name that the failure tells."""
    before = peak_megabytes()
    for number in range(20):
        place = folder / f"{seed.replace(':', '-')}-{number}"
        place.mkdir(parents=True)
        path, rows = write(rng, place)
        limit, how = rng.choice((None, None, 1, 3)), reading(rng)
        failed = len(found.failures)
        with found.told(file=str(path), limit=limit, reading=how, seed=seed):
            found.counts[f"files {check(path, limit, how)}"] += 1
        found.counts["files"] += 1
        found.counts["rows"] += rows
        if len(found.failures) == failed:
            path.rmdir() if path.is_dir() else path.unlink()
            place.rmdir()
        elif path.is_file():
            found.failures[-1] += f"\n    begins {path.read_bytes()[:400]!a}"
    took = peak_megabytes() - before
    with found.told(seed=seed):
        assert took < MOST_MEGABYTES, f"preference files took {took} MB"
