"""The report in headless Chromium: wide, narrow, dark, on paper, by keyboard, without JavaScript.

It needs the extra `page-test` and a Chromium of the system, such as that of `apt install chromium`:

    pytest -m slow tests/report/test_chromium.py
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the extra `page-test` is not installed")

from playwright import sync_api
from report_samples import make_run

from ray_dmml import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.ray,  # Chromium is a process
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium in PATH"),
]

IMAGES_ARE_THERE = """() => [...document.images].every((image) => image.complete && image.naturalWidth > 0)"""
BROKEN_WORDS = """() => {
  const words = document.querySelectorAll("dd .word"), range = document.createRange(), broken = [];
  for (const part of [...words].flatMap((word) => [...word.childNodes])) {
    range.selectNodeContents(part);
    if (range.getClientRects().length > 1 && !part.textContent.includes("-")) broken.push(part.textContent);
  }
  return broken;
}"""
"""Of what was run: those that do not end where a line may end."""
VISIBLE_CARDS = """() => [...document.querySelectorAll('.card')].filter((card) => card.offsetParent).length"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run, of a run that has no results yet, and of two runs."""
    folder = tmp_path_factory.mktemp("reported")
    run = make_run(folder, folder / "photos", train={"steps": 30, "evaluate_every": 5, "tensorboard": False})
    unfinished = Path(shutil.copytree(run, folder / "unfinished"))
    (unfinished / "results.json").unlink()
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12345, "peers": {"peer0": {"loss": 0.5}}}\n')
    two = write_report([run, Path(shutil.copytree(run, folder / "second"))], folder / "two.html")
    return {"one": run / "report.html", "unfinished": write_report(unfinished), "two": two}


@contextmanager
def page_of(report: Path, width: int = 1280, height: int = 900, **settings: Any) -> Iterator[Any]:
    """The page, which reports no error and asks for nothing."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, **settings)
        page.set_default_timeout(30_000)
        errors: list[str] = []
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        own = report.as_uri()
        page.on("request", lambda r: None if r.url.startswith((own, "data:")) else errors.append(r.url))
        page.goto(own)
        yield page
        browser.close()
        assert not errors, errors


def take(page: Any, name: str) -> None:
    """A screenshot, where a person wants to look at it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["one", "unfinished", "two"])
def test_it_is_whole_at_every_width(reports: dict[str, Path], kind: str, scheme: str, width: int) -> None:
    """All pictures are there, nothing is wider than the screen, and every picture has words."""
    with page_of(reports[kind], width, color_scheme=scheme) as page:
        assert page.evaluate(IMAGES_ARE_THERE)
        assert page.evaluate("document.images.length") > (100 if kind != "unfinished" else -1)
        for narrower in (width - 80, width):
            page.set_viewport_size({"width": narrower, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= narrower
            assert page.evaluate("document.querySelector('nav').scrollWidth") <= narrower
            assert page.evaluate(BROKEN_WORDS) == []
        assert page.evaluate("[...document.images].every((image) => image.alt)")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        take(page, f"{kind}-{scheme}-{width}")


def test_the_filter(reports: dict[str, Path]) -> None:
    """Queries that peers disagree on, and those of a class; a link shows its group again."""
    with page_of(reports["one"]) as page:
        total = page.evaluate(VISIBLE_CARDS)
        groups = page.locator("#filter-group option").all_text_contents()
        assert "peer0 finds, peer1 does not" in groups
        page.locator("#filter-group").select_option("peer0 finds, peer1 does not")
        some = page.evaluate(VISIBLE_CARDS)
        assert 0 < some < total
        assert page.locator("#filter-count").text_content() == f"{some} of {total} queries"
        for card in page.locator(".card:visible").all():
            rows = card.locator(".row")
            assert rows.nth(0).locator(".tile").first.get_attribute("class") == "tile right"
            assert rows.nth(1).locator(".tile").first.get_attribute("class") == "tile wrong"
        take(page, "filtered")
        page.locator("nav").get_by_text("Peers disagree").click()
        page.locator("#filter-group").select_option("")
        page.locator("#filter-text").fill("CLASS 9")
        names = page.locator(".card:visible > .tile figcaption span").all_text_contents()
        assert set(names) <= {"class 9"}
        page.locator("#filter-text").fill("no such class")
        assert page.evaluate(VISIBLE_CARDS) == 0
        page.locator(".findings a[href='#only-0']").click()
        page.locator("#only-0").wait_for()


def test_hovering_shows_values_and_pictures(reports: dict[str, Path]) -> None:
    """By pointer and by keyboard."""
    with page_of(reports["one"]) as page:
        chart = page.locator("svg[data-chart]").first
        chart.scroll_into_view_if_needed()
        chart.hover()
        page.locator("#tip").get_by_text("step").wait_for()
        assert "ensemble" in (page.locator("#tip").text_content() or "")
        take(page, "hover-chart")
        chart.focus()
        page.keyboard.press("ArrowRight")
        page.locator("#tip").get_by_text("step").wait_for()
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()

        plot = page.locator("#map-plot")
        plot.scroll_into_view_if_needed()
        plot.focus()
        page.keyboard.press("ArrowRight")
        assert (
            page.locator("#tip .shot")
            .evaluate("(shot) => getComputedStyle(shot).backgroundImage")
            .startswith('url("data:')
        )
        x, y = page.evaluate(
            "() => {const s = document.querySelector('#map-plot'), b = s.getBoundingClientRect();"
            "const v = s.viewBox.baseVal;"
            "const m = JSON.parse(document.querySelector('#data').textContent).map;"
            "return [b.left + m.x[3] / v.width * b.width, b.top + m.y[3] / v.height * b.height]}"
        )
        page.mouse.move(x, y)
        page.locator("#tip .shot").wait_for()
        take(page, "hover-map")
        page.locator("#map-class").select_option(index=2)
        assert page.locator("#map-chosen").get_attribute("d")
        assert not page.locator(".placed image").first.is_visible()
        page.locator("#map-pictures").check()
        assert page.locator(".placed image").first.is_visible()


def test_hovering_shows_the_whole_step(reports: dict[str, Path]) -> None:
    with page_of(reports["unfinished"]) as page:
        page.locator("#loss-loss svg[data-chart]").focus()
        page.keyboard.press("ArrowLeft")  # the last step
        page.locator("#tip").get_by_text("step 12,345", exact=True).wait_for()


def test_by_keyboard(reports: dict[str, Path]) -> None:
    """Links, controls, charts and tables are reached by Tab, and what has the focus is seen."""
    with page_of(reports["one"]) as page:
        reached = []
        for _ in range(80):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or reached[-1] == "BODY"
        assert {"A", "SUMMARY", "filter-group", "filter-text", "map-pictures", "map-plot"} <= set(reached)


def test_without_javascript(reports: dict[str, Path]) -> None:
    """Everything can be read; only the controls that need it are not there."""
    with page_of(reports["one"], java_script_enabled=False) as page:
        assert page.get_by_text("peer0 finds, peer1 does not").first.is_visible()
        for summary in page.locator("details.more > summary").all():
            summary.click()
        assert page.locator(".card").count() == page.locator(".card:visible").count() > 0
        assert page.locator("svg.plot path.line:visible").count() > 0
        assert page.locator("#filter").is_hidden() and page.locator("#map-choice").is_hidden()
        page.locator("#map-pictures").check()
        assert page.locator("#map-plot image").first.is_visible()


def test_on_paper(reports: dict[str, Path], tmp_path: Path) -> None:
    """Dark on white, whatever the screen is, and without controls."""
    with page_of(reports["one"], color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert page.locator("#filter").is_hidden() and page.locator("nav").is_hidden()
        file = Path(os.environ.get("SCREENSHOTS", tmp_path)) / "printed.pdf"
        page.pdf(path=str(file), format="A4")
        assert file.stat().st_size > 50_000
