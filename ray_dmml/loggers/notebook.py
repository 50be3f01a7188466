"""What a notebook shows in a cell: the live display of a run, and tables."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

WIDTH = 100  # characters; a browser scrolls what has no room
REFRESH_S = 0.25
HTML = """<pre style="white-space: pre; overflow-x: auto; line-height: normal">{code}</pre>"""


def cell_output(*parts: Callable[[Console], object]) -> dict[str, str]:
    """What the functions print to a console, by MIME type, as IPython wants it."""
    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, force_jupyter=False)
    for part in parts:
        part(console)
    html = console.export_html(code_format=HTML, inline_styles=True, clear=False)
    return {"text/html": html, "text/plain": console.export_text()}


class CellDisplay:
    """Shows something and replaces it, as :class:`rich.live.Live` does on a terminal.

    It is an output of the cell that is updated, so it stays in the saved notebook. The live display of rich needs
    ipywidgets, and is lost where widgets are not saved.
    """

    transient = False
    """Whether :meth:`stop` leaves nothing."""

    def __init__(self) -> None:
        self._latest: RenderableType = ""
        self._handle: DisplayHandle | None = None
        self._shown_at = 0.0

    def start(self) -> None:
        """Shows what :meth:`update` was given."""
        from IPython.display import display  # which only a notebook needs

        self._handle = display(self._rendered(), raw=True, display_id=True)

    def update(self, renderable: RenderableType) -> None:
        """Shows something else, a few times a second at most."""
        self._latest = renderable
        if time.monotonic() - self._shown_at > REFRESH_S:
            self._show()

    def stop(self) -> None:
        """Shows the latest, for good."""
        if self.transient:
            self._latest = ""
        self._show()

    def _show(self) -> None:
        if self._handle is not None:
            self._handle.update(self._rendered(), raw=True)
            self._shown_at = time.monotonic()

    def _rendered(self) -> dict[str, str]:
        return cell_output(lambda console: console.print(self._latest))
