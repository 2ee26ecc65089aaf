"""Subcommand `psim base`."""

from typing import Annotated

import typer

from models.offline.cli.console import say
from models.offline.cli.options import Force, Out

app = typer.Typer()


@app.command("base")
def base_command(
    name: Annotated[str, typer.Argument(help="minilm, mpnet or smollm2.")],
    out: Out,
    force: Force = False,
) -> None:
    """Write a pretrained model, from a package that is installed, as a Hugging Face folder."""
    from models.offline.io.atomic import check_writable
    from models.offline.io.bases import write_base

    check_writable(out, force)
    write_base(name, out)
    say(f"wrote {out}; next: psim poison --base {out}")
