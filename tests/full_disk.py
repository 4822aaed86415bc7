"""A disk that is really full: a tiny file system of a process's own, in namespaces that end with it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

# Mounts the disk over the folder, runs the command, and lists the files on the disk behind a line of its own.
_SCRIPT = """
set -e; folder=$1; size=$2; shift 2
mount -t tmpfs -o size=$size tmpfs "$folder"
status=0; "$@" || status=$?
echo "files on the disk:"; cd "$folder"; find . -type f; exit $status
"""


def run_on_small_disk(
    folder: Path, size: str, call: list[str], **options: Any
) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run a command for which ``folder`` is a disk of ``size`` (as "64k"); returns what it left there too.

    The test is skipped where a user may not mount anything.
    """
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        tried = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if tried.returncode:
        pytest.skip("namespaces cannot be made here")
    shell = [*unshare, "sh", "-c", _SCRIPT, "sh", str(folder), size, *call]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=200, **options)
    done.stdout, _, files = done.stdout.partition("files on the disk:\n")
    return done, {name.removeprefix("./") for name in files.split()}
