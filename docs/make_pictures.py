"""Draws docs/pictures: a pair in the terminal and as a page, and the page of a run.

ctpd run --config configs/demo.py --workdir runs/demo
python docs/make_pictures.py runs/demo      # needs chromium for the pages
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ctpd_jax.report.format import full_colour
from ctpd_jax.report.page import pair_page, write_report
from ctpd_jax.report.terminal import WIDTH, pair_text

PICTURES = Path(__file__).with_name("pictures")
CHROMIUM = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"


def terminal(text: str, path: Path) -> None:
    """Draws what a terminal shows as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(text))
    path.write_text(console.export_svg(title="ctpd inspect --pair 0"), encoding="utf-8")


def page(browser: str, html: Path, path: Path, width: int, height: int) -> None:
    """Has the browser draw a page."""
    with tempfile.TemporaryDirectory() as profile:
        line = [browser, *CHROMIUM.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        shot = [f"--screenshot={path}", html.absolute().as_uri()]
        subprocess.run([*line, *shot], check=True, capture_output=True, timeout=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="of a finished run")
    workdir = parser.parse_args().workdir
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("There is no chromium; pages cannot be drawn.", file=sys.stderr)
        return 2
    PICTURES.mkdir(exist_ok=True)
    pair = json.loads((workdir / "evaluation.json").read_text("utf-8"))["example"]
    pair["source"] = pair["source"].rpartition("/")[2]  # not where it lay on this machine
    full = full_colour(json.loads((workdir / "config.json").read_text("utf-8")))
    terminal(pair_text(pair, full, colour=True), PICTURES / "inspect.svg")
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder, "pair.html")
        html.write_bytes(pair_page(pair, full))
        page(browser, html, PICTURES / "inspect.png", 900, 1000)
    page(browser, write_report(workdir), PICTURES / "report.png", 1000, 1400)
    return 0


if __name__ == "__main__":
    sys.exit(main())
