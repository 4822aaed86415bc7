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
from recgpt.schema import CANDIDATES_MANIFEST_FILE, MANIFEST_FILE, SUCCESS_FILE

# What shows a folder to be finished, in the order in which it is written.
_WRITTEN_LAST = (CANDIDATES_MANIFEST_FILE, MANIFEST_FILE, SUCCESS_FILE)


def join(url: str, *parts: str) -> str:
    """``join("s3://bucket/a/", "b", "c")`` is ``"s3://bucket/a/b/c"``."""
    return "/".join([url.rstrip("/"), *parts])


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def filesystem_and_path(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URL, and the path inside it."""
    # A remembered listing would hide what other processes have written since.
    options = {"use_listings_cache": False} if url.startswith(("s3://", "s3a://")) else {}
    return fsspec.core.url_to_fs(url, **options)


def absolute(url: str) -> str:
    """Local paths made absolute, so that processes with another working folder find them."""
    return str(Path(url.removeprefix("file://")).expanduser().absolute()) if is_local(url) else url


def exists(url: str) -> bool:
    filesystem, path = filesystem_and_path(url)
    return filesystem.exists(path)


def is_file(url: str) -> bool:
    filesystem, path = filesystem_and_path(url)
    return filesystem.isfile(path)


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


def check_output_apart(output: str, *inputs: str) -> None:
    """Raises ``UserError`` if the output is, holds or lies inside something that is read from."""
    written = _resolved(output)
    for source in inputs:
        read = _resolved(source)
        if f"{read}/".startswith(f"{written}/") or written.startswith(f"{read}/"):
            raise UserError(
                f"--output {output}: overlaps {source}, which is read from; choose another folder"
            )


def _resolved(url: str) -> str:
    return str(Path(absolute(url)).resolve()) if is_local(url) else url.rstrip("/")


@contextlib.contextmanager
def staged_output(url: str, overwrite: bool) -> Iterator[str]:
    """Yield a folder to write into, which becomes ``url`` only if the block succeeds.

    The folder stands beside the output (``.NAME.partial``), so that an older output stays whole until
    the new one is; what a failed block left there is removed by the next. Locally the folder is
    renamed into place. An object store cannot rename: there the objects are copied inside the store,
    the old manifest goes first and the new one comes last, so that what is half copied has no manifest.
    Raises ``UserError`` if the output holds something and ``overwrite`` is not given.
    """
    url = absolute(url)
    recover_folder(url)
    check_output_is_free(url, overwrite)
    staging = _sibling(url, "partial")
    remove(staging)
    make_folder(staging)
    yield staging
    if is_local(url):
        replace_folder(staging, url)
    else:
        _replace_objects(staging, url)


def replace_folder(staging: str, final: str) -> None:
    """Rename the local folder ``staging`` to ``final``; what stood there is removed only afterwards.

    If this is killed between the two, ``recover_folder`` brings back what stood there.
    """
    previous = Path(_sibling(final, "previous"))
    shutil.rmtree(previous, ignore_errors=True)  # left over if this was killed before
    if Path(final).exists():
        Path(final).rename(previous)
    Path(staging).rename(final)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(final: str) -> None:
    """Put the older folder back if ``replace_folder`` was killed while there was none; else do nothing."""
    if not is_local(final):
        return
    previous = Path(_sibling(final, "previous"))
    if previous.exists() and not Path(final).exists():
        previous.rename(final)


def _sibling(url: str, suffix: str) -> str:
    """``folder/name`` becomes ``folder/.name.suffix``; a leading dot hides it from globs and readers."""
    if is_local(url):
        folder = Path(absolute(url))
        return str(folder.with_name(f".{folder.name}.{suffix}"))
    parent, _, name = url.rstrip("/").rpartition("/")
    if parent.endswith(":/"):  # what stands beside a bucket is another bucket
        raise UserError(f"{url}: is a whole bucket; give a folder inside it")
    return join(parent, f".{name}.{suffix}")


def _replace_objects(staging: str, final: str) -> None:
    """Move objects inside their store to where others may stand, which are removed before."""
    for name in reversed(_WRITTEN_LAST):
        remove(join(final, name))
    remove(final)
    filesystem, source = filesystem_and_path(staging)
    _, target = filesystem_and_path(final)
    names = [path[len(source) + 1 :] for path in filesystem.find(source)]
    markers = [name for name in _WRITTEN_LAST if name in names]
    contents = [name for name in names if name not in markers]
    filesystem.copy([join(source, name) for name in contents], [join(target, name) for name in contents])
    for name in markers:
        filesystem.copy(join(source, name), join(target, name))
    remove(staging)
