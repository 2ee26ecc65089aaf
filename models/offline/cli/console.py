"""Standard output for results, standard error for everything else."""

from rich.console import Console

stdout = Console()
stderr = Console(stderr=True)


def say(line: str) -> None:
    """Print a line to standard error as it is, without markup or wrapping."""
    stderr.print(line, highlight=False, markup=False, soft_wrap=True)
