"""Added tokens of every kind: the ids are those of the folder's tokenizer.json, or the folder is refused by name."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers.small_tokenizers import FORMS, HARD_TEXTS, KINDS, core, fast, small
from tokenizers import AddedToken, Tokenizer

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message, PreferencePair
from ctpd_jax.text import spelling
from ctpd_jax.text.prepare import Limits, prepare_part
from ctpd_jax.text.prompts import TextModel, encode_prompt, frame_tokens, load_text_model
from ctpd_jax.text.spans import align
from ctpd_jax.text.templates import Piece, PromptTemplate
from ctpd_jax.text.tokens import encode, encode_batch, load_tokenizer, with_control

NEW = ("<ent>", "</ent>", "cat", "[word]", "<tool_call>", "é!", "  two", "foo bar", "<|x|>", "dog.")
FLAGS = {
    "plain": {},
    "raw": {"normalized": False},
    "lstrip": {"lstrip": True},
    "lstrip raw": {"lstrip": True, "normalized": False},
    "rstrip": {"rstrip": True},
    "rstrip raw": {"rstrip": True, "normalized": False},
    "single word": {"single_word": True},
    "single word raw": {"single_word": True, "normalized": False},
}
QUICK = ("mistral-v0.1", "smollm2")  # to load: their vocabularies are small
CLASSES = ("GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast")
BETWEEN = ("", " ", "  ", "\n", "\t", "é", "🙂", "日本", "e\u0301", "barfoo", "x.", "1234", "<", "The quick", "</s>")


def folder_of(backend: Tokenizer, directory: Path, **settings: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def with_tokens(backend: Tokenizer, flags: dict[str, bool]) -> Tokenizer:
    grown = Tokenizer.from_str(backend.to_str())
    grown.add_tokens([AddedToken(word, special=False, **flags) for word in NEW])
    return grown


def texts_with(tokens: list[str], count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    parts = [
        [rng.choice(tokens if rng.random() < 0.4 else BETWEEN) for _ in range(rng.randint(1, 14))] for _ in range(count)
    ]
    return ["".join(part) for part in parts]


def compared_with_the_file(folder: Path, count: int) -> int:
    """Holds the ids of texts that mention added tokens against tokenizer.json; returns how many there were."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True  # what somebody types is no special token
    tokens = [token.content for token in own.get_added_tokens_decoder().values()]
    rng = random.Random(1)
    texts = texts_with([*NEW, *rng.sample(tokens, min(60, len(tokens)))], count)
    tok = load_tokenizer(str(folder))
    asked = [text + "\n\n" for text in texts]
    theirs = own.encode_batch([*texts, *asked], add_special_tokens=False)
    prompts = [encode_prompt(tok, [Piece(text, False), Piece("\n\n", True)], bos=False) for text in texts]
    for text, ids, encoding in zip([*texts, *asked], [*encode_batch(tok, texts), *prompts], theirs, strict=True):
        assert ids.tolist() == encoding.ids, (text, folder.name)
    return len(texts)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_file(kind, flags, tmp_path):
    """Byte pieces and special tokens that the model itself spells are the exception; see test_tokens."""
    folder = folder_of(with_tokens(core(kind), flags), tmp_path)
    own, tok = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(str(folder))
    spelled = {token.content for token in own.get_added_tokens_decoder().values() if token.special}
    for text in [*texts_with(list(NEW), 60), *HARD_TEXTS.values()]:
        if "<0x" not in text and not any(name in text for name in spelled):
            assert encode(tok, text).tolist() == own.encode(text, add_special_tokens=False).ids, text
            aligned = align(text, tok, small("byte"))
            assert aligned.bounds[-1] == len(text.encode())


@pytest.mark.parametrize("kind", ["byte", "bpe-prepend", "bpe-first"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_that_a_folder_names_has_no_say(kind, name, tmp_path):
    folder = folder_of(with_tokens(core(kind), {}), tmp_path, tokenizer_class=name)
    assert compared_with_the_file(folder, 100) == 100


def test_unflagged_tokens_keep_their_ids_when_flagged_ones_stand_before_them(tmp_path):
    """A list such as Qwen 3's: special tokens outside the vocabulary first, then <think>, which answers hold."""
    backend = Tokenizer.from_str(core("byte").to_str())
    backend.add_special_tokens([AddedToken(f"<|s{i}|>", special=True) for i in range(14)])
    backend.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "<|fim_prefix|>", "<think>")])
    tok = load_tokenizer(str(folder_of(backend, tmp_path)))
    think = backend.token_to_id("<think>")
    assert think in encode(tok, "<think>hm</think> yes")
    assert backend.token_to_id("<|s3|>") not in encode(tok, "a <|s3|> b <think>")
    assert align("<think>hm</think> <|s3|>", tok, small("bpe-prepend")).bounds[-1] == len("<think>hm</think> <|s3|>")


def test_an_unflagged_control_token_is_text_where_it_is_typed():
    backend = Tokenizer.from_str(core("byte").to_str())
    backend.add_tokens([AddedToken("<|turn|>", normalized=False), AddedToken("<ent>", normalized=False)])
    tok = load_tokenizer(fast(backend))
    turn, ent = backend.token_to_id("<|turn|>"), backend.token_to_id("<ent>")
    assert turn in encode(tok, "a <|turn|> <ent>")
    told = with_control(tok, ["<|turn|>"])
    ids = encode(told, "a <|turn|> <ent>").tolist()
    assert turn not in ids and ent in ids
    assert told.fingerprint != tok.fingerprint
    assert with_control(told, ["<|turn|>", "no such token"]) is told


def test_white_space_and_thoughts_frame_no_turn():
    """Gemma has added tokens of white space, which its template writes too; reasoning models have <think>."""
    backend = Tokenizer.from_str(core("byte").to_str())
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "<turn>", "<think>", "</think>")])
    tok = load_tokenizer(fast(backend))
    template = PromptTemplate(
        "chat",
        "{% for m in messages %}<turn>{{ m['role'] }}\n\n{% if m['role'] == 'assistant' and loop.last %}<think></think>"
        "{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<turn><think>\n{% endif %}",
    )
    assert frame_tokens(tok, template) == {"<turn>", "<|im_end|>"}


def test_white_space_taken_along_stops_where_an_added_token_begins():
    """Gemma's runs of tabs are added tokens, and a token with rstrip leaves them alone."""
    backend = Tokenizer.from_str(core("byte").to_str())
    backend.add_tokens([AddedToken("\t" * n, normalized=False) for n in range(2, 32)])
    backend.add_tokens([AddedToken("[word]", rstrip=True, normalized=False)])
    tok = load_tokenizer(fast(backend))
    for text in ("[word]  " + "\t" * n + "x" for n in (0, 1, 5, 31, 33, 40, 70)):
        assert encode(tok, text).tolist() == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
@pytest.mark.parametrize("token", [" ", "\n", "<a>"])
def test_white_space_that_many_tokens_could_share_is_gone_through_once_for_each(token, flags, monkeypatch):
    """Counted, not timed: of twice the text, four times the places and not eight times, each looked at once."""
    backend = Tokenizer.from_str(core("byte").to_str())
    backend.add_tokens([AddedToken(token, normalized=False, **flags)])
    tok = load_tokenizer(fast(backend))
    looked, real = [], spelling._ends
    monkeypatch.setattr(spelling, "_ends", lambda *given: looked.append(found := real(*given)) or found)
    counts = []
    for size in (60, 120):
        for text in ("a" + " \n" * size + "b", ("<a>" + " " * size) * 9):
            looked.clear()
            assert align(text, tok, small("byte")).bounds[-1] == len(text)
            counts.append(sum(map(len, looked)))
    assert counts[2] < 4.5 * max(counts[0], 100) and counts[3] < 2.5 * max(counts[1], 100)


@pytest.mark.parametrize("text", ["\n" * 1640 + "\u1161\ufffd", " \n" * 1500, "\n" * 999 + "x" + "\n" * 99], ids=len)
def test_very_long_white_space_is_read_and_no_token_is_tried_at_thousands_of_places(text, monkeypatch):
    """Of more than a thousand characters one token takes all or none, as tokenizer.json does."""
    backend = Tokenizer.from_str(core("byte-dummy").to_str())
    backend.add_tokens([AddedToken("\n", rstrip=True)])
    tok = load_tokenizer(fast(backend))
    looked, real = [], spelling._ends
    monkeypatch.setattr(spelling, "_ends", lambda *given: looked.append(found := real(*given)) or found)
    try:
        assert align(text, tok, small("byte")).bounds[-1] == len(text.encode())
    except UserError as error:  # white space that is shared in many parts, over more than a thousand characters
        assert text.startswith(" ") and "do not spell the text" in str(error)
    assert looked and max(map(len, looked)) <= spelling.LONGEST_SHARED + 1


def test_a_text_on_which_the_tokenizers_library_fails_is_a_sentence_and_one_row_left_out():
    """Where two tokens take the same white space it panics, and a panic is no Exception."""
    backend = Tokenizer.from_str(core("byte").to_str())
    backend.add_tokens([AddedToken("<a>", rstrip=True, normalized=False)])
    backend.add_tokens([AddedToken("\n", lstrip=True, normalized=False)])
    tok = load_tokenizer(fast(backend, name_or_path="mine"))
    with pytest.raises(UserError, match=r"'mine' cannot read 'x<a>\\n\\t': the tokenizers library fails"):
        encode_batch(tok, ["tea", "x<a>\n\t"])
    model = TextModel(tok, PromptTemplate("plain", "\n"), end_of_turn=0)
    asked = (Message("user", "Q"),)
    pairs = [PreferencePair("0", asked, "tea", "x<a>\n\t"), PreferencePair("1", asked, "tea", "x")]
    pairs += [PreferencePair("2", (Message("user", "x<a>\n\t"),), "tea", "x")]
    prepared, report = prepare_part(pairs, model, model, Limits(64, 64))
    assert [pair.id for pair in prepared] == ["1"] and sum(report.left_out.values()) == 2
    backend.add_tokens([AddedToken(" ", lstrip=True, rstrip=True, normalized=False)])
    with pytest.raises(UserError, match=r"'mine' is not lossless.*the tokenizers library fails"):
        load_tokenizer(fast(backend, name_or_path="mine"))


def test_a_text_cannot_pose_as_a_control_token():
    tok = small("byte")
    with pytest.raises(UserError, match="reserved"):
        encode(tok, f"a \ufdd0{tok.control['<|im_end|>']}\ufdd1")
    assert len(encode(tok, "a \ufdd0 b \ufdd1"))


@pytest.mark.parametrize("kind", sorted(FORMS.keys() & set(KINDS)))
def test_what_a_normalizer_makes_a_control_token_is_text_where_it_is_typed(kind):
    backend = Tokenizer.from_str(core(kind).to_str())
    name, typed = (unicodedata.normalize(form, "<d\u00e9but>") for form in ("NFC", "NFD"))
    backend.add_tokens([AddedToken(name, special=True, normalized=True)])
    turn = backend.token_to_id(name)
    assert turn in backend.encode(f"a {typed}", add_special_tokens=False).ids
    tok = load_tokenizer(fast(backend))
    pieces = [Piece(f"{name}user ", True), Piece(f"say {typed} now", False), Piece(f" {name}", True)]
    ids = encode_prompt(tok, pieces, bos=False).tolist()
    assert ids.count(turn) == 2 and ids[-1] == turn
    # Where nobody types it, the template's own are those of the tokenizer.
    pieces[1] = Piece("say it now", False)
    whole = "".join(piece.text for piece in pieces)
    assert encode_prompt(tok, pieces, bos=False).tolist() == backend.encode(whole, add_special_tokens=False).ids


def test_ids_that_the_library_would_number_otherwise_are_refused_by_the_tokens_name(tmp_path):
    state = json.loads(with_tokens(core("byte"), {}).to_str())
    state["added_tokens"][-1]["id"] += 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"'dog\.'.*the id"):
        load_tokenizer(str(tmp_path))


def test_a_token_that_only_the_settings_name_is_refused_by_its_name(tmp_path):
    folder = folder_of(core("byte"), tmp_path / "a", extra_special_tokens=["<|late|>"])
    with pytest.raises(UserError, match=r"'<\|late\|>'.*added tokens of its tokenizer\.json do not have it"):
        load_tokenizer(str(folder))
    load_tokenizer(str(folder_of(core("byte"), tmp_path / "b", pad_token="[PAD]")))  # never read


def test_a_token_of_the_vocabulary_that_ends_turns_must_be_an_added_one(tmp_path):
    """transformers looks it up in every text, and tokenizer.json does not."""
    state = json.loads(core("bpe-no-dummy").to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "</s>"]
    folder = folder_of(Tokenizer.from_str(json.dumps(state)), tmp_path, eos_token="</s>")
    with pytest.raises(UserError, match=r"'</s>'.*added tokens"):
        load_tokenizer(str(folder))


def test_an_end_of_turn_that_is_a_word_is_text_where_it_is_typed(tmp_path):
    """Its name, not what the normaliser makes of it, is what is typed."""
    backend = Tokenizer.from_str(core("bpe-prepend").to_str())
    backend.add_tokens(["ENDTURN"])
    folder = folder_of(backend, tmp_path)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\nENDTURN{% endfor %}")
    model = load_text_model(str(folder))
    assert model.end_of_turn == backend.token_to_id("ENDTURN") and "ENDTURN" in model.tokenizer.control
    assert model.end_of_turn not in encode(model.tokenizer, "ENDTURN")


def test_a_tokenizer_whose_end_was_named_anew_is_probed_again():
    hf = fast(core("byte"))
    assert load_tokenizer(hf).eos_id is None
    hf.eos_token = "<|im_end|>"
    assert load_tokenizer(hf).eos_id == core("byte").token_to_id("<|im_end|>")


@pytest.mark.parametrize(
    "content, reason", [("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("{", "")]
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content, reason):
    folder = folder_of(core("byte"), tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=f"(?s){tmp_path.name}.*{reason}"):
        load_tokenizer(str(folder))


def test_code_of_a_folder_never_runs_whatever_is_answered(tmp_path):
    """Both as transformers would ask, on standard input, and as it would import it."""
    marker = tmp_path / "it ran"
    folder = folder_of(core("byte"), tmp_path / "m", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Mine:\n    pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    for settings in (True, False):
        if not settings:  # the model's code alone: a tokenizer.json that is complete needs none of it
            (folder / "tokenizer_config.json").write_text("{}")
        program = (
            "from ctpd_jax.errors import UserError\nfrom ctpd_jax.text.prompts import load_text_model\n"
            f"try:\n    load_text_model({str(folder)!r})\nexcept UserError as error:\n    print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], input="y\n" * 9, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("auto_map" if settings else "refuses the messages") in done.stdout
        assert not marker.exists()


# ------------------------------------------------------------------------------------------------ real tokenizers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "mistral-v0.1", "deepseek", "smollm2", "gemma3"])
def test_real_tokenizers_with_added_tokens_and_wrong_classes(real_tokenizers, tmp_path, name):
    source = real_tokenizers[name]
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    flags = FLAGS if name in QUICK else ("lstrip raw", "single word")  # `make fuzz` has them all at random
    told = {}
    for case in ("as it is", *flags, *CLASSES[:2]):
        folder = tmp_path / case
        shutil.copytree(source, folder)
        if case in FLAGS:
            with_tokens(own, FLAGS[case]).save(str(folder / "tokenizer.json"))
        elif case in CLASSES:
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": case}))
        try:
            told[case] = f"{compared_with_the_file(folder, 2000)} answers and as many prompts equal"
        except UserError as error:
            assert str(folder) in str(error)
            told[case] = f"refused: {error}"
        shutil.rmtree(folder)
    print(f"\n{name}: " + "; ".join(f"{case}: {what}" for case, what in told.items()))
    assert sum("equal" in what for what in told.values()) == len(told)


@pytest.mark.slow
def test_deepseeks_own_unflagged_turn_tokens(real_tokenizers, tmp_path):
    """53 of its added tokens are not flagged as special, those of its chat template among them."""
    shutil.copytree(real_tokenizers["deepseek"], tmp_path / "d")
    (tmp_path / "d" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
        "{% else %}<｜Assistant｜>{{ m['content'] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    model = load_text_model(str(tmp_path / "d"))
    tok = model.tokenizer
    turns = ("<｜User｜>", "<｜Assistant｜>")
    assert set(turns) <= set(tok.control)
    assert not {tok.ids_of_added[turn] for turn in turns} & set(
        encode(tok, "say <｜User｜> or <｜Assistant｜>").tolist()
    )
    for token_id, token in tok.added.items():
        if not token.special and token.content not in turns:
            assert token_id in encode(tok, f"a{token.content}b").tolist()
