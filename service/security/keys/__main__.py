"""`python -m service.security.keys`, also `psim keys`: make an API key."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from service.security.keys.file import KeysError, Scope, hash_of, parse_keys

PREFIX = "psim_"
"""Tells a key to whoever finds one, such as a scanner for secrets."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Add a key's hash to the file and write the key to stdout; exit with code 2 if it cannot."""
    given = _parser().parse_args(arguments)
    try:
        if given.file is None:
            raise KeysError("set PSIM_KEYS to that of the service, or give --file")
        key = PREFIX + secrets.token_urlsafe(32)
        _append(given.file, given.name, _entry(given, key))
    except KeysError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    sys.stderr.write(f"{given.file} has the hash; the key is shown this once:\n")
    sys.stdout.write(f"{key}\n")


def _parser() -> argparse.ArgumentParser:
    default = os.environ.get("PSIM_KEYS")
    parser = argparse.ArgumentParser(prog="psim keys", description="Make an API key.")
    new = parser.add_subparsers(required=True).add_parser(
        "new",
        help="add a key to the file, and show it once",
        description="Add a key to the file, and show it once. To revoke it, take it out.",
    )
    new.add_argument("name", help="letters, digits, - and _; it is in logs and audit")
    new.add_argument(
        "--scope",
        action="append",
        required=True,
        choices=[str(scope) for scope in Scope],
        help="what it is good for; may be given several times",
    )
    new.add_argument("--rate", help="inputs in a time, such as 100/second; no limit without")
    new.add_argument(
        "--no-scores", action="store_true", help="its holder is told decisions and no scores"
    )
    new.add_argument(
        "--file",
        type=Path,
        default=Path(default) if default else None,
        help="by default what PSIM_KEYS says",
    )
    return parser


def _entry(given: argparse.Namespace, key: str) -> str:
    # A JSON string, or list of them, is a TOML one too.
    lines = [
        f"[keys.{json.dumps(given.name)}]",
        f'sha256 = "{hash_of(key)}"',
        f"scopes = {json.dumps(given.scope)}",
    ]
    if given.rate is not None:
        lines.append(f"rate = {json.dumps(given.rate)}")
    if given.no_scores:
        lines.append("scores = false")
    return "\n".join(lines) + "\n"


def _append(file: Path, name: str, entry: str) -> None:
    """Add an entry; a file that would not be right with it stays as it was."""
    try:
        before = file.read_text("utf-8") if file.exists() else ""
        if name in parse_keys(before, file):
            raise KeysError(f"{file} has a key {name} already; take it out first")
        parse_keys(f"{before}\n{entry}", file)
        file.touch(0o600)
        with file.open("a", encoding="utf-8") as out:
            out.write(f"\n{entry}" if before else entry)
    except OSError as error:
        raise KeysError(f"{file} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    main()
