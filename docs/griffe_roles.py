"""Roles such as :func:`train` in docstrings become links of the site, or code where the page has no such name."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """mkdocs.yml names this class."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(role[1], obj), obj.docstring.value)


def _link(name: str, obj: griffe.Object) -> str:
    """A link that mkdocs-autorefs leaves out if nothing has this anchor."""
    try:
        anchor = obj.resolve(name)
    except griffe.NameResolutionError:
        anchor = name
    return f'<autoref identifier="{anchor}" optional>`{name.rpartition(".")[2]}`</autoref>'
