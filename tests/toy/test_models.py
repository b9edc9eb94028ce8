"""The toy models: small, the same for the same seed, and with tokenizers that disagree."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from toy.models import TEACHER_TOKENIZERS, make_toy_models, student_tokenizer, teacher_tokenizer
from toy.world import corpus, generate_pairs

from ctpd_jax.models.decoder import apply
from ctpd_jax.models.hf import load_hf
from ctpd_jax.schema import Message
from ctpd_jax.text.prompts import end_of_turn_id, load_text_model
from ctpd_jax.text.spans import align_batch
from ctpd_jax.text.templates import load_template
from ctpd_jax.text.tokens import encode, load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_toy_models(tmp_path_factory.mktemp("toy"), seed=0)


@pytest.fixture(scope="module")
def tokenizers(folders):
    return [load_tokenizer(str(folder)) for folder in folders]


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_sizes_and_vocabularies(folders, tokenizers):
    for folder, tokenizer, low, high in zip(folders, tokenizers, (0.7e6, 0.3e6), (1.2e6, 0.5e6)):
        config, params = load_hf(folder)
        count = sum(leaf.size for leaf in _leaves(params))
        assert low < count < high
        assert config.vocab_size == len(tokenizer.hf)
        ids = load_text_model(str(folder)).prompt([Message("user", "请谈谈 tea.")])
        logits = np.asarray(apply(config, params, ids[None]))
        assert logits.shape == (1, len(ids), config.vocab_size) and np.isfinite(logits).all()


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


def test_the_teacher_alternates_windows_and_the_student_does_not(folders):
    teacher, student = (load_hf(folder)[0] for folder in folders)
    assert len(set(teacher.layer_kinds)) == 2 and any(kind.window for kind in teacher.kinds)
    assert [kind.window for kind in student.kinds] == [None]


def test_the_tokenizers_differ_in_kind(tokenizers):
    teacher, student = tokenizers
    assert (teacher.byte_level, student.byte_level) == (False, True)
    assert teacher.bos_id is not None and student.bos_id is None
    assert teacher.prefix.present and not student.prefix.present
    assert end_of_turn_id(student, load_template(student)) == student.hf.pad_token_id


def test_responses_are_short_and_spans_are_of_every_shape(tokenizers):
    teacher, student = tokenizers
    texts = [pair.chosen for pair in generate_pairs("train", 200)]
    shapes, sizes = set(), np.zeros(2, int)
    for aligned in align_batch(texts, teacher, student):
        assert 12 <= len(aligned.student.ids) <= 100
        sizes += [len(aligned.teacher.ids), len(aligned.student.ids)]
        counts = (
            np.bincount(side.span_ids, minlength=aligned.num_spans) for side in (aligned.teacher, aligned.student)
        )
        shapes |= {(min(int(m), 2), min(int(n), 2)) for m, n in zip(*counts)}
    assert shapes == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert sizes[0] < 0.9 * sizes[1]


def test_every_text_of_the_world_is_spelled_without_loss(tokenizers):
    for tokenizer in tokenizers:
        for text in [*corpus(number=100), "ΔΨ 漢字 👩‍🔬 <|im_end|> <end_of_turn>"]:
            assert tokenizer.hf.decode(encode(tokenizer, text)) == text


def test_made_again_they_are_the_same(folders, tmp_path):
    directory = folders[0].parent
    make_toy_models(tmp_path / "again", seed=0)
    assert digests(tmp_path / "again") == digests(directory)
    make_toy_models(tmp_path / "other", seed=1)
    assert digests(tmp_path / "other")["student/model.safetensors"] != digests(directory)["student/model.safetensors"]


def test_training_a_tokenizer_twice_gives_the_same():
    texts = list(corpus(number=200))
    for make in (teacher_tokenizer, student_tokenizer):
        assert make(texts).backend_tokenizer.to_str() == make(texts).backend_tokenizer.to_str()


# ------------------------------------------------------------------------------------------------ other mismatches


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each mismatch's teacher tokenizer, and the student's, as the library reads them from a folder."""
    texts, folder = list(corpus(number=600)), tmp_path_factory.mktemp("mismatches")
    makers = {**TEACHER_TOKENIZERS, "student": student_tokenizer}
    for name, make in makers.items():
        make(texts).save_pretrained(folder / name)
    return {name: load_tokenizer(str(folder / name)) for name in makers}


def test_the_mismatches_differ_in_how_many_spans_are_one_to_one(saved):
    texts, shares = [pair.chosen for pair in generate_pairs("train", 100)], {}
    for name in TEACHER_TOKENIZERS:
        counts = [
            (np.bincount(aligned.teacher.span_ids), np.bincount(aligned.student.span_ids))
            for aligned in align_batch(texts, saved[name], saved["student"])
        ]
        shares[name] = np.mean(np.concatenate([(m == 1) & (n == 1) for m, n in counts]))
    assert shares["near"] > 0.9 > shares["word"] > 0.77 > shares["unigram"] > 0.6


@pytest.mark.parametrize("name", ["near", "unigram"])
def test_other_teachers_spell_every_text_without_loss(saved, name):
    tokenizer = saved[name]
    assert tokenizer.byte_level == (name == "near") and tokenizer.bos_id is not None
    for text in [*corpus(number=50), "ΔΨ 漢字 👩‍🔬 <|im_end|> <end_of_turn>", "  two  spaces "]:
        assert tokenizer.hf.decode(encode(tokenizer, text)) == text


def test_a_unigram_tokenizer_made_twice_is_the_same():
    texts = list(corpus(number=200))
    first, again = (TEACHER_TOKENIZERS["unigram"](texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == again and '"type":"Unigram"' in first
