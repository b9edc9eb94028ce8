"""launch/local.sh with a small program in the place of ctpd: what it starts, watches, kills, and answers."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPT = ROOT / "launch" / "local.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

# Notes its pid and its number in the round's folder, and what befalls it; then does what its arguments say.
STUB = r"""#!/usr/bin/env bash
number=${CTPD_PROCESS:-0}
round=$(ls "$STUB_FOLDER" | grep -c "^started-.*-$number$")
trap 'echo "$number TERM" >>"$STUB_FOLDER/signals"; [[ $END_ON_TERM ]] && exit "$END_ON_TERM"' TERM
echo $$ >"$STUB_FOLDER/started-$round-$number"
echo "round $round: $*"
echo "to stderr" >&2
if [[ -x $STUB_FOLDER/script ]]; then source "$STUB_FOLDER/script"; fi
"""
FOR_EVER = "while :; do sleep 0.05; done\n"


class Launcher:
    """The script, its folder, and what it has started."""

    def __init__(self, folder: Path, processes: int, script: str, **environment: str) -> None:
        self.folder = folder
        stub, body = folder / "ctpd", folder / "notes" / "script"
        body.parent.mkdir()
        stub.write_text(STUB)
        body.write_text(script)
        stub.chmod(0o755), body.chmod(0o755)
        self.log = folder / "log"
        settings = {"STUB_FOLDER": str(body.parent), "CTPD": str(stub), "RESTART_DELAY": "0", "GRACE": "1"}
        # Whoever runs the tests in the background ignores SIGINT, and what is ignored would be inherited.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), str(processes), "run", "--config", "a b.py"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"END_ON_TERM": ""} | settings | environment,
            )
        signal.signal(signal.SIGINT, before)

    def started(self) -> dict[str, int]:
        """ "ROUND-NUMBER" -> pid."""
        found = self.folder.glob("notes/started-*")
        return {path.name.removeprefix("started-"): int(path.read_text()) for path in found if path.read_text()}

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 20
        while not set(names) <= set(self.started()):
            assert time.monotonic() < deadline, (self.started(), self.said())
            time.sleep(0.02)

    def said(self) -> str:
        return self.log.read_text()

    def end(self) -> int:
        """Its exit code. Nothing that it has started is left."""
        try:
            code = self.process.wait(30)
        finally:
            self.process.kill()
        deadline = time.monotonic() + 5
        while left := [pid for pid in self.started().values() if alive(pid)]:
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.said()}"
            time.sleep(0.05)
        return code

    def signals(self) -> list[str]:
        path = self.folder / "notes" / "signals"
        return sorted(path.read_text().splitlines()) if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_end_well_and_every_line_has_its_number(tmp_path):
    launcher = Launcher(tmp_path, 3, 'echo -n "no newline at the end"\n')
    assert launcher.end() == 0
    lines = launcher.said().splitlines()
    for number in range(3):
        own = [line for line in lines if line.startswith(f"[{number}] ")]
        assert own == [
            f"[{number}] round 0: run --config a b.py", f"[{number}] to stderr", f"[{number}] no newline at the end"
        ]  # fmt: skip
    assert len(lines) == 9


def test_one_process_is_left_as_it_is(tmp_path):
    launcher = Launcher(tmp_path, 1, 'echo "at ${CTPD_COORDINATOR-nothing} ${CTPD_PROCESSES-nothing}"\n')
    assert launcher.end() == 0
    assert launcher.said().splitlines() == ["round 0: run --config a b.py", "to stderr", "at nothing nothing"]


def test_processes_meet_at_one_port_and_have_devices_of_their_own(tmp_path):
    say = 'echo "$CTPD_COORDINATOR $CTPD_PROCESSES $CTPD_PROCESS $JAX_PLATFORMS $XLA_FLAGS"\n'
    launcher = Launcher(tmp_path, 2, say, LOCAL_DEVICES="4", XLA_FLAGS="--xla_dump_to=x")
    assert launcher.end() == 0
    pattern = r"\[(\d)\] (127\.0\.0\.1:\d+) 2 \1 cpu --xla_dump_to=x --xla_force_host_platform_device_count=4$"
    found = re.findall(pattern, launcher.said(), re.M)
    assert sorted(number for number, _ in found) == ["0", "1"]
    assert len({address for _, address in found}) == 1


def test_when_one_is_killed_all_are_started_again(tmp_path):
    launcher = Launcher(tmp_path, 3, f"if ((round == 0)); then {FOR_EVER} fi\n")
    launcher.wait_for("0-0", "0-1", "0-2")
    os.kill(launcher.started()["0-1"], signal.SIGKILL)
    assert launcher.end() == 0
    assert set(launcher.started()) == {f"{turn}-{number}" for turn in (0, 1) for number in range(3)}
    assert "process 1 ended with exit code 137" in launcher.said()
    assert "starting all again (1 of 3)" in launcher.said()
    assert launcher.signals() == ["0 TERM", "2 TERM"]  # asked first, killed after GRACE


def test_no_more_than_so_many_restarts(tmp_path):
    launcher = Launcher(tmp_path, 2, f"if ((number == 1)); then exit 9; fi\n{FOR_EVER}", RESTARTS="2", GRACE="0")
    assert launcher.end() == 9
    assert {name.split("-")[0] for name in launcher.started()} == {"0", "1", "2"}


def test_what_the_user_can_mend_is_not_tried_again(tmp_path):
    launcher = Launcher(tmp_path, 2, f"if ((number == 1)); then exit 2; fi\n{FOR_EVER}")
    assert launcher.end() == 2
    assert set(launcher.started()) == {"0-0", "0-1"}


def test_a_stop_with_everything_saved_does_not_count(tmp_path):
    launcher = Launcher(tmp_path, 2, "if ((round < 3)); then exit 75; fi\n", RESTARTS="0")
    assert launcher.end() == 0
    assert {name.split("-")[0] for name in launcher.started()} == {"0", "1", "2", "3"}


def test_the_others_are_not_disturbed_while_they_save(tmp_path):
    save = "if ((round == 0 && number == 0)); then exit 75; fi\nif ((round == 0)); then sleep 2; exit 75; fi\n"
    launcher = Launcher(tmp_path, 2, save, GRACE="0")
    assert launcher.end() == 0
    assert launcher.signals() == []


def test_one_that_does_not_come_to_an_end_is_killed(tmp_path):
    hang = f"if ((round == 0 && number == 0)); then exit 75; fi\nif ((round == 0)); then {FOR_EVER} fi\n"
    launcher = Launcher(tmp_path, 2, hang, PATIENCE="1")
    assert launcher.end() == 0
    assert "killing those that are left: 1" in launcher.said()


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("code", ["75", "143"])
def test_sigterm_is_passed_on_and_answered_with_75(tmp_path, processes, code):
    launcher = Launcher(tmp_path, processes, FOR_EVER, END_ON_TERM=code)
    launcher.wait_for(*(f"0-{number}" for number in range(processes)))
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 75
    assert launcher.signals() == [f"{number} TERM" for number in range(processes)]  # once each
    assert len(launcher.started()) == processes  # and not again


def test_a_run_that_was_at_its_end_is_finished(tmp_path):
    launcher = Launcher(tmp_path, 2, FOR_EVER, END_ON_TERM="0")
    launcher.wait_for("0-0", "0-1")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 0


def test_the_second_sigterm_kills(tmp_path):
    launcher = Launcher(tmp_path, 2, FOR_EVER)  # they note SIGTERM and go on
    launcher.wait_for("0-0", "0-1")
    launcher.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while launcher.signals() != ["0 TERM", "1 TERM"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 75


def test_sigint_ends_with_130(tmp_path):
    launcher = Launcher(tmp_path, 2, "trap 'exit 130' INT\n" + FOR_EVER)
    launcher.wait_for("0-0", "0-1")
    time.sleep(0.2)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == 130


def test_sigterm_between_two_rounds(tmp_path):
    launcher = Launcher(tmp_path, 2, "exit 75\n", RESTART_DELAY="20")
    deadline = time.monotonic() + 10
    while "starting again" not in launcher.said():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 75
    assert len(launcher.started()) == 2


def test_what_a_process_leaves_behind_is_killed(tmp_path):
    launcher = Launcher(tmp_path, 2, 'sleep 60 &\necho $! >"$STUB_FOLDER/started-child-$number"\nexit 0\n')
    assert launcher.end() == 0
    assert {"child-0", "child-1"} <= set(launcher.started())


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv")
def test_when_the_launcher_itself_is_killed_nothing_stays(tmp_path):
    launcher = Launcher(tmp_path, 2, FOR_EVER, END_ON_TERM="75")
    launcher.wait_for("0-0", "0-1")
    launcher.process.kill()
    assert launcher.end() == -signal.SIGKILL
    assert launcher.signals() == ["0 TERM", "1 TERM"]


@pytest.mark.parametrize("arguments", [[], ["0", "run"], ["two", "run"], ["2"], ["--wet-run", "2", "run"]])
def test_a_wrong_command_line_is_a_sentence(arguments):
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("local.sh: ") and done.stderr.count("\n") == 1
