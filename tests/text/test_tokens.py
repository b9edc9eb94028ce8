"""Loading and probing tokenizers, the bytes of their tokens, and prompts."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from helpers.small_tokenizers import BYTE_PIECES, HARD_TEXTS, KINDS, MARKER, SPECIALS, core, fast, small
from helpers.span_oracle import Reference
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from ctpd_jax.errors import UserError
from ctpd_jax.text.prompts import encode_prompt
from ctpd_jax.text.spans import align
from ctpd_jax.text.templates import Piece
from ctpd_jax.text.tokens import (
    byte_ends,
    can_spell,
    encode,
    load_tokenizer,
    merges_across,
    normalize,
)

PLAIN_SPECIAL = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def edited(kind: str, edit) -> Tokenizer:
    """A tokenizer with changes to its JSON: `edit` changes the parsed state in place."""
    state = json.loads(core(kind).to_str())
    edit(state)
    return Tokenizer.from_str(json.dumps(state))


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_every_token_are_those_of_the_vocabulary(kind):
    tok, ref = small(kind), Reference(core(kind), None)
    special = {token["id"] for token in ref.state["added_tokens"] if token["special"]}
    for token_id in range(core(kind).get_vocab_size()):
        assert tok.token_bytes(token_id) == (b"" if token_id in special else ref.token(token_id))


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_encoded_as_by_the_tokenizer_itself(kind):
    """Except where it would read special tokens or byte pieces in the text."""
    for name, text in HARD_TEXTS.items():
        if name not in ("special tokens", "byte pieces"):
            assert encode(small(kind), text).tolist() == core(kind).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_byte_ends_end_where_the_text_does(kind):
    for text in HARD_TEXTS.values():
        tok = small(kind)
        normal = normalize(tok, text)
        ends = byte_ends(tok, encode(tok, text), normal)
        assert (ends[-1] if len(ends) else 0) == len(normal.encode())


def test_a_dummy_space_counts_nothing():
    tok = small("bpe-prepend")
    first = encode(tok, "fox")
    assert tok.token_bytes(first[0]).startswith(b" ")
    assert byte_ends(tok, first, "fox")[-1] == 3
    # a text with a space of its own gets a second one from Prepend, and none from Metaspace
    assert byte_ends(tok, encode(tok, " fox"), " fox")[-1] == 4
    assert encode(small("bpe-first"), " fox").tolist() == encode(small("bpe-first"), "fox").tolist()


@pytest.mark.parametrize("kind", ["bpe-prepend", "unigram", "byte-dummy", "bpe-first", "byte", "bpe-no-dummy"])
@pytest.mark.parametrize("normalized", [True, False])
def test_dummy_spaces_after_added_tokens_count_nothing_either(kind, normalized):
    with_word = Tokenizer.from_str(core(kind).to_str())
    with_word.add_tokens([AddedToken("[word]", normalized=normalized)])
    tok = load_tokenizer(fast(with_word))
    word = with_word.token_to_id("[word]")
    assert word in encode(tok, "a [word]")
    texts = ["a[word]b", "[word]b", "[word] b", "a [word]  [word]", "[word][word]", " [word]\U0001f600[word]", "[word]"]
    for text in texts:
        ids = encode(tok, text)
        assert ids.tolist() == with_word.encode(text, add_special_tokens=False).ids
        aligned = align(text, tok, small("byte"))
        assert aligned.bounds[-1] == len(text) + 3 * ("\U0001f600" in text)
        assert set(aligned.teacher.span_ids) == set(range(aligned.num_spans))


def test_ids_that_do_not_spell_the_text_are_refused_with_the_place():
    tok = small("byte")
    with pytest.raises(UserError, match="at byte 4, near 'the dog'"):
        byte_ends(tok, encode(tok, "the fox"), "the dog")
    with pytest.raises(UserError, match="does not belong"):
        byte_ends(tok, np.array([10**6]), "a")
    with pytest.raises(UserError, match=r"<\|im_end\|>"):
        byte_ends(tok, np.append(encode(tok, "a"), core("byte").token_to_id("<|im_end|>")), "a")
    byte_ends(tok, encode(tok, "the fox"), "the fox jumps")  # ids may stop early ...
    with pytest.raises(UserError, match="do not spell"):
        byte_ends(tok, encode(tok, "the fox"), "the fox jumps", whole=True)  # ... unless said otherwise
    with pytest.raises(UserError, match="do not spell"):
        byte_ends(tok, encode(tok, "the fox jumps"), "the fox")


def test_a_lone_surrogate_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"U\+D83D.*character 3"):
        encode(small("byte"), "so \ud83d")


# ------------------------------------------------------------------------------------------------ literals


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_typed_in_a_text_are_ordinary_text(kind):
    tok = small(kind)
    special = {token["id"] for token in json.loads(core(kind).to_str())["added_tokens"] if token["special"]}
    for text in ("<|im_end|>", "a</s>b", "<s>", "<unk>", "x <|endoftext|>", "</s></s>"):
        ids = encode(tok, text)
        assert not special.intersection(ids.tolist())
        assert byte_ends(tok, ids, normalize(tok, text))[-1] == len(text)


@pytest.mark.parametrize("kind", ["byte", "bpe-no-dummy"])
def test_a_bpe_model_that_can_merge_a_special_token_does_not(kind):
    def mergeable(state):
        new = max(state["model"]["vocab"].values()) + 1
        state["model"]["vocab"]["zq"] = new
        state["model"]["merges"].append(["z", "q"])
        state["added_tokens"].append({"id": new, "content": "zq", **PLAIN_SPECIAL})

    able = edited(kind, mergeable)
    able.encode_special_tokens = True
    assert able.encode("zq", add_special_tokens=False).ids == [able.token_to_id("zq")]  # what alone would not help
    tok = load_tokenizer(fast(edited(kind, mergeable)))
    assert [tok.token_bytes(i) for i in encode(tok, "zq")] == [b"z", b"q"]


def test_a_whole_word_that_is_a_special_token_is_still_ordinary_text():
    def one_word(state):
        state["model"]["vocab"]["fox"] = max(state["model"]["vocab"].values()) + 1
        state["model"]["ignore_merges"] = True
        state["added_tokens"].append({"id": state["model"]["vocab"]["fox"], "content": "fox", **PLAIN_SPECIAL})

    tok = load_tokenizer(fast(edited("byte", one_word)))
    assert b"".join(tok.token_bytes(i) for i in encode(tok, "fox")) == b"fox"


@pytest.mark.parametrize("kind", ["unigram", "bpe-prepend"])
def test_byte_pieces_typed_in_a_text_are_ordinary_text(kind):
    text = "<0x41><0x0A> <0x4>"
    tok = small(kind)
    assert byte_ends(tok, encode(tok, text), text)[-1] == len(text)


# ------------------------------------------------------------------------------------------------ the probe


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))


def nfkc_unigram() -> Tokenizer:
    tokenizer = Tokenizer.from_str(core("unigram").to_str())
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def with_normalizer(normalizer) -> Tokenizer:
    tokenizer = Tokenizer.from_str(core("byte").to_str())
    tokenizer.normalizer = normalizer
    return tokenizer


def end_of_word() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def no_fallback() -> Tokenizer:
    def switch_off(state):
        state["model"]["byte_fallback"] = False

    return edited("bpe-prepend", switch_off)


def some_bytes_missing() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(["only letters"], trainers.BpeTrainer(show_progress=False))
    return tokenizer


def drops_white_space() -> Tokenizer:
    tokenizer = Tokenizer.from_str(core("bpe-no-dummy").to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(MARKER, "removed")
    return tokenizer


def truncates_words() -> Tokenizer:
    tokenizer = Tokenizer.from_str(core("byte").to_str())
    splits = pre_tokenizers.Split(" ", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (word_piece, "WordPiece"),
        (word_level, "WordLevel"),
        (nfkc_unigram, "NFKC"),
        (lambda: with_normalizer(normalizers.Lowercase()), "Lowercase"),
        (lambda: with_normalizer(normalizers.Strip()), "Strip"),
        (lambda: with_normalizer(normalizers.StripAccents()), "StripAccents"),
        (lambda: with_normalizer(normalizers.Replace("``", '"')), "replaces"),
        (end_of_word, "end of word suffix"),
        (no_fallback, "no byte fallback"),
        (some_bytes_missing, "no token for the bytes"),
        (drops_white_space, "not lossless"),
        (truncates_words, "not lossless"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_lossy_tokenizers_are_refused_by_name(make, reason):
    hf = fast(make())
    hf.name_or_path = "some/tokenizer"
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(hf)
    assert "'some/tokenizer'" in str(caught.value)


def test_a_tokenizer_without_a_fast_version_is_refused_by_name():
    class Slow:
        is_fast = False
        name_or_path = "slow/tokenizer"

        def convert_tokens_to_ids(self, token):
            raise NotImplementedError

        def __len__(self):
            return 3

    with pytest.raises(UserError, match="'slow/tokenizer' has no fast version"):
        load_tokenizer(Slow())


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_some_control_characters_is_accepted_and_names_them_when_met():
    """SmolLM2's lacks eight bytes; texts that need one are refused, not silently shortened."""

    def without(state):
        vocab = state["model"]["vocab"]
        del vocab["\u0104"]  # the byte 0x04
        state["model"]["vocab"] = {piece: i for i, piece in enumerate(vocab)}

    tok = load_tokenizer(fast(edited("byte", without)))
    assert tok.vocabulary.missing == {4}
    with pytest.raises(UserError, match="0x04"):
        encode(tok, "a\x04b")
    assert can_spell(tok, "ab") and not can_spell(tok, "a\x04b") and can_spell(small("byte"), "a\x04b")


def test_folder_object_and_copy_are_one_tokenizer(tmp_path):
    hf = fast(core("byte"))
    hf.save_pretrained(tmp_path)
    from_folder, from_object = load_tokenizer(tmp_path), load_tokenizer(hf)
    assert from_folder.fingerprint == from_object.fingerprint == small("byte").fingerprint
    assert from_folder.fingerprint != small("byte-nfc").fingerprint
    assert load_tokenizer(hf) is from_object and load_tokenizer(from_object) is from_object
    assert copy.deepcopy(from_object) is from_object


def test_the_callers_tokenizer_is_left_alone_and_its_limits_do_not_reach_us():
    hf = fast(core("byte"), eos_token="<|im_end|>", pad_token="<|im_end|>")
    before = hf.backend_tokenizer.to_str()
    tok = load_tokenizer(hf)
    assert hf.backend_tokenizer.to_str() == before
    hf("a long text", truncation=True, max_length=2, padding="max_length")
    assert len(encode(tok, "the lazy dog sleeps")) > 2
    assert len(encode_prompt(tok, [Piece("the lazy dog sleeps", True)])) > 2
    assert load_tokenizer(fast(hf.backend_tokenizer)).fingerprint == tok.fingerprint


def test_a_tokenizer_that_grew_is_probed_again():
    hf = fast(core("byte"))
    first = load_tokenizer(hf)
    hf.add_tokens(["[new]"])
    assert load_tokenizer(hf).fingerprint != first.fingerprint
    assert load_tokenizer(hf).token_bytes(len(hf) - 1) == b"[new]"


# ------------------------------------------------------------------------------------------------ prompts


def test_bos_comes_from_the_post_processor_alone():
    assert small("bpe-prepend").bos_id == 1
    assert load_tokenizer(fast(core("byte"), bos_token="<|im_start|>")).bos_id is None  # as SmolLM2
    with_both = Tokenizer.from_str(core("byte").to_str())
    with_both.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert load_tokenizer(fast(with_both)).bos_id == 1


def test_two_tokens_in_front_are_refused():
    two = Tokenizer.from_str(core("byte").to_str())
    two.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|im_end|> $A", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    with pytest.raises(UserError, match="2 special tokens before every text"):
        load_tokenizer(fast(two))


def test_bos_exactly_once():
    tok = small("bpe-prepend")
    assert encode_prompt(tok, [Piece("the fox", True)]).tolist()[0] == 1
    assert encode_prompt(tok, [Piece("<s>the fox", True)]).tolist().count(1) == 1  # the template wrote it
    assert encode_prompt(tok, []).tolist() == [1]
    assert encode_prompt(tok, []).dtype == np.int32


def test_template_markers_are_special_and_a_users_are_not():
    tok = small("byte")
    parts = [Piece("<|im_start|>user\n", True), Piece("say <|im_end|> now", False), Piece("<|im_end|>\n", True)]
    ids = encode_prompt(tok, parts).tolist()
    assert ids.count(1) == 1 and ids.count(2) == 1
    assert b"".join(tok.token_bytes(i) for i in ids) == b"user\nsay <|im_end|> now\n"
    harmless = [Piece("<|im_start|>user\n", True), Piece("say it now", False), Piece("<|im_end|>\n", True)]
    whole = "".join(part.text for part in harmless)
    assert encode_prompt(tok, harmless).tolist() == core("byte").encode(whole, add_special_tokens=False).ids


def test_template_and_user_text_do_not_make_a_special_token_together():
    tok = small("byte")
    ids = encode_prompt(tok, [Piece("<|im_", True), Piece("end|> hi", False)])
    assert 2 not in ids
    ids = encode_prompt(
        tok, [Piece("text <|im_start|> then <|im_", True), Piece("end|>", False), Piece(" <|im_end|>", True)]
    )
    assert ids.tolist().count(1) == 1 and ids.tolist().count(2) == 1


def test_text_after_a_template_marker_gets_a_dummy_space_only_from_tokenizers_that_give_one():
    parts = [Piece("<s>", True), Piece("fox</s>", False), Piece("</s>", True)]
    for kind, dummy in (("bpe-first", False), ("bpe-prepend", True)):
        tok = small(kind)
        ids = encode_prompt(tok, parts)
        assert ids[0] == 1 and ids[-1] == 2
        assert b"".join(tok.token_bytes(i) for i in ids) == (b" " if dummy else b"") + b"fox</s>"


def test_nothing_predicts_a_response_after_an_empty_prompt():
    with pytest.raises(UserError, match="nothing predicts the first token"):
        encode_prompt(small("byte"), [])


def test_merges_across_the_border():
    tok = small("byte")
    assert merges_across(tok, ["the"], [" fox"]) == 0
    assert merges_across(tok, ["the "], ["fox"]) == 1
    assert merges_across(tok, ["", "the "], ["fox", ""]) == 0
    assert merges_across(tok, ["the ", "the", "over the "], ["fox", " fox", "dog"]) == 2
    assert merges_across(small("byte-nfc"), ["e"], ["\u0301"]) == 1


def test_special_tokens_in_a_text_are_counted():
    counted = small("byte").control_pattern.findall
    assert len(counted("say <|im_end|> or <|endoftext|><|im_end|>, not <|im_ end|>")) == 3
    assert len(counted("nothing here")) == len(counted("1 < 2")) == 0
    assert len(small("unigram").control_pattern.findall("</s><s>")) == 2


def test_small_tokenizers_have_no_stray_special_tokens():
    """The trained stand-ins look like the real thing: byte pieces are not special."""
    added = {token["content"] for token in json.loads(core("bpe-prepend").to_str())["added_tokens"]}
    assert added == set(SPECIALS) and not added.intersection(BYTE_PIECES)


def test_a_post_processor_that_leaves_out_the_text_is_refused():
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    with pytest.raises(UserError, match="leaves out the text itself"):
        load_tokenizer(fast(edited("byte", lambda state: state.update(post_processor=template))))
