"""The offline half, pip extra `offline`: from a victim and clean texts to a calibrated bundle."""

import sys
import warnings


def main() -> None:
    """Run the command `psim`."""
    try:
        import transformers

        from models.offline.__main__ import app
    except ModuleNotFoundError as error:
        sys.exit(f"psim needs {error.name}: pip install 'psim-gateway[offline]'")
    # Weights load in a second here, and the libraries' deprecations are not the user's business.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", UserWarning)
    app()
