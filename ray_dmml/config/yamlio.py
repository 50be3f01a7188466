"""Reads and writes YAML: plain values only, of bounded size, with the numbers and dates of YAML 1.2.

PyYAML follows YAML 1.1, where ``1e-4`` is text, although its author means a number. PyYAML also accepts a key twice,
nests until Python's stack overflows, and lets a few lines of aliases expand to billions of values. All of that is an
error here.

OmegaConf would not help: it builds paths and bytes from tags, limits no depth, fails on a text with a ``${`` that is no
interpolation, and replaces a number by a mapping if a dotted key leads through it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

YAMLError = yaml.YAMLError

MAX_DEPTH = 50  # of lists and mappings in each other
MAX_VALUES = 1_000_000  # keys and values; an alias counts as everything it stands for
MAX_INT_BITS = 4096  # Python refuses to print far longer integers
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")  # NUL ends a file name; surrogates are not text
_TOO_DEEP = f"more than {MAX_DEPTH} levels in each other"


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, tuple[int, int] | None] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:  # The parser recurses, so a later check would be too late.
            raise _refused(_TOO_DEEP, self.peek_event())
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        self._check(node)
        return super().construct_document(node)

    def _check(self, node: yaml.Node) -> tuple[int, int]:
        """Number of values and of levels in the node. Raises YAMLError if something is not allowed."""
        if node in self._sizes:
            if (size := self._sizes[node]) is None:
                raise _refused("an alias to what it is itself a part of", node)
            return size
        self._sizes[node] = None  # until everything inside is counted
        values, levels = 1, 1
        for part in _parts(node):
            inner = self._check(part)
            values, levels = values + inner[0], max(levels, 1 + inner[1])
        if values > MAX_VALUES:
            raise _refused(f"aliases that stand for more than {MAX_VALUES} values", node)
        if levels > MAX_DEPTH:
            raise _refused(_TOO_DEEP, node)
        self._sizes[node] = values, levels
        return values, levels

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Hashable:
        try:
            value = super().construct_object(node, deep)
        except YAMLError:
            raise
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):  # of `!!int x` and the like
            raise _refused(f"what is no {node.tag.rsplit(':', 1)[-1]}", node) from None
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise _refused(f"a number of more than {MAX_INT_BITS} bits", node)
        return value


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The nodes inside of a node. Raises YAMLError for a forbidden character or a duplicate key."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.tag.rsplit(":", 1)[-1] in ("int", "float", "bool", "null"):  # it would be saved as text
                    raise _refused(f"the key {key.value[:80]}, which is no text: put it in quotes", key)
                if (key.tag, key.value) in seen:
                    raise _refused(f"the key {key.value[:80]!r} a second time", key)
                seen.add((key.tag, key.value))
        return [part for pair in node.value for part in pair]
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if character := _FORBIDDEN.search(node.value):
        raise _refused(f"the character {character[0]!r}", node)
    return []


def _refused(what: str, where: Any) -> YAMLError:
    """``where`` is a node or an event."""
    return yaml.constructor.ConstructorError(None, None, f"found {what}", where.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would read as numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    _side.yaml_implicit_resolvers = {  # YAML 1.2 has no dates: 2001-01-01 is text
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in _side.yaml_implicit_resolvers.items()
    }
_Loader.yaml_constructors = {  # no sets, bytes or dates, which a config cannot be written with
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rsplit(":", 1)[-1] in ("null", "bool", "int", "float", "str", "seq", "map")
}


def load(text: str) -> Any:
    """Parses YAML. The result holds plain values only.

    Raises:
        YAMLError: the text is not valid YAML, or exceeds the limits above.
    """
    return yaml.load(text, _Loader)


def dump(value: Any, **style: Any) -> str:
    """Writes YAML that :func:`load` reads back. ``style`` is passed to ``yaml.dump``."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
