"""`ctpd` on 2 processes of 4 simulated devices each: against one device, repeated, with one killed or both stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import MICRO, ROOT
from helpers.harness_tasks import write_tasks
from helpers.jobs import stored_params
from helpers.processes import CTPD, environment, one_process, two_processes
from toy import world_on_disk

from ctpd_jax.job.lineage import params_digest
from ctpd_jax.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")]
SETTINGS = ["--config", MICRO, "--config.student_dpo.steps=-1"]
STEPS, SAVE_EVERY = 20, 4
SAVED, KILLED = 8, 10  # the kill comes once the save after so many updates is whole, and so many updates are made
# Every parameter is cut into 8 parts, so that each process holds half of it, and half of a checkpoint.
TRAIN = [
    "train", *SETTINGS, f"--config.train.steps={STEPS}", f"--config.train.save_every={SAVE_EVERY}",
    "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.stall_minutes=2",
]  # fmt: skip
FIRST, LATER = 2e-6, 1e-4  # relative to the loss it is held against: of the first update, and of any of the twenty


def launch(workdir: Path, **settings: str) -> subprocess.Popen:
    """launch/local.sh with 2 x 4 devices; what they say goes to the log beside the workdir."""
    two = {"CTPD": " ".join(CTPD), "LOCAL_DEVICES": "4", "GRACE": "1", "RESTART_DELAY": "1", "XLA_FLAGS": ""}
    with open(workdir.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "local.sh"), "2", *TRAIN, "--workdir", str(workdir)],
            stdout=log, stderr=subprocess.STDOUT, env=environment(1) | two | settings,
        )  # fmt: skip


def end(launcher: subprocess.Popen, workdir: Path) -> tuple[int, str]:
    """Its exit code, and all that was said."""
    log = workdir.with_suffix(".log")
    try:
        code = launcher.wait(300)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end after 300 seconds; what was said last:\n{log.read_text()[-5000:]}")
    finally:
        launcher.terminate()
    return code, log.read_text()


def process_of(launcher: subprocess.Popen, number: int) -> int:
    """The pid of one of the processes that a launcher has started."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"CTPD_PROCESS={number}\0" in Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    raise AssertionError(f"process {number} is not there")


def kill_in_the_middle(launcher: subprocess.Popen, workdir: Path, number: int) -> float:
    """kill -9 of one process where updates are lost by it. Returns when that was."""
    saved = workdir / "train" / "checkpoints" / f"{SAVED:08d}" / "checksums.json"
    while not saved.exists() or len(read_metrics(workdir, "train")) < KILLED:
        assert launcher.poll() is None, workdir.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    os.kill(process_of(launcher, number), signal.SIGKILL)
    assert not (workdir / "train" / "done.json").exists()
    return time.time()


def losses(workdir: Path) -> np.ndarray:
    lines = read_metrics(workdir, "train")
    assert [line["step"] for line in lines] == list(range(STEPS))
    return np.array([line["loss"] for line in lines])


def digest(workdir: Path) -> str:
    return json.loads((workdir / "train" / "done.json").read_text())["params"]


def gaps(workdir: Path, other: Path) -> np.ndarray:
    """Of each update's loss, relative to that of the other run."""
    return np.abs(losses(workdir) / losses(other) - 1)


def went_on_from(workdir: Path, killed: float) -> int:
    """The first update that was made again, or for the first time, after all were started again."""
    # A new process takes seconds to start, and the one that survives makes no update alone.
    return min(line["step"] for line in read_metrics(workdir, "train") if line["time"] > killed + 1)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """A workdir that has all but the training; every run below begins with a copy of it."""
    workdir = tmp_path_factory.mktemp("two") / "annotated"
    one_process(workdir, 1, ["run", *SETTINGS, "--config.train.steps=-1"])
    return workdir


def copy(annotated: Path, name: str) -> Path:
    return shutil.copytree(annotated, annotated.with_name(name))


@pytest.fixture(scope="module")
def undisturbed(annotated) -> Path:
    workdir = copy(annotated, "undisturbed")
    code, told = end(launch(workdir), workdir)
    assert code == 0, told[-3000:]
    assert "mesh: data 1, fsdp 8, tensor 1" in told
    assert "starting" not in told, told[-5000:]  # where they stood still, it holds every thread's stack
    return workdir


def test_two_processes_train_as_one_device_does(annotated, undisturbed):
    one = copy(annotated, "one")
    one_process(one, 1, TRAIN)
    found = gaps(undisturbed, one)
    print(f"\n2 x 4 against one device: relative gap {found[0]:.1e} at the first update, {found.max():.1e} at most")
    assert found[0] <= FIRST and found.max() <= LATER
    assert losses(one)[-1] < 0.9 * losses(one)[0]  # something was learned meanwhile
    assert digest(one) != digest(undisturbed)  # the digest sees rounding
    stored = stored_params(undisturbed / "train" / "params")
    assert params_digest(stored) == digest(undisturbed)  # gathered from both, it is that of the whole arrays


def test_the_same_two_processes_repeat_bit_for_bit(annotated, undisturbed):
    again = copy(annotated, "again")
    code, told = end(launch(again), again)
    assert code == 0, told[-3000:]
    print(f"\n2 x 4 repeated: {digest(again)} and {digest(undisturbed)}, gap {gaps(again, undisturbed).max():.1e}")
    assert losses(again).tolist() == losses(undisturbed).tolist()
    assert digest(again) == digest(undisturbed)


def test_after_a_kill_one_process_with_eight_devices_goes_on(annotated, undisturbed):
    workdir = copy(annotated, "other_topology")
    launcher = launch(workdir, RESTARTS="0")
    killed = kill_in_the_middle(launcher, workdir, number=1)
    code, told = end(launcher, workdir)
    assert code == 137 and "process 1 ended with exit code 137" in told, told[-3000:]
    made = len(read_metrics(workdir, "train"))
    saved = max(int(path.parent.name) for path in workdir.glob("train/checkpoints/*/checksums.json"))
    one_process(workdir, 8, TRAIN)
    found, first = gaps(workdir, undisturbed), went_on_from(workdir, killed)
    print(f"\nkilled after {made} updates, 1 x 8 went on from update {first}: relative gap {found.max():.1e} at most")
    assert SAVED <= saved == first <= made < STEPS and made >= KILLED
    assert found.max() <= LATER


def test_after_a_kill_the_launcher_starts_both_again_to_the_same_bits(annotated, undisturbed):
    workdir = copy(annotated, "same_topology")
    launcher = launch(workdir)
    killed = kill_in_the_middle(launcher, workdir, number=0)
    code, told = end(launcher, workdir)
    assert code == 0, told[-3000:]
    assert "process 0 ended with exit code 137" in told and told.count("starting all again") == 1
    first = went_on_from(workdir, killed)
    print(f"\nkilled, 2 x 4 went on from update {first}: gap {gaps(workdir, undisturbed).max():.1e}")
    print(f"{digest(workdir)} and {digest(undisturbed)}")
    assert first >= SAVED and first % SAVE_EVERY == 0
    assert losses(workdir).tolist() == losses(undisturbed).tolist()
    assert digest(workdir) == digest(undisturbed)


SPOILT = """
import sys
from ctpd_jax import cli
from ctpd_jax.stages import train

made = train.training_items

def spoil(*given):
    items, figures = made(*given)
    items[5].chosen.weights[0] = float("inf")
    print("spoilt:", items[5].id, flush=True)
    return items, figures

train.training_items = spoil
sys.exit(cli.main())
"""


def test_both_name_a_pair_that_is_not_finite_and_leave_it_out_together(annotated):
    workdir = copy(annotated, "spoilt")
    for setting, code in (("stop", 2), ("skip", 0)):
        arguments = [*TRAIN, f"--config.train.nonfinite={setting}"]
        started = two_processes(workdir, arguments, [sys.executable, "-c", SPOILT])
        try:
            codes = [process.wait(300) for process in started]
        finally:
            for process in started:
                process.kill()
        told = [workdir.with_suffix(f".{number}.log").read_text() for number in range(2)]
        assert codes == [code, code], told[0][-3000:]
        pair = re.search(r"spoilt: (\S+)", told[0])[1]
        for text in told:
            assert f"by themselves are not finite: {pair}." in text
    skipped = [line["step"] for line in read_metrics(workdir, "train") if "skipped" in line]
    # 48 pairs, 8 an update: once in each epoch of six.
    assert len(skipped) == sum(1 for epoch in range(0, STEPS, 6) if any(epoch <= step < epoch + 6 for step in skipped))
    assert skipped and f"train: {len(skipped)} of {STEPS} updates were not finite" in told[0]


def test_two_processes_propose_as_one_does(annotated):
    """Each draws and ranks its share: the pairs are those of one process with as many devices as each of the two."""
    propose = ["propose", *SETTINGS, "--config.student_proposed.steps=1", "--config.propose.batch=8"]
    propose += ["--config.propose.limit=6", "--config.annotate.pairs_per_shard=4"]
    one, two = copy(annotated, "proposed-by-one"), copy(annotated, "proposed-by-two")
    for workdir in (one, two):
        shutil.rmtree(workdir / "annotations")  # nothing of it is read
    one_process(one, 4, propose)
    processes = two_processes(two, propose)
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], two.with_suffix(".0.log").read_text()[-3000:]
    pairs = [(workdir / "proposals" / "pairs.jsonl").read_bytes() for workdir in (one, two)]
    assert pairs[0] == pairs[1] and pairs[0].count(b"\n") > 3


# What each process does by itself, and the file that says that it has begun: shares of a column, samples by one alone.
APART = {
    "annotate": ("annotations/columns/reference/0*", ["--config.annotate.pairs_per_shard=4"]),
    "evaluate": (
        "evaluation/samples/student_start.json",
        ["--config.evaluate.samples=256", "--config.evaluate.max_new_tokens=32"],
    ),
}


@pytest.mark.parametrize("stage", APART)
@pytest.mark.parametrize("told", [[0, 1], [1]])
def test_sigterm_stops_both_where_each_works_by_itself(annotated, stage, told):
    begun, settings = APART[stage]
    workdir = copy(annotated, f"{stage}-{len(told)}")
    shutil.rmtree(workdir / "annotations" if stage == "annotate" else workdir / "evaluation" / "samples")
    processes = two_processes(workdir, [stage, *SETTINGS, "--config.train.steps=-1", *settings])
    logs = [workdir.with_suffix(f".{number}.log") for number in range(2)]
    try:
        while not any(workdir.glob(begun)):
            assert all(process.poll() is None for process in processes), logs[0].read_text()[-3000:]
            time.sleep(0.01)
        asked = time.monotonic()
        for number in told:
            processes[number].send_signal(signal.SIGTERM)
        codes = [process.wait(120) for process in processes]
        print(f"\n{stage}, {told} told: both had left after {time.monotonic() - asked:.1f} seconds")
    finally:
        for process in processes:
            process.kill()
    for log in logs:
        said = log.read_text()
        assert re.search(rf"^ctpd {stage}: stopped in {stage}: ", said, re.M), said[-3000:]
        assert "Not every process came to the end" not in said
    assert codes == [75, 75]
    assert any(workdir.glob(begun))


def test_two_processes_answer_lm_eval_as_one_does(tmp_path):
    """Each takes its share of the batches, on its own four devices; the first one writes."""
    pytest.importorskip("lm_eval", reason="lm-eval is the extra `eval`")
    tasks, names = write_tasks(tmp_path / "tasks", times=2), ("own_letters", "own_text", "own_answers")
    folder = str(world_on_disk().student)
    arguments = ["evaluate", "--harness", ",".join(names), "--harness-tasks", tasks, "--folder", folder]
    arguments += ["--batch-tokens", "1024", "--log-samples"]
    one_process(tmp_path / "one", 1, arguments)
    codes = [process.wait(300) for process in two_processes(tmp_path / "two", arguments)]
    logs = [(tmp_path / f"two.{number}.log").read_text() for number in range(2)]
    assert codes == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    assert "lm-eval, shares" in logs[0] and "lm-eval, shares" not in logs[1]

    def answers(workdir: Path) -> dict[str, list]:
        (results,) = workdir.rglob("results_*.json")  # one process has written
        samples = {name: results.parent / results.name.replace("results", f"samples_{name}") for name in names}
        return {name: [json.loads(line)["resps"] for line in open(f"{path}l")] for name, path in samples.items()}

    one, two = answers(tmp_path / "one"), answers(tmp_path / "two")
    assert one["own_answers"] == two["own_answers"] and len(one["own_answers"]) == 16
    np.testing.assert_allclose(*(np.array(own["own_text"], float) for own in (one, two)), atol=1e-3)
    theirs, ours = (np.array(own["own_letters"]) for own in (one, two))  # [questions, choices, 1, 2], as texts
    np.testing.assert_allclose(theirs[..., 0].astype(float), ours[..., 0].astype(float), atol=1e-3)
    assert (theirs[..., 1] == ours[..., 1]).all()
