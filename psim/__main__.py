"""Entry point of the command `psim`: it imports the chosen subcommand's module and no other.

The image has not the libraries of the extra `offline`: there, `serve`, `audit`, `exceptions`,
`keys`, `inspect`, `sign` and `screen` work, and the others name the extra that they need.
"""

import os
import warnings
from importlib import import_module
from typing import Any, NoReturn, cast

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from models.errors import PsimError

COMMANDS = {
    "fit": "models.offline.cli.fit",
    "scan": "models.offline.cli.scan",
    "base": "models.offline.cli.base",
    "poison": "models.offline.cli.attack",
    "finetune": "models.offline.cli.attack",
    "attack": "models.offline.cli.attack",
    "evaluate": "models.offline.cli.evaluate",
    "study": "models.offline.cli.study",
    "assure": "models.offline.cli.study",
    "screen": "models.offline.cli.screen",
    "triggers": "models.offline.cli.screen",
    "inspect": "models.offline.cli.bundle",
    "recalibrate": "models.offline.cli.bundle",
    "sign": "models.offline.cli.bundle",
    "serve": "psim.serve",
    "audit": "psim.serve",
    "exceptions": "psim.serve",
    "keys": "psim.serve",
    "demo": "psim.demo",
}
"""Module of each subcommand. They import what takes long, or needs an extra, when they are run."""
NEEDS_EXTRA = "pip install 'psim-gateway[offline]'"
INTERRUPTED = (
    "interrupted. Run the same command again: poison, finetune and study go on behind the "
    "last whole epoch, screen --on ray behind what is written, the others start afresh"
)
ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
stderr = Console(stderr=True)


class LazyCommands(TyperGroup):
    """Subcommands that are imported when they are run, or listed by `psim --help`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all subcommands."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """Return a subcommand; None if there is none of this name."""
        if cmd_name not in COMMANDS:
            self.commands = {name: load(name) for name in COMMANDS}  # typer suggests one of them
            return None
        return load(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand. Expected errors become one line; a traceback is for our bugs only."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `psim screen ... | head`: typer ends quietly
        except ModuleNotFoundError as error:
            if COMMANDS[ctx.invoked_subcommand] == "psim.serve":
                raise
            stop(f"psim {ctx.invoked_subcommand} needs {error.name}: {NEEDS_EXTRA}")
        except (PsimError, OSError) as error:
            stderr.print("[bold red]error:[/]", end=" ")
            stop(str(error))
        except KeyboardInterrupt:
            stop(INTERRUPTED, 130)


def load(name: str) -> TyperCommand:
    """Import a subcommand; one whose module is not installed says so when it is run."""
    try:
        found: typer.Typer = import_module(COMMANDS[name]).app
    except ModuleNotFoundError as error:
        found = unavailable(name, error)
    return cast(TyperCommand, typer.main.get_group(found).commands[name])


def unavailable(name: str, error: ModuleNotFoundError) -> typer.Typer:
    """Return a stand-in that takes any arguments and raises an error."""
    app = typer.Typer()

    @app.command(
        name, help="Not installed: needs the extra offline.", context_settings=ANY_ARGUMENTS
    )
    def command() -> None:
        raise error

    return app


def stop(message: str, code: int = 2) -> NoReturn:
    """Print a line and end with an exit code."""
    stderr.print(message, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def psim() -> None:
    """Find backdoor triggers before they reach your text classifier."""


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # weights load in a second here
    # Deprecations inside libraries are not the user's business.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", UserWarning)
    app()


if __name__ == "__main__":
    main()
