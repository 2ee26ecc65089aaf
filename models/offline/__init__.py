"""The offline half, pip extra `offline`: from a victim and clean texts to a calibrated bundle."""

import sys


def main() -> None:
    """Run the command `psim`."""
    try:
        from models.offline.__main__ import app
    except ModuleNotFoundError as error:
        sys.exit(f"psim needs {error.name}: pip install 'psim-gateway[offline]'")
    app()
