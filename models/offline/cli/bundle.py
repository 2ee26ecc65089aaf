"""Subcommands on a bundle: `psim inspect`, `psim recalibrate` and `psim sign`."""

from pathlib import Path
from typing import Annotated

import typer

from models.errors import DataError
from models.offline.cli.console import say, stdout

app = typer.Typer()

MAX_RISE = 4.0
"""Standard deviations by which thresholds may rise since `psim fit`; docs/method.md says why."""


@app.command("inspect")
def inspect_command(bundle: Annotated[Path, typer.Argument(help="Bundle to check.")]) -> None:
    """Check every file of a bundle and show what it guards, without loading any weights."""
    from models.bundle.verify import check_files, read_manifest
    from models.offline.evaluation.bundle_report import manifest_table

    manifest, digest = read_manifest(bundle)
    check_files(bundle, manifest)
    stdout.print(manifest_table(manifest))
    stdout.print(f"all {len(manifest.files)} files are intact; digest {digest}")


@app.command("recalibrate")
def recalibrate_command(
    export: Annotated[Path, typer.Argument(help="Traffic, with texts and marks, by psim audit.")],
    bundle: Annotated[Path, typer.Option(help="Bundle to start from; it is left as it is.")],
    out: Annotated[Path, typer.Option(help="Folder for the new bundle; must not exist yet.")],
    max_rise: Annotated[
        float,
        typer.Option(help="By how many standard deviations thresholds may rise since psim fit."),
    ] = MAX_RISE,
    accept_misses: Annotated[
        bool,
        typer.Option("--accept-misses", help="Even if texts that were marked poisoned pass."),
    ] = False,
) -> None:
    """Make a bundle with new thresholds, from the audited clean traffic of another."""
    if out.exists():
        raise DataError(f"{out} exists already, and nothing is replaced; choose another --out")
    from models.bundle.verify import read_manifest
    from models.offline.evaluation.bundle_report import recalibration_table
    from models.offline.fitting.recalibrate import check, recalibrate, write
    from models.offline.fitting.traffic import read_traffic
    from models.offline.io.atomic import check_writable

    check_writable(out, force=False)
    _, digest = read_manifest(bundle)
    new = recalibrate(bundle, read_traffic(export, digest))
    stdout.print(recalibration_table(new.record))
    check(new.record, max_rise, accept_misses)
    write(new, out)
    say(f"wrote {out}; next: psim serve --bundle {out}")


@app.command("sign")
def sign_command(
    bundle: Annotated[Path, typer.Argument(help="Bundle to sign.")],
    key: Annotated[Path, typer.Option(help="Private key (Ed25519, PEM).")],
) -> None:
    """Sign a bundle, so that a service with PSIM_BUNDLE_KEY takes it."""
    from models.bundle.layout import MANIFEST
    from models.bundle.signing import sign
    from models.bundle.verify import check_files, read_manifest

    manifest, _ = read_manifest(bundle)
    check_files(bundle, manifest)
    say(f"wrote {sign(bundle / MANIFEST, key)}")
