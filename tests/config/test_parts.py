"""Own parts by name: found, or one sentence that names the setting, the name, and where it was looked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ray_dmml.config.code import read_code, use_code
from ray_dmml.config.parts import find_part, load_parts, load_trusted_parts, make_part, own_names
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_code_is_left() -> Iterator[None]:
    yield
    use_code({})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def use(*paths: Path) -> None:
    use_code(read_code(paths))


# --- the files of `code` --------------------------------------------------------------------


def test_files_and_packages_are_importable(write: Write) -> None:
    """A file, a package, and a folder without __init__.py; imports inside of them; nothing beside them."""
    write("neighbour.py")
    single = write("single_part.py", "from package_part.inner import VALUE\ndef value(): return VALUE\n")
    write("package_part/__init__.py", "from .inner import VALUE\n")
    write("package_part/inner/__init__.py", "from ..other import VALUE\n")
    write("package_part/other.py", "VALUE = 7\n")
    write("plain_part/deep/module.py", "def value(): return 8\n")
    folder = single.parent
    use(single, folder / "package_part", folder / "plain_part")
    assert find_part("x", "single_part:value")() == 7
    assert find_part("x", "plain_part.deep.module:value")() == 8
    with pytest.raises(UserError, match="there is no module neighbour"):
        find_part("x", "neighbour:value")


def test_what_was_read_counts(write: Write) -> None:
    """The content at the time of reading is imported, however the file changes, and a new reading replaces it."""
    file = write("changing_part.py", "def value(): return 1\n")
    use(file)
    write("changing_part.py", "def value(): return 2\n")
    assert find_part("x", "changing_part:value")() == 1
    use(file)
    assert find_part("x", "changing_part:value")() == 2
    use()
    with pytest.raises(UserError, match="there is no module changing_part"):
        find_part("x", "changing_part:value")


def test_a_traceback_shows_the_lines(write: Write) -> None:
    """Errors in own code name its file, and can show its source."""
    import inspect

    file = write("shown_part.py", "\n\ndef value():\n    return 1\n")
    use(file)
    value = find_part("x", "shown_part:value")
    assert value.__code__.co_filename == str(file)
    assert inspect.getsource(value) == "def value():\n    return 1\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py", "missing.py is neither a Python file"),
        ("notes.txt", "notes.txt is neither a Python file"),
        ("empty", "empty is neither a Python file .* nor a folder with some"),
        ("my-part.py", "my-part is not a name that can be imported"),
        ("profile.py", "profile is a module of Python's own"),
        ("numpy.py", "this Python has another module numpy, .*numpy.*; rename yours"),
        ("timm", "this Python has another module timm"),
    ],
)
def test_files_that_cannot_be_used(write: Write, tmp_path: Path, name: str, message: str) -> None:
    """Nothing may take the place of a module that this Python has."""
    for file in ("notes.txt", "my-part.py", "profile.py", "numpy.py", "timm/__init__.py"):
        write(file)
    (tmp_path / "empty").mkdir()
    before = dict(sys.modules)
    with pytest.raises(UserError, match=f"^code: .*{message}"):
        use(tmp_path / name)
    assert sys.modules["numpy"] is before["numpy"]


def test_two_entries_of_one_name(write: Write) -> None:
    with pytest.raises(UserError, match=r"code: .*another entry has the name part_twice"):
        use(write("part_twice.py"), write("part_twice/__init__.py").parent)


def test_a_module_that_is_also_on_the_path_may_be_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file on the Python path, imported or not, is no other module."""
    file = write("both_part.py", "def value(): return 1\n")
    monkeypatch.syspath_prepend(file.parent)
    use(file)
    assert find_part("x", "both_part:value")() == 1
    use()
    assert find_part("x", "both_part:value")() == 1
    use(file)
    del sys.modules["both_part"]


# --- names ----------------------------------------------------------------------------------


def test_a_class_is_built_and_a_function_is_the_part(write: Write) -> None:
    """With args: those of the constructor, or further ones of the function."""
    use(
        write(
            "kinds_part.py",
            "class Scaled:\n"
            "    def __init__(self, factor=1): self.factor = factor\n"
            "    class Inner: pass\n"
            "def scaled(x, factor=1): return factor * x\n",
        )
    )
    assert make_part("x", "kinds_part:Scaled", {"factor": 3}).factor == 3
    assert type(make_part("x", "kinds_part:Scaled.Inner", {})).__name__ == "Inner"
    assert make_part("x", "kinds_part:scaled", {"factor": 3})(2) == 6


@pytest.mark.parametrize(
    ("text", "name", "args", "message"),
    [
        (
            "",
            "no_such_part:A",
            {},
            r"there is no module no_such_part; name its file in the setting `code`, .*PYTHONPATH",
        ),
        ("", "bad_part.sub:A", {}, r"there is no module bad_part.sub"),
        ("class Loss: pass", "bad_part:Los", {}, r"module bad_part \(.*bad_part.py\) has no Los; did you mean Loss\?"),
        ("loss = 3", "bad_part:loss", {}, r"a class or a function is needed, and it is of type int"),
        (
            "\nimport no_such_module",
            "bad_part:A",
            {},
            r"import of bad_part fails at .*bad_part.py, line 2: Module.*'no_such",
        ),
        ("\n\n1 / 0", "bad_part:A", {}, r"import of bad_part fails at .*bad_part.py, line 3: ZeroDivisionError"),
        ("\ndef f(:", "bad_part:f", {}, r"import of bad_part fails at .*bad_part.py, line 2: SyntaxError"),
        ("raise SystemExit(3)", "bad_part:f", {}, r"import of bad_part fails at .*bad_part.py, line 1: SystemExit"),
        (
            "class A:\n  def __init__(self, x): 1 / x",
            "bad_part:A",
            {"x": 0},
            r"bad_part:A with {'x': 0} fails .*line 2",
        ),
        ("class A:\n  def __init__(self, x): pass", "bad_part:A", {"y": 0}, r"bad_part:A does not fit .*; it takes x"),
        (
            "class A:\n  def __init__(self, x): pass",
            "bad_part:A",
            {},
            r"bad_part:A does not fit .*missing.*; it takes x",
        ),
        ("def f(x): pass", "bad_part:f", {"y": 0}, r"bad_part:f does not fit its args: .*'y'; it takes x"),
    ],
)
def test_mistakes_are_one_sentence(write: Write, text: str, name: str, args: dict[str, Any], message: str) -> None:
    """It begins with the setting and the name."""
    use(write("bad_part.py", text))
    with pytest.raises(UserError, match=message) as error:
        make_part("loss.metric.name", name, args)
    assert str(error.value).startswith("loss.metric.name")
    assert "\n" not in str(error.value)


def test_entry_points_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without a colon may be an entry point in the group ray_dmml.parts."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "installed_part.py").write_text("def value(): return 5\n")
    about = tmp_path / "installed-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ray_dmml.parts]\nmy-value = installed_part:value\n")
    assert make_part("x", "my-value", {})() == 5
    config = Config.parse({"loss": {"mutual": [{"name": "my-value"}]}})
    assert config.loss.mutual[0].label == "my_value"


# --- in a config ----------------------------------------------------------------------------


def test_a_config_names_its_parts(write: Write, tmp_path: Path) -> None:
    """`code` is relative to the config's folder; every own name is found before anything else happens."""
    write("config_part.py", "class Loss: pass\nclass Term: pass\n")
    file = write("config.yaml", "code: [config_part.py]\nloss: {metric: {name: 'config_part:Loss'}}\n")
    config = Config.load(file, ["loss.mutual=[{name: config_part:Term}]"])
    assert config.code == (tmp_path / "config_part.py",)
    assert own_names(config) == [("loss.metric.name", "config_part:Loss"), ("loss.mutual.0.name", "config_part:Term")]
    assert list(load_parts(config)) == ["config_part.py"]
    with pytest.raises(UserError, match=r"^loss.mutual.0.name 'config_part:Terms': module config_part"):
        load_parts(Config.load(file, ["loss.mutual=[{name: config_part:Terms}]"]))
    with pytest.raises(UserError, match=r"^loss.mutual.0.name: .*Term .* unexpected .* 'scale'; it takes none"):
        load_parts(Config.load(file, ["loss.mutual=[{name: config_part:Term, args: {scale: 1}}]"]))
    with pytest.raises(UserError, match=r"^code: .*gone.py is neither"):
        load_parts(Config.load(file, ["code=[gone.py]"]))


@pytest.mark.parametrize("key", ["loss", "a\nb"])
def test_no_key_hides_a_part(key: str) -> None:
    """A key with a dot may be written as another setting, and one with a line break as no setting."""
    hiding = {key: {"name": "subprocess:Popen"}, "loss.name": "TripletMarginLoss"}
    args = {"loss": {"name": "ContrastiveLoss"}, **hiding}
    config = Config.parse({"loss": {"metric": {"name": "CrossBatchMemory", "args": args}}})
    assert [name for _, name in own_names(config)] == ["subprocess:Popen"]
    with pytest.raises(UserError, match=r"^run runs code that is not of this package: subprocess:Popen"):
        load_trusted_parts(config, Path("run"), False, "trust_code=True")


def test_code_of_a_run_is_importable_with_trust_only(write: Write) -> None:
    """Also if its config names no part: a library may import a module of this name, if there is one."""
    config = Config.parse({"code": [str(write("optional_module.py"))]})
    load_trusted_parts(config, Path("run"), False, "trust_code=True")
    assert find_spec("optional_module") is None
    load_trusted_parts(config, Path("run"), True, "trust_code=True")
    assert find_spec("optional_module") is not None


def test_unknown_names_of_own_parts() -> None:
    """Mutual terms and loggers are always own ones."""
    for raw in ({"loss": {"mutual": [{"name": "cosine"}]}}, {"train": {"loggers": [{"name": "neptune"}]}}):
        services = "name one of wandb, mlflow, trackio, " if "train" in raw else ""
        with pytest.raises(UserError, match=rf"\.0\.name '\w+': {services}write your own part as module:name, or"):
            load_parts(Config.parse(raw))


def test_code_is_refused_before_it_is_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path, a name that cannot be imported, and too many bytes."""
    with pytest.raises(UserError, match="the path is empty"):
        Config.parse({"code": [""]})
    folder = write("not-a-name/part.py").parent
    monkeypatch.setattr(Path, "rglob", None)
    with pytest.raises(UserError, match="not a name that can be imported"):
        read_code([folder])
    with (large := write("large_part.py")).open("wb") as file:
        file.truncate(9 * 2**20)
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(UserError, match=r"^code: more than 8 MiB of Python files, up to .*large_part.py"):
        read_code([large])


def test_labels_of_mutual_terms_differ() -> None:
    """They are keys of metrics.jsonl."""
    twice = {"mutual": [{"name": "a:Term"}, {"name": "b:Term"}]}
    with pytest.raises(UserError, match="mutual terms need other labels than Term"):
        Config.parse({"loss": twice})
    with pytest.raises(UserError, match="mutual terms need other labels than angle"):
        Config.parse({"loss": {"mutual": [{"name": "a:Term", "label": "angle"}]}})
    twice["mutual"][1]["label"] = "other"
    assert [term.label for term in Config.parse({"loss": twice}).loss.mutual] == ["Term", "other"]
