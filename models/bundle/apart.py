"""Tracing of a bundle's model for OpenVINO by a process of its own.

The process loads the weights, traces the model and ends. What serves needs neither PEFT, nor the
models of transformers, nor the module, which take more memory than many a model. Both processes
share files in memory: the checked copy of the bundle, and the traced model. Nobody else can write
them.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from models.bundle.files import descriptors_of, files_in_memory
from models.bundle.manifest import Manifest
from models.bundle.verify import WeightTotals
from models.engines.openvino import FILES, Traced, trace
from models.errors import BundleError, PsimError

REFUSED = 2
"""Exit code of the process if it refuses the bundle; then it prints why."""


def trace_apart(copy: Path, manifest: Manifest, totals: WeightTotals) -> Traced:
    """Return the traced model of a bundle.

    Args:
        copy: checked copy of the bundle.
        manifest: of the bundle.
        totals: of its weights.

    Raises:
        BundleError: the bundle is refused, or the process came to grief.
        OSError: there is no folder for temporary files, or the process cannot be started.
    """
    with files_in_memory(FILES) as folder:
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-m", __name__, copy, folder, *map(str, totals)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            input=manifest.model_dump_json(),
            pass_fds=descriptors_of(copy) + descriptors_of(folder),
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
        return Traced.load(folder, multi_label=manifest.multi_label)


def main(copy: Path, folder: Path, totals: WeightTotals) -> None:
    """Trace the model of a bundle, whose manifest is the input, into a folder.

    Raises:
        PsimError: the bundle is refused.
    """
    from models.bundle.weights import load_model  # what the caller of this process saves

    torch.set_num_threads(1)
    manifest = Manifest.model_validate_json(sys.stdin.read())
    guarded, _ = load_model(copy, manifest, totals)
    guarded.reuse_untrained()
    trace(guarded).save(folder)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), WeightTotals(*map(int, sys.argv[3:])))
    except PsimError as refusal:
        sys.stdout.write(str(refusal))
        sys.exit(REFUSED)
