"""The page of a run: what is on it, that it is whole and harmless, and what happens where something is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_samples import HOSTILE, Page, make_run, read_page
from typer.testing import CliRunner

from ray_dmml import write_report
from ray_dmml.cli.main import app


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    return make_run(folder, folder / "photos")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    """The page that the training has written."""
    return read_page(run / "report.html")


def cli(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def complaint(*arguments: str | Path) -> str:
    """The error of the command: one line on standard error, with exit code 2."""
    ended = cli(*arguments)
    assert ended.exit_code == 2, ended.output
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line


# --- the page -------------------------------------------------------------------------------


def test_every_section_is_there_and_linked(page: Page) -> None:
    sections = {"results", "run", "validation", "losses", "gallery", "classes", "map", "agreement", "seconds"}
    assert sections <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert {f"#{section}" for section in sections} <= set(page.links)


def test_the_page_loads_nothing(run: Path, page: Page) -> None:
    """All it has is in the file, and its policy allows no more than its own style and script."""
    for key, value in page.attributes:
        if key in ("src", "href", "srcset", "action", "data"):
            assert value.startswith(("#", "data:")), (key, value)
    policy = next(value for key, value in page.attributes if value.startswith("default-src 'none'"))
    text = (run / "report.html").read_text()
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not any(key.startswith("on") or key == "style" for key, _ in page.attributes)
    assert "url(" not in text.partition("</style>")[0] and "@import" not in text


def test_names_are_text(page: Page) -> None:
    """Names of classes and files become no markup, run nothing and are shown whole."""
    assert page.tags["script"] == 3
    assert " ".join(HOSTILE.split()) in page.text
    assert all(picture["src"].startswith("data:image/") for picture in page.pictures)
    data = json.loads(page.content["script"][0])
    assert HOSTILE in data["map"]["classes"]
    assert any("<b>'0'.png" in name for name in data["map"]["names"])


def test_results_are_those_of_the_run(run: Path, page: Page) -> None:
    """Every figure of the table, with its interval; and the summary names the ensemble's Recall@1."""
    results = json.loads((run / "results.json").read_text())
    for figures in (*results["peers"].values(), results["ensemble"], results["untrained_ensemble"]):
        assert f"{100 * figures['recall@1']:.1f}" in page.texts
    low, high = results["intervals"]["ensemble"]["recall@1"]
    assert f"{100 * low:.1f} – {100 * high:.1f}" in page.texts
    verification = results["verification"]["ensemble"]
    assert "verification" in page.ids and f"{verification['threshold@0.001']:.3f}" in page.texts
    assert f"{verification['num_positive_pairs']:,} pairs of one class" in page.text
    assert f"The ensemble has a Recall@1 of {100 * results['ensemble']['recall@1']:.1f} %" in page.text


def test_the_best_step_is_named(run: Path, page: Page) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"]: row["validation"]["ensemble"]["recall@1"] for row in rows if "validation" in row}
    best = max(values, key=lambda step: values[step])  # the first of equals
    assert f"best at step {best}: {100 * values[best]:.1f} %" in page.text
    assert f"best: step {best}" in page.texts


def test_pictures_say_what_they_are(page: Page) -> None:
    """Alternative texts say whether an image is right or wrong."""
    kinds = {picture["alt"].partition(":")[0] for picture in page.pictures}
    assert kinds == {"query", "right", "wrong"}
    assert all(int(picture["width"]) <= 144 and int(picture["height"]) <= 144 for picture in page.pictures)
    assert any(picture["width"] != picture["height"] for picture in page.pictures)  # in their own proportions


def test_how_it_was_made_is_said(run: Path, page: Page) -> None:
    assert f"ray-dmml train --config {run}/config.yaml" in page.text
    environment = json.loads((run / "run.json").read_text())
    assert f"torch {environment['versions']['torch']}" in page.text
    assert "images and view" in page.texts and "validation" in page.texts  # of the table of seconds


# --- the command ----------------------------------------------------------------------------


def test_again(copy: Path, page: Page) -> None:
    """The command makes the same page as the training, whose place is another one now."""
    (copy / "report.html").unlink()
    ended = cli(copy)
    assert ended.exit_code == 0, ended.output
    assert ended.stdout == f"report: {copy}/report.html\n"
    again = read_page(copy / "report.html")
    assert [picture["alt"] for picture in again.pictures] == [picture["alt"] for picture in page.pictures]
    cli(copy)  # replaces its own


def test_a_run_that_goes_on(copy: Path, tmp_path: Path) -> None:
    """Settings and curves, without results; the last line of its metrics is half written."""
    (copy / "results.json").unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "peers": {"peer0": {"lo')
    assert write_report(copy, tmp_path / "live.html") == tmp_path / "live.html"
    live = read_page(tmp_path / "live.html")
    assert "The run has not ended: it has made 4 steps of 4." in live.texts
    assert {"validation", "losses", "run"} <= set(live.ids) and not {"results", "gallery"} & set(live.ids)
    assert "cannot be read" not in live.text
    (copy / "metrics.jsonl").unlink()  # it has only just begun
    write_report(copy, tmp_path / "live.html")
    assert "losses" not in read_page(tmp_path / "live.html").ids


def test_images_that_are_gone(copy: Path, run: Path, tmp_path: Path) -> None:
    """The page has no pictures and says so, and so does a warning; with their new place it has pictures."""
    images = run.parent / "images"
    moved = images.rename(tmp_path / "moved")
    try:
        ended = cli(copy)
        assert ended.exit_code == 0
        assert "has no pictures" in ended.stderr
        gone = read_page(copy / "report.html")
        assert "There are no pictures" in gone.text and not gone.pictures and "results" in gone.ids
        assert cli(copy, "--set", f"data.root={moved}").exit_code == 0
        assert read_page(copy / "report.html").pictures
    finally:
        moved.rename(images)


def test_several_runs(run: Path, copy: Path, tmp_path: Path) -> None:
    """Side by side: all rows, all curves, the settings that differ, and what only one of them finds."""
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("\nseed: 0\n", "\nseed: 5\n").replace("seed: 0\n", "seed: 5\n", 1))
    assert "need" in complaint(run, copy)
    out = tmp_path / "both.html"
    write_report([run, copy], out)
    both = read_page(out)
    for name in ("photos", "copy"):
        assert both.texts.count(f"{name}: peer0") > both.texts.count(f"{name}: ensemble") >= 2  # also in Verification
    place = both.texts.index("Settings that differ")
    assert both.texts[place + 1 : place + 7] == ["setting", "photos", "copy", "seed", "0", "5"]
    assert {"gallery", "map", "agreement"} <= set(both.ids)


def damage_checkpoint(run: Path) -> None:
    for file in run.glob("checkpoints/*/*/weights.safetensors"):
        file.write_bytes(file.read_bytes()[:-10] + b"0123456789")


def test_a_run_without_test_classes(copy: Path) -> None:
    """The page says why it has no results, and has all that the run has warned of."""
    results = json.loads((copy / "results.json").read_text())
    warnings, notes = (
        ["peer0 has <b>one</b> direction", f"look at {'long/' * 50}"],
        ["validation is coarse", "it is late"],
    )
    results |= {"split": None, "stopped_early": 4, "warnings": warnings, "notes": notes}
    (copy / "results.json").write_text(json.dumps(results))
    page = read_page(write_report(copy))
    assert {"Not evaluated: all classes were trained on.", *(f"{text}." for text in warnings + notes)} <= set(
        page.texts
    )
    assert not {"results", "gallery"} & set(page.ids)
    assert " epochs, stopped early)" in page.text


@pytest.mark.parametrize("kind", ["no run", "other file", "no folder", "damaged checkpoint", "damaged results"])
def test_bad_input(copy: Path, tmp_path: Path, kind: str) -> None:
    """One sentence, exit code 2, and nothing is lost."""
    before = (copy / "report.html").read_bytes()
    mine = tmp_path / "mine.html"
    mine.write_text("<p>not a report</p>")
    if kind == "no run":
        assert "is not the folder of a run" in complaint(tmp_path / "nothing")
    elif kind == "other file":
        assert f"{mine} exists and is not a report of ray-dmml" in complaint(copy, "--out", mine)
    elif kind == "no folder":
        assert "cannot be written: No such file or directory" in complaint(copy, "--out", tmp_path / "no" / "r.html")
    elif kind == "damaged checkpoint":
        damage_checkpoint(copy)
        assert "damaged" in complaint(copy)
    else:
        (copy / "results.json").write_text("{")
        assert "results.json cannot be read" in complaint(copy)
    assert (copy / "report.html").read_bytes() == before
    assert mine.read_text() == "<p>not a report</p>"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_report_that_cannot_be_written_costs_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run ends with a warning and its results."""

    def fails(*arguments: Any, **named: Any) -> None:
        raise ZeroDivisionError("a fault of the page")

    monkeypatch.setattr("ray_dmml.training.report.build_report", fails)
    out = make_run(tmp_path, tmp_path / "run", train={"steps": 1, "evaluate_every": 0})
    assert (out / "results.json").exists() and not (out / "report.html").exists()
    assert "the report cannot be written: a fault of the page" in caplog.text
