"""Files by path or URL (local, ``s3://``), and outputs that appear whole or not at all.

Everything goes through fsspec; credentials come from the environment or an instance role only.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE, SUCCESS_FILE


def join(url: str, *parts: str) -> str:
    """``join("s3://bucket/a/", "b", "c")`` is ``"s3://bucket/a/b/c"``."""
    return "/".join([url.rstrip("/"), *parts])


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def filesystem_and_path(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URL, and the path inside it."""
    return fsspec.core.url_to_fs(url)


def absolute(url: str) -> str:
    """Local paths made absolute, so that processes with another working folder find them."""
    return str(Path(url.removeprefix("file://")).expanduser().absolute()) if is_local(url) else url


def exists(url: str) -> bool:
    filesystem, path = filesystem_and_path(url)
    return filesystem.exists(path)


def is_empty(url: str) -> bool:
    """True if there is no such folder, or nothing in it."""
    filesystem, path = filesystem_and_path(url)
    return not filesystem.exists(path) or not filesystem.find(path)


def remove(url: str) -> None:
    """Remove a file or a folder with all its contents; nothing happens if it is not there."""
    filesystem, path = filesystem_and_path(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def make_folder(url: str) -> None:
    filesystem, path = filesystem_and_path(url)
    filesystem.makedirs(path, exist_ok=True)


def list_names(url: str) -> list[str]:
    """The sorted names (not paths) directly inside a folder; empty if there is no such folder."""
    filesystem, path = filesystem_and_path(url)
    if not filesystem.exists(path):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False))


def read_bytes(url: str) -> bytes:
    filesystem, path = filesystem_and_path(url)
    return filesystem.cat_file(path)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file that appears whole or not at all (rename locally, one put on S3)."""
    filesystem, path = filesystem_and_path(url)
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    if not is_local(url):
        filesystem.pipe_file(path, data)
        return
    temporary = f"{path}.partial"
    filesystem.pipe_file(temporary, data)
    Path(temporary).replace(path)


def read_json(url: str) -> Any:
    """Raises ``UserError`` if the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(url))
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    except ValueError as error:
        raise UserError(f"{url}: not valid JSON ({error}); the file is damaged") from None


def write_json(url: str, value: Any) -> None:
    write_bytes(url, (json.dumps(value, indent=2) + "\n").encode())


def checksum_of(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def checksum(url: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    filesystem, path = filesystem_and_path(url)
    with filesystem.open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_output_is_free(url: str, overwrite: bool) -> None:
    """Raises ``UserError`` if the output holds something and ``overwrite`` is not given."""
    if not overwrite and not is_empty(url):
        raise UserError(
            f"{url}: the output already holds something; choose another folder or give --overwrite"
        )


@contextlib.contextmanager
def staged_output(url: str, overwrite: bool) -> Iterator[str]:
    """Yield a folder to write into, which becomes ``url`` only if the block succeeds.

    Locally the folder stands beside the output and is renamed into place, so that an older output
    is there, whole, until the new one is. An object store cannot rename: there the old manifest
    is removed first and the new one is written last, so that what is half written has no manifest.
    """
    check_output_is_free(url, overwrite)
    if not is_local(url):
        remove(join(url, SUCCESS_FILE))
        remove(join(url, MANIFEST_FILE))
        remove(url)
        yield url
        return
    final = Path(absolute(url))
    staging = final.with_name(f".{final.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield str(staging)
    replace_folder(str(staging), str(final))


def replace_folder(staging: str, final: str) -> None:
    """Rename the local folder ``staging`` to ``final``; what stood there is removed only afterwards."""
    previous = Path(final).with_name(f".{Path(final).name}.previous")
    shutil.rmtree(previous, ignore_errors=True)  # left over if this was killed before
    if Path(final).exists():
        Path(final).rename(previous)
    Path(staging).rename(final)
    shutil.rmtree(previous, ignore_errors=True)
