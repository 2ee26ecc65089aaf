"""Tracing of a bundle's model for OpenVINO by a process of its own.

The process checks and loads the weights, and ends. What serves needs neither PEFT, nor the models
of transformers, nor the module, which take more memory than many a model.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from models.bundle.verify import checked_copy, read_manifest
from models.engines.openvino import Traced, trace
from models.errors import BundleError, PsimError

REFUSED = 2
"""Exit code of the process if it refuses the bundle; then it prints why."""


def trace_apart(path: Path, digest: str, *, multi_label: bool) -> Traced:
    """Return the traced model of a bundle.

    Args:
        path: folder of the bundle.
        digest: of the manifest that the caller has checked.
        multi_label: what that manifest says.

    Raises:
        BundleError: the bundle is refused, or the process came to grief.
        OSError: there is no folder for temporary files, or the process cannot be started.
    """
    with TemporaryDirectory(prefix="psim-traced-") as folder:
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-m", __name__, str(path), digest, folder],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == REFUSED:
            raise BundleError(done.stdout)
        if done.returncode:
            raise BundleError(
                f"the process that traces the model ended with code {done.returncode}: "
                f"{done.stderr[-500:]!r}"
            )
        return Traced.load(Path(folder), multi_label=multi_label)


def main(path: Path, digest: str, folder: Path) -> None:
    """Trace a bundle's model into a folder.

    Raises:
        PsimError: the bundle is refused.
    """
    from models.bundle.weights import load_model  # what the caller of this process saves

    torch.set_num_threads(1)
    manifest, found = read_manifest(path, None)
    if found != digest:
        raise BundleError("the bundle was replaced while it was loaded; try again")
    with checked_copy(path, manifest) as (copy, totals):
        guarded, _ = load_model(copy, manifest, totals)
        guarded.reuse_untrained()
        trace(guarded).save(folder)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    except PsimError as refusal:
        sys.stdout.write(str(refusal))
        sys.exit(REFUSED)
