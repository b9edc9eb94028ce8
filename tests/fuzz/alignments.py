"""Random texts through random pairs of tokenizers, held against an oracle that shares no code with the library.

The oracle has each tokenizer from its own tokenizer.json and takes spans from their definition: where both tokenize
the same prefix, and the normalisers allow to cut. What it cannot decide, because tokens that take white space along
may have shared it in several ways, it checks span by span: the tokens of a span spell the span.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from helpers.small_tokenizers import KINDS, core, fast
from helpers.span_oracle import check_aligned
from tokenizers import AddedToken, Tokenizer, normalizers

from ctpd_jax.annotate.store import deserialized, from_record, serialized, to_record
from ctpd_jax.data.rows import BatchShape, PairItem, ScoredResponse, build_batch
from ctpd_jax.errors import UserError
from ctpd_jax.schema import SIDES, Aligned, Message, PreferencePair
from ctpd_jax.text import spans
from ctpd_jax.text.prepare import Limits, prepare_part
from ctpd_jax.text.prompts import TextModel
from ctpd_jax.text.templates import PromptTemplate
from ctpd_jax.text.tokens import load_tokenizer
from fuzz import Found, smallest, texts

MARKER = "\u2581"
BATCH = 250  # texts of one pair of tokenizers
DEFINITION = 60  # characters up to which a text that a normaliser changes is cut by the definition, in quadratic time
UNDECIDED = 20_000  # ways of a token to lie in a text, from which on it is left open how they share white space
WORDS = ("<ent>", "cat", "[word]", "<tool_call>", "\u00e9!", "e\u0301", "  two", "foo bar", "<|x|>", "dog.", "\n", " ")
WORDS += (
    "\u65e5\u672c",
    "\U0001f600",
    "\t\t",
    "<|im_end|>",
    "<eos>",
    "</s>",
    "a",
    "The",
    "\u1100\u1161",
    "\u2581x",
    "1",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Known:
    """A tokenizer as the library has it, and as its own file says it is."""

    def __init__(self, name: str, content: str) -> None:
        self.name = name
        self.own = Tokenizer.from_str(content)
        self.own.no_truncation()
        self.own.no_padding()
        self.plain = Tokenizer.from_str(content)  # to which what somebody types is no special token
        self.plain.encode_special_tokens = True
        self.tok = load_tokenizer(fast(Tokenizer.from_str(content), name_or_path=name))
        self.added = self.own.get_added_tokens_decoder()
        parts = _parts(self.own.normalizer), _parts(self.own.pre_tokenizer)
        kinds = [type(part).__name__ for part in (*parts[0], *parts[1])]
        self.byte_level = "ByteLevel" in kinds
        self.form = next((kind for kind in reversed(kinds) if kind in ("NFC", "NFD")), None)
        self.always = "Prepend" in kinds
        dummies = [getattr(part, "add_prefix_space", False) for part in parts[1]]
        dummies += [getattr(part, "prepend_scheme", "never") != "never" for part in parts[1]]
        self.dummy = self.always or any(dummies)
        self.flagged = any(token.lstrip or token.rstrip for token in self.added.values())
        self._normal = getattr(normalizers, self.form)().normalize_str if self.form else str

    @cached_property
    def special(self) -> dict[str, int]:
        return {token.content: token_id for token_id, token in self.added.items() if token.special}

    @cached_property
    def typed(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.special)) or "(?!)")

    @cached_property
    def special_ids(self) -> set[int]:
        return set(self.special.values())

    @cached_property
    def names(self) -> list[str]:
        names = [token.content for token in self.added.values()]
        return names if len(names) < 400 else random.Random(0).sample(names, 400)

    @cached_property
    def _missing(self) -> frozenset[int]:
        if not self.byte_level:
            return frozenset()
        return frozenset(byte for byte, letter in _letters().items() if self.own.token_to_id(letter) is None)

    def lacks(self, text: str) -> bool:
        return not self._missing.isdisjoint(self.normal(text))

    def fails(self, text: str) -> bool:
        """Whether the tokenizers library itself gives up on a text, as it does where two tokens take the same space."""
        try:
            if self.flagged:
                self.own.encode(text, add_special_tokens=False)
                self.plain.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            return True
        return False

    @lru_cache(maxsize=4096)  # noqa: B019 (as long as the tokenizer)
    def normal(self, text: str) -> bytes:
        text = self._normal(text)
        return (text if self.byte_level else text.replace(MARKER, " ")).encode()

    @lru_cache(maxsize=65536)  # noqa: B019
    def spellings(self, token_id: int) -> tuple[bytes, ...]:
        """The bytes that a token stands for; of an added token the texts that it is found by."""
        piece = self.own.id_to_token(token_id)
        if self.byte_level:
            table = _bytes()
            usual = bytes(table[letter] for letter in piece) if set(piece) <= table.keys() else piece.encode()
        elif len(piece) == 6 and piece.startswith("<0x") and token_id not in self.added:
            usual = bytes([int(piece[3:5], 16)])
        else:
            usual = piece.replace(MARKER, " ").encode()
        if token_id not in self.added:
            return (usual,)
        word = self.added[token_id].content
        return tuple(dict.fromkeys((self.normal(word), word.encode(), b" " + self.normal(word), usual)))

    def endings(self, ids: Sequence[int], data: bytes, free: bool = True, first: bool = True) -> list[list[int]]:
        """Every way in which tokens spell a text: where each of them ends. At most two are told."""
        # 1. Nearly always there is one.
        if not ids:
            return [] if data else [[]]
        if not self.flagged and (not self.dummy or self.added.keys().isdisjoint(ids)):
            pieces = [self.spellings(i)[0] for i in ids]
            whole = b"".join(pieces)
            if self.dummy and first and whole[:1] == b" " and whole[1:] == data:
                pieces[0], whole = pieces[0][1:], data
            if whole == data:
                return [list(accumulate(map(len, pieces)))]
        # 2. Forward, with every place where a token may end.
        steps: list[dict[int, set[int]]] = []
        places, work = {0}, 0
        for token_id in ids:
            ends: dict[int, set[int]] = {}
            for place in places:
                for end in self._ends(token_id, data, place, free, first and not steps):
                    ends.setdefault(end, set()).add(place)
                    work += 1
                # White space that could be shared in thousands of ways: in memory, and in time.
                if work > UNDECIDED + 4 * len(ids):
                    return [[], []]
            steps.append(ends)
            places, free = set(ends), token_id in self.added
        if len(data) not in places:
            return []
        # 3. Back, as long as there are no more than two.
        ways = [[len(data)]]
        for ends in reversed(steps[1:]):
            ways = [[start, *way] for way in ways for start in sorted(ends[way[0]])][:2]
        return ways

    def _ends(self, token_id: int, data: bytes, place: int, free: bool, first: bool) -> Iterable[int]:
        """Where a token may end that begins here. `free`: a dummy space may stand here, which counts nothing."""
        spelled = set(self.spellings(token_id))
        if free and self.dummy:
            shorter = {each[1:] for each in spelled if each.startswith(b" ")}
            # At the beginning of a text it is there or not; after an added token that depends on how it was found.
            must = first and shorter and token_id not in self.added and (self.always or not data.startswith(b" "))
            spelled = shorter if must else spelled | shorter
        token = self.added.get(token_id)
        begins = [place, *_white(data, place)] if token and token.lstrip else [place]
        for begin in begins:
            for each in spelled:
                if data.startswith(each, begin):
                    end = begin + len(each)
                    yield end
                    if token and token.rstrip:
                        yield from _white(data, end)


def _parts(component: Any) -> list[Any]:
    if component is None:
        return []
    if type(component).__name__ != "Sequence":
        return [component]
    return [part for child in component for part in _parts(child)]


@lru_cache(maxsize=1)
def _letters() -> dict[int, str]:
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@lru_cache(maxsize=1)
def _bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in _letters().items()}


def _white(data: bytes, place: int) -> list[int]:
    rest = data[place : place + 6000].decode("utf-8", "ignore")
    run = rest[: len(rest) - len(rest.lstrip())]
    return [place + size for size in accumulate(len(letter.encode()) for letter in run)]


# ------------------------------------------------------------------------------------------------ tokenizers


def derived(rng: random.Random, name: str, content: str) -> Known | None:
    """The tokenizer with random added tokens under random flags; None where the library refuses it by its name."""
    grown, told = Tokenizer.from_str(content), []
    for word in rng.sample(WORDS, rng.randint(1, 5)):
        flags = {flag: rng.random() < 0.25 for flag in ("lstrip", "rstrip", "single_word", "special")}
        flags["normalized"] = rng.random() < 0.5
        grown.add_tokens([AddedToken(word, **flags)])
        told.append(f"{word!a} {' '.join(flag for flag in flags if flags[flag])}")
    name = f"{name} + {', '.join(told)}"
    try:
        return Known(name, grown.to_str())
    except UserError as error:
        assert repr(name) in str(error), f"not refused by its name: {error}"
        return None


class Pool:
    """Tokenizers to choose from: those that were given, and some that are derived of them, ever other ones."""

    def __init__(self, contents: dict[str, str]) -> None:
        self.contents = contents
        self.known = [Known(name, content) for name, content in contents.items()]
        self.grown: list[Known] = []

    def pair(self, rng: random.Random, found: Found) -> tuple[Known, Known]:
        if rng.random() < 0.3 or not self.grown:
            # What is large takes seconds to load: seldom, and the larger the more so.
            names = list(self.contents)
            sizes = [len(self.contents[name]) for name in names]
            name = rng.choices(names, [1.0 if size < 200_000 else 0.5e5 / size for size in sizes])[0]
            known = derived(rng, name, self.contents[name])
            found.counts["derived tokenizers" if known else "derived tokenizers refused"] += 1
            self.grown = [*self.grown[-7:], *([known] if known else [])]
        both = rng.choices((self.known, self.grown or self.known), (0.6, 0.4), k=2)
        return rng.choice(both[0]), rng.choice(both[1])


def contents_of(folders: dict[str, Any]) -> dict[str, str]:
    """The tokenizer.json of every small kind, and of the real tokenizers in `folders`."""
    small = {kind: core(kind).to_str() for kind in KINDS}
    return small | {name: (folder / "tokenizer.json").read_text("utf-8") for name, folder in folders.items()}


# ------------------------------------------------------------------------------------------------ invariants


def unusable(text: str, teacher: Known, student: Known) -> bool:
    """Whether a text may be refused: a byte that a vocabulary lacks, or the tokenizers library gives up."""
    return any(known.lacks(text) or known.fails(text) for known in (teacher, student))


def check_ids(text: str, known: Known, ids: Sequence[int], theirs: Sequence[int]) -> None:
    """The ids are those of the file; where a special token is typed, none of it comes out."""
    typed = known.typed.search(text) is not None
    if not typed and "<0x" not in text:
        if known.special_ids.intersection(theirs):  # the model itself spells one, as by a normalised name
            typed = True
        else:
            assert list(ids) == theirs, "other ids than those of tokenizer.json"
    assert not known.special_ids.intersection(ids), "a special token came out of what somebody typed"
    if typed and "<0x" not in text:
        theirs = known.plain.encode(text, add_special_tokens=False).ids
        if not known.special_ids.intersection(theirs):
            assert list(ids) == theirs, "other ids than those of tokenizer.json with encode_special_tokens"


def check(
    text: str, teacher: Known, student: Known, unit: str, aligned: Aligned, theirs: Sequence[Sequence[int]] = ()
) -> bool:
    """Every invariant of one alignment; returns whether the definition could be held against it.

    theirs: the ids that both files give, where they are known.
    """
    both = ((teacher, aligned.teacher), (student, aligned.student))
    theirs = theirs or [known.own.encode(text, add_special_tokens=False).ids for known, _ in both]
    ways = []
    for (known, side), own in zip(both, theirs, strict=True):
        ids = side.ids.tolist()
        assert side.ids.dtype == side.span_ids.dtype == aligned.bounds.dtype == np.int32
        check_ids(text, known, ids, own)
        found = known.endings(ids, known.normal(text))
        assert found or "<0x" in text, "the tokens do not spell the text"
        ways.append(found)
    if any(len(found) != 1 for found in ways):
        check_spans(text, both, unit, aligned)
        return False
    forms = any(known.form and known.normal(text) != _bare(known, text) for known, _ in both)
    if forms and len(text) > DEFINITION:
        check_spans(text, both, unit, aligned)
        return False
    expected = definition(text, [known for known, _ in both], [found[0] for found in ways], unit, forms)
    assert aligned.bounds.tolist() == expected[0], "other boundaries than the definition's"
    for (_, side), ids in zip(both, expected[1:], strict=True):
        assert side.span_ids.tolist() == ids, "other spans of tokens than the definition's"
    return True


def _bare(known: Known, text: str) -> bytes:
    return (text if known.byte_level else text.replace(MARKER, " ")).encode()


def definition(text: str, both: Sequence[Known], ends: list[list[int]], unit: str, forms: bool) -> tuple[Any, ...]:
    """Bounds, and the span of each token of either side."""
    letters = [character.encode() for character in text]
    raw = list(accumulate(map(len, letters), initial=0))
    # 1. Of each position of the text the places in both normalised texts, None where it cannot be cut there.
    places: list[list[int | None]] = []
    for known in both:
        if forms:
            whole = known.normal(text)
            cut = ((known.normal(text[:c]), known.normal(text[c:])) for c in range(len(text) + 1))
            places.append([len(left) if left + right == whole else None for left, right in cut])
        else:
            lengths = map(len, letters)
            if not known.byte_level and MARKER in text:
                lengths = (1 if character == MARKER else len(character.encode()) for character in text)
            places.append(list(accumulate(lengths, initial=0)))
    candidates = [(raw[c], [own[c] for own in places]) for c in range(len(text) + 1)]
    if unit == "byte":
        for c, letter in enumerate(letters):
            whole = all(own[c] is not None and own[c + 1] is not None for own in places)
            if whole and all(known.normal(text[c]) == letter for known in both):
                candidates += [(raw[c] + k, [own[c] + k for own in places]) for k in range(1, len(letter))]
        candidates.sort()
    # 2. Those where both have a token's end.
    known_ends = [{0, *own} for own in ends]
    kept = [(at, own) for at, own in candidates if all(p is not None and p in e for p, e in zip(own, known_ends))]
    # 3. The tokens between them; one without bytes goes with what follows it, or with the last.
    spans_of = []
    for side, own in enumerate(ends):
        bounds, last, result = [own_places[side] for _, own_places in kept], len(kept) - 2, []
        for start, end in zip([0, *own], own):
            inside = bisect_right(bounds, start) - 1  # the span that begins last before the token does
            if inside <= last and end <= bounds[inside + 1]:
                result.append(inside)
            else:
                result.append(last if start == end == bounds[-1] else -1)
        spans_of.append(result)
    return [at for at, _ in kept], *spans_of


def check_spans(text: str, both: Sequence[tuple[Known, Any]], unit: str, aligned: Aligned) -> None:
    """The spans cover the text, and the tokens of each spell it, on both sides."""
    check_aligned(aligned, text)
    if "<0x" in text or (unit == "byte" and any(known.form for known, _ in both)):
        return
    data = text.encode()
    for known, side in both:
        if known.form and known.normal(text) != _bare(known, text):
            continue
        for span in range(aligned.num_spans):
            ids = side.ids[side.span_ids == span].tolist()
            place = int(np.argmax(side.span_ids == span))
            free = place == 0 or int(side.ids[place - 1]) in known.added
            part = data[aligned.bounds[span] : aligned.bounds[span + 1]]
            part = part if known.byte_level else part.replace(MARKER.encode(), b" ")
            assert known.endings(ids, part, free, place == 0), f"the tokens of span {span} do not spell it"


def check_cut(rng: random.Random, aligned: Aligned) -> None:
    """Truncation keeps the same whole spans on both sides, as many as fit; an end of turn is one more of no bytes."""
    sides = (aligned.teacher, aligned.student)
    limits = [rng.randrange(len(side.ids) + 3) for side in sides]
    short, cut = spans.truncate(aligned, *limits)
    fit = []
    for side, limit in zip(sides, limits):
        # The first token too many, if there is one, is in the first span too many.
        fit.append(int(side.span_ids[limit]) if limit < len(side.ids) else aligned.num_spans)
    assert short.num_spans == min(fit) and cut == (min(fit) < aligned.num_spans)
    assert short.bounds.tolist() == aligned.bounds[: min(fit) + 1].tolist()
    for before, after in zip(sides, (short.teacher, short.student)):
        size = len(after.ids)
        assert after.ids.tolist() == before.ids[:size].tolist()
        assert after.span_ids.tolist() == before.span_ids[:size].tolist() and (before.span_ids[size:] >= min(fit)).all()
    closed = spans.with_end_of_turn(short, 7, 9)
    assert closed.num_spans == short.num_spans + 1 and closed.bounds[-1] == closed.bounds[-2]
    assert [side.ids[-1] for side in (closed.teacher, closed.student)] == [7, 9]
    assert all((side.span_ids == short.num_spans).sum() == 1 for side in (closed.teacher, closed.student))


# ------------------------------------------------------------------------------------------------ pairs


def _model(rng: random.Random, known: Known) -> TextModel:
    end = known.tok.eos_id if known.tok.eos_id is not None else rng.choice([*known.special.values()] or [0])
    names = {"<|im_start|>", "<|im_end|>"}
    alone = any(known.added[known.special[name]].single_word for name in names & known.special.keys())
    if names <= known.special.keys() and not alone and rng.random() < 0.5:
        return TextModel(known.tok, PromptTemplate("chat", CHATML), known.special["<|im_end|>"])
    return TextModel(known.tok, PromptTemplate("plain", "\n\n"), end)


def check_pairs(rng: random.Random, some: Sequence[str], teacher: Known, student: Known, unit: str) -> int:
    """Whole pairs, prompts included, through `prepare_part`, the store, and the rows of a batch; returns responses."""
    models = _model(rng, teacher), _model(rng, student)
    limits = Limits(
        prompt=rng.choice((8, 64, 4096)),
        response=rng.choice((2, 3, 6, 20, 4096)),
        unit=unit,  # type: ignore[arg-type]
        end_of_turn=rng.random() < 0.7,
        end_of_turn_both=rng.random() < 0.5,
    )
    pairs = [
        PreferencePair(f"p{n}", (Message("user", prompt),), chosen, rejected)
        for n, (prompt, chosen, rejected) in enumerate(zip(some[::3], some[1::3], some[2::3]))
    ]
    prepared, report = prepare_part(pairs, *models, limits)
    assert len(prepared) + sum(report.left_out.values()) == len(pairs), "a pair is neither there nor counted"
    again, _ = prepare_part(pairs, *models, limits)
    assert [serialized(_record(pair)) for pair in prepared] == [serialized(_record(pair)) for pair in again]
    for pair in prepared:
        # 1. One BOS where the tokenizer has one, control tokens by the template alone, and within the limit.
        for name, model in zip(("teacher", "student"), models):
            ids = pair.prompt(name).tolist()  # type: ignore[arg-type]
            own = model.tokenizer
            assert 0 < len(ids) <= limits.prompt
            control = [i for i in ids if i in own.control.values() and own.added[i].content.strip()]
            if model.template.kind == "plain":
                once = [] if own.bos_id is None else [own.bos_id]
                assert control == once, f"BOS once, and no other control token: {control} for {once} of the {name}"
                assert own.bos_id is None or ids[0] == own.bos_id
            else:
                turns = [own.ids_of_added[each] for each in ("<|im_start|>", "<|im_end|>")]
                assert [ids.count(turn) for turn in turns] == [2, 1], "the template writes three control tokens"
        # 2. One end of turn at the end, or none.
        ended = []
        for side, text in enumerate(SIDES):
            aligned = pair.response(side)
            ends = aligned.num_spans > 0 and aligned.bounds[-1] == aligned.bounds[-2]
            ended.append(bool(ends))
            assert not (ends and pair.truncated[side]), text
            for name, model in zip(("teacher", "student"), models):
                tokens = pair.tokens(name, side)  # type: ignore[arg-type]
                assert 0 < len(tokens.ids) <= limits.response and (tokens.span_ids >= 0).all()
                assert not ends or tokens.ids[-1] == model.end_of_turn
                inner = tokens.ids[: len(tokens.ids) - ends]
                if model.end_of_turn in model.tokenizer.control.values():
                    assert model.end_of_turn not in inner, "a second end of turn"
        whole = [limits.end_of_turn and not cut for cut in pair.truncated]
        assert ended == ([all(whole)] * 2 if limits.end_of_turn_both else whole), "end of turn"
        # 3. The store gives back what it was given.
        stored, _ = from_record(deserialized(serialized(_record(pair))))
        assert serialized(_record(stored)) == serialized(_record(pair)), "the store"
        _check_rows(pair)
    return 2 * len(pairs)


def _record(pair: Any) -> Any:
    return to_record(pair, {side: {} for side in SIDES})


def _check_rows(pair: Any) -> None:
    """A batch of the pair scores each token of its responses once, in the row of its own, and padding nowhere."""
    responses = [pair.tokens("student", side).ids for side in range(2)]
    weights = [np.ones(len(ids), np.float32) for ids in responses]
    item = PairItem(pair.student_prompt, *(ScoredResponse(ids, own) for ids, own in zip(responses, weights)))
    longest = max(map(len, responses))
    batch = build_batch([item], "response", BatchShape(2, len(pair.student_prompt) + longest + 3, longest + 2), 1)
    for row, ids in enumerate(responses):
        used = len(pair.student_prompt) + len(ids)
        assert (np.asarray(batch.layout.segment[row]) > 0).sum() == used and not batch.tokens[row, used:].any()
        slots = batch.pair[row] >= 0
        assert batch.target[row][slots].tolist() == ids.tolist() and slots.sum() == len(ids)
        assert batch.weight[row][~slots].sum() == 0 and batch.weight[row].sum() == len(ids)
        assert (batch.tokens[row][batch.predictor[row][slots] + 1] == ids).all()


# ------------------------------------------------------------------------------------------------ the part


def run_batch(rng: random.Random, pool: Pool, seed: str, found: Found) -> None:
    """One pair of tokenizers and BATCH texts."""
    teacher, student = pool.pair(rng, found)
    unit = rng.choice(("character", "byte"))
    names = [*teacher.names, *student.names]
    drawn = [texts.text(rng, names) for _ in range(BATCH)]
    how = {"seed": seed, "teacher": teacher.name, "student": student.name, "unit": unit}
    fine = []
    # 1. What is to be refused, is.
    for text in drawn:
        if unusable(text, teacher, student):
            found.counts["texts refused"] += 1
            with found.told(text=text, **how):
                # What the library gives up on in one call it may read in another, and then it is right or refused.
                lacks = any(known.lacks(text) for known in (teacher, student))
                assert refused(text, teacher, student) or not lacks, "a text that cannot be read was let through"
        else:
            fine.append(text)
    # 2. Together, and some of them alone.
    try:
        aligned = spans.align_batch(fine, teacher.tok, student.tok, unit)
    except Exception:
        fine, aligned = _one_by_one(fine, teacher, student, unit, found, how)
    own = [_ids(known, fine) for known in (teacher, student)]
    for text, one, *theirs in zip(fine, aligned, *own):
        failed = len(found.failures)
        with found.told(text=text, **how):
            found.counts["held against the definition"] += check(text, teacher, student, unit, one, theirs)
            if rng.random() < 0.5:
                check_cut(rng, one)
            if rng.random() < 0.05:
                alone = spans.align(text, teacher.tok, student.tok, unit)
                assert _arrays(alone) == _arrays(one), "alone and together differ"
        if len(found.failures) > failed and failed < 20:
            found.failures[-1] += f"\n    minimal text={_minimal(text, teacher, student, unit)!a}"
        found.counts["alignments"] += 1
    # 3. Some as pairs.
    if rng.random() < 0.3:
        for some in (fine[at : at + 6] for at in range(0, 60, 6)):
            with found.told(prompts_and_answers=some, **how):
                found.counts["alignments"] += check_pairs(rng, some, teacher, student, unit)


def _one_by_one(
    some: Sequence[str], teacher: Known, student: Known, unit: str, found: Found, how: dict[str, str]
) -> tuple[list[str], list[Aligned]]:
    """The texts that can be aligned; of the others the tokens do not spell the text, or that is a failure."""
    fine, aligned = [], []
    for text in some:
        with found.told(text=text, **how):
            try:
                aligned.append(spans.align(text, teacher.tok, student.tok, unit))
                fine.append(text)
            except UserError as error:
                spelled = [
                    known.endings(known.plain.encode(text, add_special_tokens=False).ids, known.normal(text))
                    for known in (teacher, student)
                ]
                assert not all(spelled), str(error)
                found.counts["texts refused"] += 1
    return fine, aligned


def _ids(known: Known, some: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in known.own.encode_batch_fast(list(some), add_special_tokens=False)]


def refused(text: str, teacher: Known, student: Known) -> bool:
    try:
        spans.align(text, teacher.tok, student.tok)
    except UserError:
        return True
    return False


def _minimal(text: str, teacher: Known, student: Known, unit: str) -> str:
    def fails(shorter: str) -> bool:
        if unusable(shorter, teacher, student):
            return False
        try:
            check(shorter, teacher, student, unit, spans.align(shorter, teacher.tok, student.tok, unit))
        except Exception:
            return True
        return False

    return smallest(text, fails) if fails(text) else text


def _arrays(one: Aligned) -> list[list[int]]:
    sides = (one.teacher, one.student)
    return [one.bounds.tolist(), *(array.tolist() for side in sides for array in (side.ids, side.span_ids))]
