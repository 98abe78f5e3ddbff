"""`conductor board`: one page that shows a running conductor as it works. `top` is the same in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import errors
from pipelines.watch import Watch

DEFAULT_PORT = 8264


def command(
    host: Annotated[
        str | None,
        typer.Option(help="Serve others, too, at this address of this machine; a token guards it (default: this machine only)."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two looks at the conductor.")] = 0.4,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration that names the conductor.")] = None,
) -> None:
    """A live page: the card as a bar, agents and their KV, who waits and why, what happened, tokens per second. Ctrl-C ends it.

    Example: conductor board --port 9000
    """
    with errors(), Watch(config) as watch:
        watch.see()
        from pipelines.board_server import serve

        serve(watch, host or "127.0.0.1", port, interval)
