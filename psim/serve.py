"""Subcommands of the service: `psim serve`, `audit`, `exceptions` and `keys`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

ARGPARSE: dict[str, Any] = {
    "context_settings": {
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
}
"""Settings of subcommands whose arguments, `--help` included, the service parses itself."""


@app.command("serve")
def serve_command(
    bundle: Annotated[Path, typer.Option(help="Bundle to serve.")],
    host: Annotated[str | None, typer.Option(help="Address; PSIM_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; PSIM_PORT.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="enforce, sanitize, flag or shadow; PSIM_MODE.")
    ] = None,
) -> None:
    """Serve a bundle over HTTP; all other settings come from PSIM_* variables."""
    given = {"BUNDLE": bundle, "HOST": host, "PORT": port, "MODE": mode}
    os.environ |= {f"PSIM_{key}": str(value) for key, value in given.items() if value is not None}
    from service.__main__ import main

    main()


@app.command("audit", **ARGPARSE)
def audit_command(context: typer.Context) -> None:
    """Export what a service decided, by time and decision, as JSONL or CSV."""
    from service.audit.__main__ import main

    main(context.args)


@app.command("exceptions", **ARGPARSE)
def exceptions_command(context: typer.Context) -> None:
    """Let exact texts pass after a review, by their HMAC and for a time."""
    from service.audit.exceptions_command import main

    main(context.args)


@app.command("keys", **ARGPARSE)
def keys_command(context: typer.Context) -> None:
    """Make an API key of a service."""
    from service.security.keys.__main__ import main

    main(context.args)
