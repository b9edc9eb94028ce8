"""What several test files share. `tests` is on the path (pyproject.toml): `from helpers import tiny`."""

from pathlib import Path

HELPERS = Path(__file__).parent  # some helpers are scripts that run in a process of their own
ROOT = HELPERS.parents[1]  # the repository
MICRO = str(ROOT / "configs" / "micro.py")  # the smallest whole run
# Settings of a run that trains adapters alone, and of the student nothing but CTPD.
ADAPTED = [
    *(f"--config.{stage}.lora.rank=4" for stage in ("teacher_sft", "positive", "negative", "train")),
    *(f"--config.{stage}.steps=-1" for stage in ("student_sft", "student_dpo")),
]
