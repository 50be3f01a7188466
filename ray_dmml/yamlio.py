"""YAML in and out: safe, and with YAML 1.2's numbers.

PyYAML follows YAML 1.1, where ``1e-4`` is text; whoever writes it means a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

YAMLError = yaml.YAMLError

_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load(text: str) -> Any:
    """Plain values only: nothing in the text can run code.

    Raises:
        YAMLError: it is no YAML.
    """
    return yaml.load(text, _Loader)


def dump(value: Any, **style: Any) -> str:
    """What :func:`load` reads back; ``style`` as of ``yaml.dump``."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
