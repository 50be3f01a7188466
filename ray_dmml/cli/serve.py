"""``ray-dmml serve``"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ray_dmml.cli.options import Address, MovedRun, TrustCode, path, use_address
from ray_dmml.cli.output import print_line, show_log, user_errors
from ray_dmml.errors import UserError
from ray_dmml.loggers.output import Console


def serve(
    indexes: Annotated[
        list[Path],
        typer.Argument(
            parser=path,
            metavar="INDEX...",
            help="Folders of indexes of one run: one, or a peer's and the ensemble's to compare them.",
        ),
    ],
    run: MovedRun = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_DMML_TOKEN",
            metavar="TOKEN",
            help="Requests need it as a bearer token. Other users of this machine see what a command line has, "
            "so better set the variable.",
        ),
    ] = None,
    replicas: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|MIN..MAX", help="Processes that embed and search, on one core each; 1..4 follows the load."
        ),
    ] = "1",
    max_concurrent: Annotated[
        int, typer.Option(min=1, metavar="NUMBER", help="Requests at the same time; more get the answer 503.")
    ] = 128,
    max_upload_mb: Annotated[
        float, typer.Option(min=0.001, metavar="MB", help="Size of an uploaded file, in megabytes.")
    ] = 20,
    max_megapixels: Annotated[
        float, typer.Option(min=0.001, max=178, metavar="NUMBER", help="Pixels of an uploaded image, in millions.")
    ] = 50,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="NUMBER", help="Images that go through the net together.")
    ] = 32,
    address: Address = None,
    write_config: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Write a serve.yaml for `serve deploy` to a new file, and end."),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Serve an index by HTTP, with a web page that finds the images most similar to a photo.

    An index that changes is loaded again without an interruption.
    """
    use_address(address)
    console = Console()
    with user_errors(), show_log(Console(stderr=True)):
        least, most = _range(replicas)
        _require_extra()
        from ray_dmml.serve.server import serve_forever
        from ray_dmml.serve.server import write_config as write
        from ray_dmml.serve.settings import LOOPBACK, ServeSettings, hashed

        is_local = host in ("127.0.0.1", "localhost", "::1")
        settings = ServeSettings(
            indexes=[os.path.abspath(folder) for folder in indexes],
            run=None if run is None else os.path.abspath(run),
            trust_code=trust_code,
            min_replicas=least,
            max_replicas=most,
            batch_size=batch_size,
            max_concurrent=max_concurrent,
            max_upload_bytes=round(max_upload_mb * 1e6),
            max_pixels=round(max_megapixels * 1e6),
            token_sha256=hashed(_checked(token)) if token is not None else None,
            allowed_hosts=list(LOOPBACK) if is_local and not token else [],
        )
        if not is_local and not token:
            print_line(Console(stderr=True), f"warning: everybody who reaches {host} may search; a token prevents it")
        if write_config is not None:
            if port == 0:
                raise UserError("--write-config needs a fixed port (--port): port 0 is another one on each node")
            write(write_config, settings, host, port)
            print_line(console, f"written: {write_config}; start it with: serve deploy {write_config}")
            return
        print_line(console, "starting ...")
        serve_forever(settings, host, port, lambda url: print_line(console, f"searches are answered at {url}"))


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,3})(?:\.\.([1-9]\d{0,3}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if most < least:
        raise UserError(f"--replicas must be a number such as 2, or a range such as 1..4, not {text}")
    return least, most


def _checked(token: str) -> str:
    """A token that a header can carry. An empty one, often of an unset variable, would leave the service open."""
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", token):
        raise UserError("the token must be ASCII characters, without a space or newline at its ends, and not empty")
    return token


def _require_extra() -> None:
    if not all(find_spec(name) for name in ("fastapi", "uvicorn", "python_multipart")):
        raise UserError("a search service needs Ray Serve; install it with: pip install 'ray-dmml[serve]'")
