"""Bad configs: each case of docs/reliability.md has its outcome here, on real files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError


def config_refusal(folder: Path, content: str | bytes) -> str:
    """The message, which must be of a length that a person reads."""
    path = folder / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        Config.load(path)
    assert len(str(caught.value)) < 5000
    return str(caught.value)


def num_calls(function: Callable[[], object]) -> int:
    """How many functions are called, of Python and of C."""
    events: Counter[str] = Counter()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        function()
    finally:
        sys.setprofile(before)
    return events["call"] + events["c_call"]


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    """Tags of Python objects are refused."""
    mark = tmp_path / "mark"
    message = config_refusal(tmp_path, f'seed: !!python/object/apply:os.system ["touch {mark}"]')
    assert "could not determine a constructor" in message and not mark.exists()


@pytest.mark.parametrize("where", ["", "train:\n"])
def test_2_000_unknown_keys_are_refused(tmp_path: Path, where: str) -> None:
    """The first ones by name, the others by number."""
    text = where + "".join(f"{'  ' if where else ''}key{n}: 1\n" for n in range(2000))
    message = config_refusal(tmp_path, text)
    assert "key19: unknown setting" in message and "key20:" not in message
    assert message.endswith("... and 1980 more")


def test_unknown_keys_of_the_base_and_of_a_peer_are_refused(tmp_path: Path) -> None:
    """Each is looked for where it was written, which takes no longer in a long list than in a short one."""

    def refuse(number: int) -> None:
        base, peer = ("".join(f", {of}{n}: 1" for n in range(number)) for of in ("seed", "name"))
        message = config_refusal(tmp_path, f"cohort: {{base: {{view: weak{base}}}, peers: [{{view: weak{peer}}}]}}")
        assert "cohort.base.seed0: unknown setting" in message
        assert message.endswith(f"... and {2 * number - 20} more")

    short, long = num_calls(lambda: refuse(200)), num_calls(lambda: refuse(800))
    assert long < 4.5 * short


def test_the_whole_base_can_be_set_beside_peers(tmp_path: Path) -> None:
    """Only a setting that every peer states itself would do nothing."""
    path = tmp_path / "c.yaml"
    path.write_text("cohort: {base: {embedding_size: 8}, peers: [{}, {view: weak}]}")
    sizes = [peer.embedding_size for peer in Config.load(path, ["cohort.base={embedding_size: 16}"]).cohort.peers]
    assert sizes == [16, 16]


@pytest.mark.parametrize("raw", [[1], "x", 5])
def test_a_config_that_is_no_mapping_is_refused(raw: Any) -> None:
    """Where it comes from a program."""
    with pytest.raises(UserError, match=r"config: .*dictionary"):
        Config.parse(raw)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{a: " * 10_000, "a: " + "[" * 10_000 + "]" * 10_000, "- " * 10_000],
)
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    """Before Python's stack ends."""
    assert "more than 50 levels in each other" in config_refusal(tmp_path, text)


def test_a_deep_key_is_refused() -> None:
    """Of --set, too."""
    with pytest.raises(UserError, match="a key has at most 50 parts"):
        Config.load(None, [".".join("a" * 10_000) + "=1"])


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}"])
def test_a_bomb_of_aliases_is_refused(tmp_path: Path, link: str) -> None:
    """A few lines that stand for 9 ** 9 values; as lists, and as merged mappings."""
    text = "a0: &a0 {k: 1}\n"
    for level in range(1, 10):
        text += f"a{level}: &a{level} {link.format(', '.join([f'*a{level - 1}'] * 9))}\n"
    assert "aliases that stand for more than 1000000 values" in config_refusal(tmp_path, text)


def test_a_chain_of_aliases_is_refused(tmp_path: Path) -> None:
    """Deep nesting that no line shows."""
    text = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))
    assert "more than 50 levels in each other" in config_refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {<<: *a}", "&a {cohort: {base: *a}}"])
def test_an_alias_of_itself_is_refused(tmp_path: Path, text: str) -> None:
    """It has no end."""
    assert "an alias to what it is itself a part of" in config_refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!timestamp 2001-01-01", "could not determine a constructor"),
        ("seed: 2001-99-99", "unable to parse string as an integer (got '2001-99-99')"),
        ("seed: !!int x", "found what is no int"),
        ("seed: !!bool x", "found what is no bool"),
        ("seed: " + "9" * 5000, "found what is no int"),
        ("seed: 0x" + "f" * 5000, "a number of more than 4096 bits"),
        ('data: {root: "a\\0b"}', "found the character"),
        ('data: {root: "\\ud800"}', "found the character"),
        ("seed: 1\nseed: 2", "found the key 'seed' a second time"),
        ("loss: {metric: {args: {a: {1: 2}}}}", "found the key 1, which is no text: put it in quotes"),
        ("data: {root: ~nobody-of-this-name/x}", "a path in it cannot be resolved"),
        ("seed: " + "x" * 100_000, "(100002 characters)"),
    ],
)
def test_yaml_that_means_nothing_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """One sentence each."""
    assert message in config_refusal(tmp_path, text)


def test_a_config_without_end_is_refused(tmp_path: Path) -> None:
    """Only so much is read of it."""
    with pytest.raises(UserError, match="larger than 8 MiB"):
        Config.load(Path("/dev/zero"))
    assert "larger than 8 MiB" in config_refusal(tmp_path, "# " + "x" * 2**23)


def test_a_config_with_a_byte_order_mark_is_used(tmp_path: Path) -> None:
    """And with CRLF."""
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfseed: 5\r\ntrain:\r\n  steps: 7\r\n")
    config = Config.load(tmp_path / "c.yaml")
    assert (config.seed, config.train.steps) == (5, 7)
