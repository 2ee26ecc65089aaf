"""`python -m service.security.keys`, also `psim keys`: make an API key."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from service.security.keys.file import KeysError, Scope, hash_of, parse_keys
from service.settings import Mode

PREFIX = "psim_"
"""Lets scanners for secrets recognize a key."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Add a key's hash to the file and write the key to stdout; exit with code 2 on errors."""
    options = _parser().parse_args(arguments)
    try:
        if options.file is None:
            raise KeysError("set PSIM_KEYS to that of the service, or give --file")
        key = PREFIX + secrets.token_urlsafe(32)
        _append(options.file, options.name, _toml(options, key))
    except KeysError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    sys.stderr.write(f"{options.file} has the hash; the key is shown this once:\n")
    sys.stdout.write(f"{key}\n")


def _parser() -> argparse.ArgumentParser:
    default = os.environ.get("PSIM_KEYS")
    parser = argparse.ArgumentParser(prog="psim keys", description="Make an API key.")
    new = parser.add_subparsers(required=True).add_parser(
        "new",
        help="add a key to the file, and show it once",
        description="Add a key to the file, and show it once. To revoke it, delete it there.",
    )
    new.add_argument("name", help="letters, digits, - and _; it appears in logs and in the audit")
    new.add_argument(
        "--scope",
        action="append",
        required=True,
        choices=[str(scope) for scope in Scope],
        help="routes it gives access to; may be given several times",
    )
    new.add_argument("--rate", help="passes per time, such as 100/second; unlimited by default")
    new.add_argument(
        "--no-scores", action="store_true", help="show its holder decisions, but no scores"
    )
    _add_policy(new)
    new.add_argument(
        "--file",
        type=Path,
        default=Path(default) if default else None,
        help="by default the file of PSIM_KEYS",
    )
    return parser


def _add_policy(new: argparse.ArgumentParser) -> None:
    new.add_argument(
        "--mode",
        choices=[str(mode) for mode in Mode],
        help="what happens to its holder's triggered texts; by default as PSIM_MODE says",
    )
    new.add_argument(
        "--unfamiliar",
        choices=["flag", "reject", "allow"],
        help="what happens to its holder's unfamiliar texts; by default as PSIM_UNFAMILIAR says",
    )
    new.add_argument(
        "--model",
        action="append",
        dest="models",
        help="a model that its holder may use; may be given several times; by default all",
    )
    new.add_argument(
        "--frr-budget",
        type=float,
        help="refuse models whose bundles are not calibrated for this false-rejection budget",
    )


def _toml(options: argparse.Namespace, key: str) -> str:
    # JSON strings, and lists of them, are valid TOML.
    lines = [
        f"[keys.{json.dumps(options.name)}]",
        f'sha256 = "{hash_of(key)}"',
        f"scopes = {json.dumps(options.scope)}",
    ]
    if options.rate is not None:
        lines.append(f"rate = {json.dumps(options.rate)}")
    if options.no_scores:
        lines.append("scores = false")
    for name in ("mode", "unfamiliar", "models", "frr_budget"):
        if (value := getattr(options, name)) is not None:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _append(file: Path, name: str, key: str) -> None:
    """Add a key to the file, unless that would make the file invalid."""
    try:
        before = file.read_text("utf-8") if file.exists() else ""
        if name in parse_keys(before, file):
            raise KeysError(f"{file} has a key {name} already; take it out first")
        parse_keys(f"{before}\n{key}", file)
        file.touch(0o600)
        with file.open("a", encoding="utf-8") as out:
            out.write(f"\n{key}" if before else key)
    except OSError as error:
        raise KeysError(f"{file} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    main()
