"""Makes the pictures of the terminal, the report and the search page from a run of the quickstart.

    python docs/pictures/make.py [FOLDER]

It is run by hand, where the extras `serve` and `page-test` and a Chromium of the system are installed. It downloads
nothing. FOLDER, build/pictures by default, keeps the run and the index, which are made only if they are missing.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
from PIL import Image
from playwright import sync_api

from ray_dmml import Config
from ray_dmml.data.datasets import characters
from ray_dmml.loggers.console import LinesLogger
from ray_dmml.loggers.output import Console
from ray_dmml.loggers.results_tables import results_table

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLI = (sys.executable, "-m", "ray_dmml.cli")
MAX_BYTES = 250_000

NUM_CLASSES = 60
"""Test classes whose images are searched."""
QUERY_FACE = "STIXGeneralItalic"
"""The typeface of the query, which the index does not have."""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/pictures")
    run, images, embedded = folder / "characters", folder / "images", folder / "embedded"
    if not (run / "results.json").exists():
        subprocess.run([*CLI, "train", "--out", str(run)], check=True)
    if not images.exists():
        draw_characters(images, folder / "queries")
    if not (embedded / "index.json").exists():
        subprocess.run([*CLI, "embed", str(run), str(images), "--out", str(embedded), "--local"], check=True)
        subprocess.run([*CLI, "index", str(embedded)], check=True)
    draw_terminal(run)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        photograph_report(browser.new_page(viewport={"width": 1200, "height": 820}), run)
        with served(embedded) as address:
            queries = sorted((folder / "queries").iterdir())
            query = next(file for file in queries if chr(int(file.stem.removeprefix("U+"), 16)).isalpha())
            photograph_search(browser.new_page(viewport={"width": 1200, "height": 760}), address, query)
        browser.close()
    for file in sorted(HERE.iterdir()):
        if file.suffix in (".png", ".svg"):
            assert file.stat().st_size < MAX_BYTES, f"{file} has {file.stat().st_size:,} bytes"


def draw_characters(images: Path, queries: Path) -> None:
    """Writes test classes as files, a folder for each class. One typeface is kept as queries."""
    test = characters.load(192)[1]
    queries.mkdir(parents=True, exist_ok=True)
    for index, label in enumerate(test.labels.tolist()):
        if label >= NUM_CLASSES:
            break
        code, _, face = test.source.name(index).partition(" in ")
        target = queries / f"{code}.png" if face == QUERY_FACE else images / code / f"{face}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.source.read(index).permute(1, 2, 0).numpy()).save(target)


def draw_terminal(run: Path) -> None:
    """What stays on the terminal: the evaluations, as they were logged, and the table of results."""
    results = json.loads((run / "results.json").read_text())
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print("[bold]$[/bold] ray-dmml train", highlight=False)
    lines = LinesLogger(console, Config.load(run / "config.yaml"))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "validation" in row:
            lines.log({"validation": row["validation"]}, row["step"])
    results_table(results, console)
    drawing = console.export_svg(title="ray-dmml train", code_format=without_fonts(rich.console.CONSOLE_SVG_FORMAT))
    (HERE / "terminal.svg").write_text(drawing)


def without_fonts(code_format: str) -> str:
    """Rich's drawing loads its font from another host; any monospaced font will do."""
    return re.sub(r"@font-face \{\{.*?\}\}", "", code_format, flags=re.S)


def photograph_report(page: Any, run: Path) -> None:
    page.goto((run / "report.html").resolve().as_uri())
    save(page.screenshot(), "report.png")
    page.evaluate("document.getElementById('disagree').scrollIntoView()")
    page.wait_for_function("() => [...document.images].every((image) => image.complete)")
    save(page.screenshot(), "report-queries.png")


def photograph_search(page: Any, address: str, query: Path) -> None:
    """A query is dropped, which the index does not have."""
    page.goto(address)
    page.locator("#results .hit").first.wait_for()
    page.set_input_files("#file", str(query))
    page.locator("#query-name").get_by_text(query.name).wait_for()
    page.locator("#results:not(.waiting) .hit").first.wait_for()
    page.wait_for_function("() => [...document.images].every((image) => image.complete)")
    save(page.screenshot(), "search.png")


@contextmanager
def served(embedded: Path) -> Iterator[str]:
    """The address of the search page."""
    command = [*CLI, "serve", str(embedded), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = next((found[0] for line in server.stdout if (found := re.search(r"http://\S+/", line))), None)
        try:
            assert address is not None, "the service has not started"
            yield address
        finally:
            server.terminate()


def save(png: bytes, name: str) -> None:
    """As a palette of 256 colours, which nobody sees, and which has a third of the bytes."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(HERE / name, optimize=True)


if __name__ == "__main__":
    main()
