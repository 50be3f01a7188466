"""YAML in and out: safe, bounded, and with YAML 1.2's numbers.

PyYAML follows YAML 1.1, where ``1e-4`` is text; whoever writes it means a number. It also takes a
key twice, nests until Python's stack ends, and lets a few lines of anchors and aliases stand for
billions of values; all of that is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

YAMLError = yaml.YAMLError

MAX_DEPTH = 50
"""Levels of lists and mappings in each other."""

MAX_VALUES = 1_000_000
"""Keys and values of a text, an alias counted as all that it stands for."""

MAX_INT_BITS = 4096
"""Of a whole number. Python refuses to print far longer ones."""

_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        self._extents: dict[yaml.Node, tuple[int, int]] = {}  # (values, levels) of finished nodes

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            alias: yaml.Node | None = super().compose_node(parent, index)
            if alias not in self._extents:
                raise _refused("an alias to what it is itself a part of", event.start_mark)
            return alias
        self._open += 1
        if self._open > MAX_DEPTH:  # before the parser itself runs out of stack
            raise _refused(f"more than {MAX_DEPTH} levels in each other", event.start_mark)
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is not None:
            self._extents[node] = self._extent(node)
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            _refuse_unprintable(node)
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            _refuse_twice(node)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        values, levels = 1, 1
        for part in inner:
            values += self._extents[part][0]
            levels = max(levels, 1 + self._extents[part][1])
        if values > MAX_VALUES:
            raise _refused(f"aliases that stand for more than {MAX_VALUES} values", node.start_mark)
        if levels > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels in each other", node.start_mark)
        return values, levels

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Hashable:
        try:
            value = super().construct_object(node, deep)
        except YAMLError:
            raise
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            # What PyYAML's converters raise on !!int x and the like.
            kind = node.tag.rsplit(":", 1)[-1]
            raise _refused(f"what is no {kind}", node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise _refused(f"a number of more than {MAX_INT_BITS} bits", node.start_mark)
        return value


def _refuse_unprintable(node: yaml.ScalarNode) -> None:
    """Such as the escapes of half a character, or of the character 0 that ends names of files."""
    if not node.value.isascii() or "\0" in node.value:
        for char in node.value:
            if char == "\0" or "\ud800" <= char <= "\udfff":
                raise _refused(f"the character {char!r}", node.start_mark)


def _refuse_twice(node: yaml.MappingNode) -> None:
    """The second would silently win."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _refused(f"the key {key.value[:80]!r} a second time", key.start_mark)
            seen.add((key.tag, key.value))


def _refused(what: str, mark: Any) -> YAMLError:
    return yaml.constructor.ConstructorError(None, None, f"found {what}", mark)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    _side.yaml_implicit_resolvers = {  # YAML 1.2 has no dates: 2001-01-01 is text
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in _side.yaml_implicit_resolvers.items()
    }
# What is left is what a config can be written with, too.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rsplit(":", 1)[-1] in _KINDS
}


def load(text: str) -> Any:
    """Plain values only: nothing in the text can run code, or be far larger than it looks.

    Raises:
        YAMLError: it is no YAML, or beyond the bounds above.
    """
    return yaml.load(text, _Loader)


def dump(value: Any, **style: Any) -> str:
    """What :func:`load` reads back; ``style`` as of ``yaml.dump``."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
