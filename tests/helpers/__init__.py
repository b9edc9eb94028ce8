"""What several test files share. `tests` is on the path (pyproject.toml): `from helpers import tiny`."""

from pathlib import Path

HELPERS = Path(__file__).parent  # some helpers are scripts that run in a process of their own
ROOT = HELPERS.parents[1]  # the repository
MICRO = str(ROOT / "configs" / "micro.py")  # the smallest whole run
