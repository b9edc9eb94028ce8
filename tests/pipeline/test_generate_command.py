"""`ctpd generate`: with a model folder, with a run; prompts, draws, stop texts; what it refuses."""

import json
import os
import subprocess
import sys

import jax
import pytest
from helpers import MICRO, ROOT
from toy import world_on_disk

from ctpd_jax.cli import main
from ctpd_jax.models.hf import load_hf, safetensors
from ctpd_jax.models.sampling import generate
from ctpd_jax.schema import Message
from ctpd_jax.text.prompts import load_text_model

TEA, COFFEE = "Tell me about tea.", "And coffee?\nIn one line."


@pytest.fixture
def ask(toy_models, capsys):
    """Answers of the toy student, as they are printed."""

    def run(*arguments, prompts=(TEA,)):
        line = ["generate", "--folder", str(toy_models[1]), "--max-new-tokens", "20"]
        assert main([*line, *(part for prompt in prompts for part in ("--prompt", prompt)), *arguments]) == 0
        return capsys.readouterr().out

    return run


def answer_of(folder, prompt, **drawn):
    """The same without the command line."""
    text, (config, params) = load_text_model(str(folder)), load_hf(folder)
    ids = text.prompt([Message("user", prompt)]).tolist()
    stop_ids = (text.end_of_turn, *config.eos_ids)
    return text.tokenizer.hf.decode(
        generate(config, params, [ids], 20, stop_ids=stop_ids, **drawn)[0], skip_special_tokens=True
    )


def test_a_folder_answers_one_prompt_with_the_answer_alone(ask, toy_models):
    assert ask() == answer_of(toy_models[1], TEA) + "\n"


def test_several_prompts_are_answered_each_under_its_own(ask):
    tea, coffee = ask(), ask(prompts=[COFFEE])
    assert tea != coffee
    assert ask(prompts=[TEA, COFFEE]) == f"> {TEA}\n{tea}\n> And coffee?\n> In one line.\n{coffee}"


def test_draws_are_those_of_the_seed_and_the_settings(ask, toy_models):
    drawn = ask("--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--seed", "3")
    key = jax.random.fold_in(jax.random.key(3), 0)
    assert drawn == answer_of(toy_models[1], TEA, temperature=1.5, top_k=40, top_p=0.9, key=key) + "\n"
    assert drawn != ask("--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--seed", "4")
    assert ask("--temperature", "1.5", "--top-k", "1") == ask()


def test_an_answer_is_cut_before_its_stop_text(ask):
    whole = ask().removesuffix("\n")
    stop = whole[len(whole) // 2 :][:3]
    cut = whole[: whole.index(stop)]
    assert ask("--stop", "not in there", "--stop", stop) == cut + "\n"


def test_a_run_answers_as_its_folder_does_and_says_the_rest_elsewhere(new_workdir, capsys):
    """The teacher of a run that leaves its training out is the checkpoint that was brought."""
    workdir = new_workdir("answers")
    line = ["generate", "--config", MICRO, "--workdir", str(workdir), "--config.teacher_sft.steps=-1"]
    assert main([*line, "--model", "teacher", "--prompt", TEA, "--max-new-tokens", "20"]) == 0
    printed = capsys.readouterr()
    assert printed.out == answer_of(world_on_disk().teacher, TEA) + "\n"
    assert "JAX" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --config and --workdir of a run, or --folder"),
        (["--config", MICRO], "give --config and --workdir of a run, or --folder"),
        (["--folder", "nowhere"], "nowhere is not a folder"),
        (["--folder", "x", "--config", MICRO], "leave --config out"),
        (["--folder", "x", "--workdir", "y"], "leave --workdir out"),
        (["--folder", "x", "--config.seed=1"], "leave --config.seed=1 out"),
        (["--folder", "x", "--seed", "-1"], "--seed must lie between"),
    ],
)
def test_what_is_missing_or_too_much_is_named(arguments, message, capsys):
    assert main(["generate", "--prompt", TEA, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "0"], "top_p must lie in (0, 1]"),
        (["--top-k", "-1"], "top_k must lie between 0"),
        (["--temperature", "-1"], "temperature must be a number from 0"),
        (["--max-new-tokens", "100000"], "positions"),
        (["--stop", ""], "stop string must not be empty"),
    ],
)
def test_settings_out_of_their_range_are_named(toy_models, arguments, message, capsys):
    assert main(["generate", "--folder", str(toy_models[1]), "--prompt", TEA, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_a_folder_or_a_row_of_a_run_but_not_both(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--prompt", TEA, "--folder", "x", "--model", "teacher"])
    assert "not allowed with argument --folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ folders of strangers


def _copy(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_no_code_of_a_folder_runs_and_any_terminal_will_do(toy_models, tmp_path):
    """`auto_map` of config.json names a Python file, and "y" is answered; the prompts, shown again, are not latin-1."""
    folder = _copy(toy_models[1], tmp_path / "m")
    code = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-m", "ctpd_jax.cli", "generate", "--folder", folder, "--max-new-tokens", "4"]
    done = subprocess.run(
        [*command, "--prompt", "Zażółć", "--prompt", "tea"],
        input=b"y\n" * 9,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "latin-1"},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"> Za?\xf3??\n") and not (tmp_path / "ran").exists()


def test_a_template_reaches_nothing_of_python(toy_models, tmp_path, capsys):
    folder = _copy(toy_models[1], tmp_path / "m")
    escape = "cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "')"
    (folder / "chat_template.jinja").write_text("{{ " + escape + " }}{{ messages[0]['content'] }}")
    assert main(["generate", "--folder", str(folder), "--prompt", TEA]) == 2
    assert "unsafe" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_a_weight_that_is_not_finite_is_named(toy_models, tmp_path, capsys):
    folder = _copy(toy_models[1], tmp_path / "m")
    name, tensor = next(iter(safetensors.read_header(folder / "model.safetensors").items()))
    with open(tensor.file, "r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(b"\xff" * 4)
    assert main(["generate", "--folder", str(folder), "--prompt", TEA]) == 2
    printed = capsys.readouterr()
    assert f"tensor {name} holds nan" in printed.err and not printed.out


def test_a_folder_of_adapters_is_named(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["generate", "--folder", str(tmp_path), "--prompt", TEA]) == 2
    assert "merge_and_unload" in capsys.readouterr().err


def test_prompts_of_a_file_are_answered_as_alpaca_eval_writes_them(ask, toy_models, tmp_path, capsys):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers" / "ours.json"
    rows = [{"prompt": TEA}, {"prompt": COFFEE, "chosen": "x", "rejected": "y"}, {"prompt": TEA}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["generate", "--folder", str(toy_models[1]), "--max-new-tokens", "20", "--prompts", str(file)]
    assert main([*line, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    written = json.loads(out.read_text())
    # Each prompt once; the very answers that are printed for one prompt.
    expected = [{"instruction": said, "output": ask(prompts=[said])[:-1]} for said in (TEA, COFFEE)]
    assert [{key: row[key] for key in ("instruction", "output")} for row in written] == expected
    assert {row["generator"] for row in written} == {toy_models[1].name}
    mean = sum(len(row["output"]) for row in written) / 2
    assert f"2 answers of {mean:.0f} characters on average" in told and "% cut" in told
    for wrong in (line, [*line, "--prompt", TEA, "--out", str(out)], ["generate", "--folder", str(toy_models[1])]):
        assert main(wrong) == 2
    assert "--out FILE.json" in capsys.readouterr().err
