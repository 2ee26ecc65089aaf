"""`psim exceptions`: add, list and remove reviewed exceptions."""

import argparse
import getpass
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from models.bundle.digests import file_digest
from models.bundle.layout import MANIFEST
from models.errors import PsimError
from service.audit.exceptions import (
    MAX_DAYS,
    NOTE_CHARS,
    ReviewedException,
    add,
    recorded,
    remove,
)
from service.audit.rows import hmac_of
from service.audit.schema import AuditError
from service.audit.store import AuditStore

SECONDS = 20.0
DIGEST = re.compile("[0-9a-f]{64}")
LEAST_KEY = 32
"""Characters of PSIM_AUDIT_KEY."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the arguments say; exit with code 2 on errors."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace, AuditStore], None] = options.run
    try:
        if not options.url:
            raise AuditError("set PSIM_AUDIT_URL to that of the service, or give --url")
        with closing(AuditStore(options.url)) as store:
            store.migrate()
            run(options, store)
    except (PsimError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def _add(options: argparse.Namespace, store: AuditStore) -> None:
    now = datetime.now(UTC)
    if not 0 < options.days <= MAX_DAYS:
        raise AuditError(f"--days must be over 0 and at most {MAX_DAYS}")
    if not options.note.strip() or len(options.note) > NOTE_CHARS:
        raise AuditError(f"--note must have 1 to {NOTE_CHARS} characters")
    new = ReviewedException(
        digest=_digest(options.bundle),
        text_hmac=hmac_of(_key(), _text(options)),
        created=now,
        expires=now + timedelta(days=options.days),
        reviewer=options.reviewer,
        note=options.note.strip(),
    )
    with store.connect(SECONDS) as connection:
        add(connection, new)
    sys.stdout.write(f"{new.id}\n")


def _list(options: argparse.Namespace, store: AuditStore) -> None:
    now = datetime.now(UTC)
    with store.connect(SECONDS) as connection:
        found = recorded(connection)
    for one in found:
        if options.all or one.holds(now):
            times = {"created": one.created, "expires": one.expires, "removed": one.removed}
            shown = {name: time and time.isoformat() for name, time in times.items()}
            line = asdict(one) | shown | {"id": str(one.id)}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


def _remove(options: argparse.Namespace, store: AuditStore) -> None:
    with store.connect(SECONDS) as connection:
        remove(connection, options.id, options.reviewer, datetime.now(UTC))


def _digest(bundle: str | None) -> str:
    """Return the digest of a bundle that is given by it, or by its folder."""
    if not bundle:
        raise AuditError("give --bundle, the folder of the bundle or its digest")
    return bundle if DIGEST.fullmatch(bundle) else file_digest(Path(bundle) / MANIFEST)


def _key() -> bytes:
    key = os.environ.get("PSIM_AUDIT_KEY", "")
    if len(key) < LEAST_KEY:
        raise AuditError("set PSIM_AUDIT_KEY to that of the service: texts are known by their HMAC")
    return key.encode()


def _text(options: argparse.Namespace) -> str:
    """Return the text, without the line end that editors and `echo` put behind it."""
    raw = options.file.read_bytes() if options.file else sys.stdin.buffer.read()
    try:
        text: str = raw.decode()
    except UnicodeDecodeError:
        raise AuditError("the text is not UTF-8") from None
    if not options.exact:
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise AuditError("there is no text: give it to stdin, or its file to --file")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="psim exceptions",
        description="Let exact texts pass in which a bundle finds something, after a review.",
    )
    parser.add_argument(
        "--url",
        default=os.environ.get("PSIM_AUDIT_URL"),
        help="URL of the audit's store; by default PSIM_AUDIT_URL",
    )
    commands = parser.add_subparsers(required=True)
    _add_parser(commands.add_parser("add", help="add one; the text comes from stdin or a file"))
    listing = commands.add_parser("list", help="list those in force, as JSONL")
    listing.add_argument("--all", action="store_true", help="those that have ended too")
    listing.set_defaults(run=_list)
    removing = commands.add_parser("remove", help="end one at once")
    removing.add_argument("id", type=UUID)
    _add_reviewer(removing)
    removing.set_defaults(run=_remove)
    return parser


def _add_parser(adding: argparse.ArgumentParser) -> None:
    adding.add_argument("--note", required=True, help="why the text may pass")
    adding.add_argument(
        "--days", type=float, default=30, help=f"until it ends by itself, {MAX_DAYS} at most; 30"
    )
    adding.add_argument(
        "--bundle",
        default=os.environ.get("PSIM_BUNDLE"),
        help="folder of the bundle, or its digest; by default PSIM_BUNDLE",
    )
    adding.add_argument("--file", type=Path, help="file with the text; by default stdin")
    adding.add_argument(
        "--exact", action="store_true", help="keep the line end at the end of the text"
    )
    _add_reviewer(adding)
    adding.set_defaults(run=_add)


def _add_reviewer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reviewer", default=_user(), help="who decides so; by default the user that runs it"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


if __name__ == "__main__":
    main()
