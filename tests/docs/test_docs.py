"""The README and the pages under docs/: every code block runs here, or states why it does not.

A fenced block is marked as not runnable by a comment right above it::

    <!-- not run here: needs a cluster -->

``ray-dmml`` commands of marked blocks are still parsed.
"""

from __future__ import annotations

import functools
import json
import re
import runpy
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from conftest import tiny
from PIL import Image
from pydantic import BaseModel
from test_structure import FLOORS
from typer.testing import CliRunner

import ray_dmml
from ray_dmml import Config
from ray_dmml.cli.main import app
from ray_dmml.config.code import use_code
from ray_dmml.tune.search_space import Search, load_search

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASON = re.compile(r"<!-- not run here: (\S.*) -->")
TEST_COMMAND = "<!-- test command -->"


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: Path
    line: int
    """Number of the opening fence's line."""

    language: str
    text: str
    comment: str
    """The comment on the line above; empty: there is none."""

    @property
    def is_marked(self) -> bool:
        return self.comment == TEST_COMMAND or REASON.fullmatch(self.comment) is not None

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.line}-{self.language}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r"( *)```(\w*)", lines[number])
        if fence is None:
            number += 1
            continue
        end = lines.index(f"{fence[1]}```", number + 1)
        above = lines[number - 1].strip()
        comment = above if above.startswith("<!--") else ""
        text = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
        yield Block(page, number + 1, fence[2], text, comment)
        number = end + 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNABLE = [block for block in BLOCKS if not block.is_marked]


@pytest.fixture(scope="module")
def finished_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages assume: photos, a config, a search, a finished run."""
    folder = tmp_path_factory.mktemp("docs")
    raw = tiny(image_folder)
    raw["cohort"]["peers"] = [{"ema": {"decay": 0.9}}, {"view": "strong", "update_interval": 2}]
    raw["train"]["report"] = True
    (folder / "photos.yaml").write_text(yaml.safe_dump(raw))
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), "teal").save(folder / name)
    shutil.copytree(image_folder, folder / "new-photos")
    ray_dmml.train(Config.load(folder / "photos.yaml"), folder / "runs/photos", local=True)
    return folder


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory; training starts no Ray."""
    copy = tmp_path / "here"
    shutil.copytree(finished_run, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(ray_dmml, "train", functools.partial(ray_dmml.train, local=True))
    return copy


# --- code blocks ----------------------------------------------------------------------------


def test_there_are_blocks_of_every_kind() -> None:
    """The parser of the pages has not lost any."""
    assert {"python", "yaml", "bash", "text"} <= {block.language for block in RUNNABLE}
    assert len(OURS) > 10  # commands of ours
    assert sum(len(spans_of(page)) for page in PAGES) > 200  # names in code, whose settings and files are checked
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert 2 * len(BLOCKS) == fences


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_block(block: Block, folder: Path) -> None:
    """The code of an unmarked block works."""
    match block.language:
        case "python":
            run_python(block, folder)
        case "yaml":
            parse_yaml(block, folder)
        case "bash":
            run_bash(block)
        case "text" if block.text.startswith("ray_dmml/"):
            assert_tree_exists(block.text, ROOT)
        case "text" if block.text.startswith("runs/photos/"):
            assert_tree_exists(block.text, folder)
        case _:
            pytest.fail(f"{block}: mark it with <!-- not run here: REASON -->")


def test_the_own_parts_of_the_page(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/how-to/own-parts.md: its Python blocks as one file, and its settings together in one run."""
    monkeypatch.chdir(tmp_path)
    blocks = list(blocks_of(ROOT / "docs/how-to/own-parts.md"))
    (tmp_path / "parts.py").write_text("\n\n".join(block.text for block in blocks if block.language == "python"))
    (tmp_path / "flat").mkdir()
    for image in image_folder.glob("*/*.png"):
        shutil.copy(image, tmp_path / "flat" / f"{image.parent.name}-{image.name}")
    raw = tiny(image_folder)
    peers: list[dict[str, Any]] = [{}, {}]
    for block in blocks:
        if block.language == "yaml" and "parts:" in block.text:
            settings = yaml.safe_load(block.text)
            raw["code"] = settings.pop("code")
            for peer, more in zip(peers, settings.pop("cohort", {}).get("peers", []), strict=False):
                peer |= more
            for section, entries in settings.items():
                raw[section] = {**raw.get(section, {}), **entries}
    raw["loss"]["mutual"][0]["warmup_steps"] = 0  # the page has more steps
    peers[1]["backbone"] = "test_resnet"
    raw["cohort"]["peers"] = peers
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(raw))
    results = ray_dmml.train(Config.load(tmp_path / "all.yaml"), tmp_path / "run", local=True)
    assert results["num_classes"] == 5
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert list(first["peers"]["peer0"]) == ["loss", "metric", "distance", "similarities", "squared"]
    assert float((tmp_path / "run/best_recall.txt").read_text()) > 0
    output = CliRunner().invoke(app, ["config", "--config", "all.yaml"]).output
    assert "parts:Blocks" in output and "parts:BestRecall" in output
    use_code({})


def run_python(block: Block, folder: Path) -> None:
    if "train(" in block.text:  # into a folder that must not exist yet
        shutil.rmtree(folder / "runs")
    # Line numbers of a traceback are those of the page.
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    exec(code, {"__name__": "__main__"})


def parse_yaml(block: Block, folder: Path) -> None:
    file = folder / "block.yaml"
    file.write_text(block.text)
    if "space" in yaml.safe_load(block.text):
        Search(yaml.safe_load((folder / "photos.yaml").read_text()), load_search(file))
    else:
        assert Config.load(file) != Config()


def run_bash(block: Block) -> None:
    """Runs what takes no time; all commands must be ours."""
    commands = list(commands_of(block.text))
    assert commands
    for tokens in commands:
        assert tokens[0] == "ray-dmml", f"{block}: {shlex.join(tokens)} is not run: mark the block"
        parse_command(tokens[1:])
        if tokens[1] in ("config", "evaluate") or tokens[1:3] == ["data", "check"]:
            result = CliRunner().invoke(app, tokens[1:])
            findings = tokens[1] == "data"  # exit code 1: the data set has faults
            assert result.exit_code in ((0, 1) if findings else (0,)), result.output
            if "--json" in tokens:
                assert json.loads(result.stdout)


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a shell script, without comments and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        tokens = iter([*lexer, ";"])
        for token in tokens:
            if set(token) <= set("<>"):
                next(tokens)  # the file
            elif not set(token) <= set("();|&"):
                command.append(token)
            elif command:
                yield command
                command = []


def ours_in(tokens: list[str]) -> Iterator[list[str]]:
    """The arguments of every ``ray-dmml`` in a command, also inside of a quoted one."""
    for place, token in enumerate(tokens):
        if token.rpartition("/")[2] == "ray-dmml" and tokens[place - 1 : place] in ([], ["--"]):
            yield tokens[place + 1 :]
        elif "ray-dmml " in token:
            yield from ours_in(shlex.split(token))


def parse_command(arguments: list[str]) -> None:
    """Fails where the command line does not know a command or an option."""
    command: Any = typer.main.get_command(app)
    name, parent = "ray-dmml", None
    while True:
        context = command.make_context(name, list(arguments), parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        name, command, arguments = command.resolve_command(context, rest)
        parent = context


OURS = [
    pytest.param(arguments, id=f"{block}-{shlex.join(arguments)[:40]}")
    for block in BLOCKS
    if block.language == "bash"
    for tokens in commands_of(block.text)
    for arguments in ours_in(tokens)
]


@pytest.mark.parametrize("arguments", OURS)
def test_command_parses(arguments: list[str]) -> None:
    """Each command and option exists, also in blocks that are not run."""
    parse_command(arguments)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=str)
def test_scripts_and_extras_exist(block: Block) -> None:
    """Scripts that a block runs are there, and so are the extras that it installs."""
    for script in re.findall(r"python (experiments/\S+\.py)", block.text):
        assert (ROOT / script).is_file(), script
    extras = re.findall(r"'(?:\.|ray-dmml|\S+\.whl)\[([\w,-]+)\]'", block.text)
    if extras:
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        known = project["optional-dependencies"]
        assert {extra for names in extras for extra in names.split(",")} <= known.keys()


def test_the_test_command_is_where_ci_looks_for_it() -> None:
    """.ci/run takes the line with `-m pytest` after the marker."""
    (block,) = [block for block in BLOCKS if block.comment == TEST_COMMAND]
    assert block.page.name == "README.md"
    assert sum("-m pytest" in line for line in block.text.splitlines()) == 1


def assert_tree_exists(text: str, root: Path) -> None:
    """Every file and folder of a drawn tree exists."""
    parents: list[str] = []
    for line in text.splitlines():
        drawn = re.match(r"[│├└─ ]*", line)
        assert drawn is not None
        depth, name = len(drawn[0]) // 4, line[len(drawn[0]) :].split()[0]
        parents = [*parents[:depth], name]
        path = root / "".join(part if part.endswith("/") else f"{part}/" for part in parents)
        assert path.is_dir() if name.endswith("/") else path.is_file(), path


# --- what the pages name --------------------------------------------------------------------


def spans_of(page: Path) -> list[str]:
    """The inline code of a page."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", text)


SECTIONS = tuple(Config.model_fields)


def inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inside in get_args(annotation) for model in inner_models(inside)]


def is_setting(key: str) -> bool:
    """Whether a dotted key, with ``*``, ``N`` or a number for a peer, is one of the config's."""
    model: type[BaseModel] | None = Config
    for part in key.replace("cohort.base", "cohort.peers").split("."):
        if part in ("*", "N") or part.isdigit():
            continue
        if model is None or part not in model.model_fields:
            return False
        model = next(iter(inner_models(model.model_fields[part].annotation)), None)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_exist(page: Path) -> None:
    """Every setting that a page names in code is one of the config's."""
    keys = [
        match[0]
        for span in spans_of(page)
        if (match := re.match(rf"({'|'.join(SECTIONS)})(\.(\w+|\*))+", span)) and not match[0].endswith((".py", ".md"))
    ]
    assert [key for key in keys if not is_setting(key)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_exist(page: Path) -> None:
    """Every source file or test that a page names in code is there."""
    names = [
        span
        for span in spans_of(page)
        if re.fullmatch(r"[\w./-]+(/|\.py|\.yaml)", span)
        and re.match(r"(ray_dmml|tests|experiments|deploy|docs)/", span)
    ]
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_rooms_exist() -> None:
    """docs/architecture.md names modules by their path in the package."""
    spans = spans_of(ROOT / "docs/architecture.md")
    others = ("tests/", "experiments/")
    names = {span for span in spans if re.fullmatch(r"[a-z_]+/([a-z_/]+\.py)?", span)}
    names = {name for name in names if not name.startswith(others)}
    assert len(names) > 20
    assert sorted(name for name in names if not (ROOT / "ray_dmml" / name).exists()) == []


def test_the_floors_are_those_of_the_code() -> None:
    """docs/architecture.md lists the floors that tests/test_structure.py asserts."""
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(len(FLOORS), 0, -1))
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in reversed(rows)] == list(FLOORS)


def slug(heading: str) -> str:
    """A heading's anchor on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Links to files and headings of this repository; others are not followed."""
    text = page.read_text()
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src(?:set)?="([^"]+)"', text)]
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target == ROOT / "docs/settings.md":  # it is made with the site, whose links test_site.py follows
            continue
        assert target.exists(), link
        if anchor and anchor not in ("only-light", "only-dark"):  # a picture for one colour scheme of the site
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), link


def test_the_picture_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs/pictures/step.py"))
    for scheme, colors in script["COLORS"].items():
        drawn = (ROOT / f"docs/pictures/step-{scheme}.svg").read_text()
        assert drawn == script["picture"](colors)
