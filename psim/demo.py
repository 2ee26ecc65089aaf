"""Subcommand `psim demo`: needs the offline half to build a bundle and the service to serve it."""

import os
from typing import Annotated

import typer
from rich.console import Console

from psim.serve import serve_command

app = typer.Typer()


@app.command("demo")
def demo_command(
    serve: Annotated[bool, typer.Option(help="Serve the bundle when it is built.")] = True,
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8000,
) -> None:
    """Poison a small victim, guard it, and serve it: built once, then cached."""
    from models.offline.cli.console import say
    from models.offline.demo import build, introduction

    bundle = build(say=say)
    Console().print(introduction(port), highlight=False, markup=False, soft_wrap=True)
    if serve:
        os.environ.setdefault("PSIM_LOG_LEVEL", "WARNING")  # the introduction stays in sight
        serve_command(bundle, port=port)
