"""Commands as a container would run them: as another user, on a root that is read-only."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,ro,bind / && user=$2 && shift 2 &&
read=+dac_read_search && exec setpriv --reuid "$user" --regid "$user" --clear-groups \\
    --no-new-privs --bounding-set "-all,$read" --inh-caps "$read" --ambient-caps "$read" "$@"
"""
"""For sh: all but one folder becomes read-only, and another user, who may read, runs a command."""


def confined(command: Sequence[str], user: int, writable: str | Path) -> list[str]:
    """Return a command that runs another so, which then may write to one folder only.

    Where this is not root, or may make no mounts, it is the other command itself.
    """
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"]).returncode:
        return [*command]
    os.chown(writable, user, user)
    return ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(writable), str(user), *command]
