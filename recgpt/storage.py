"""Files by path or URL (local, ``s3://``), and outputs that appear whole or not at all.

Everything goes through fsspec; credentials come from the environment or an instance role only.
"""

import contextlib
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from recgpt.errors import UserError
from recgpt.schema import CANDIDATES_MANIFEST_FILE, MANIFEST_FILE, SUCCESS_FILE

# What shows a folder to be finished, in the order in which it is written.
_WRITTEN_LAST = (CANDIDATES_MANIFEST_FILE, MANIFEST_FILE, SUCCESS_FILE)

_S3 = re.compile(r"s3a?://")
_S3_WITH_BUCKET = re.compile(r"s3a?://([\w.-]+|arn:[^@/]+)(/|$)")


def join(url: str, *parts: str) -> str:
    """``join("s3://bucket/a/", "b", "c")`` is ``"s3://bucket/a/b/c"``."""
    return "/".join([url.rstrip("/"), *parts])


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def filesystem_and_path(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URL, and the path inside it.

    Raises ``UserError`` for an ``s3://`` URL without a bucket's name, or with credentials before it.
    """
    if not _S3.match(url):
        return fsspec.core.url_to_fs(url)
    if not _S3_WITH_BUCKET.match(url):
        shown = re.sub(r"//[^/]*@", "//", url)
        raise UserError(f"{shown}: write s3://BUCKET/FOLDER; credentials come from the environment")
    # A remembered listing would hide what other processes have written since.
    return fsspec.core.url_to_fs(url, use_listings_cache=False)


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
    return not filesystem.exists(path) or not _files(filesystem, path)


def _files(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """The files at or below a path; in an object store, what ends in a slash only stands for a folder."""
    return [file for file in filesystem.find(path) if not file.endswith("/")]


def remove(url: str) -> None:
    """Remove a file or a folder with all its contents; nothing happens if it is not there.

    What shows a folder to be finished goes first, so that nothing half removed is taken for whole.
    Raises ``UserError`` for a whole bucket.
    """
    _check_inside_bucket(url)
    filesystem, path = filesystem_and_path(url)
    if not filesystem.exists(path):
        return
    files = _files(filesystem, path)
    for name in reversed(_WRITTEN_LAST):
        if markers := [file for file in files if file.endswith(f"/{name}")]:
            filesystem.rm(markers)
    if filesystem.exists(path):  # a folder in an object store is gone with the last object in it
        filesystem.rm(path, recursive=True)


def make_folder(url: str) -> None:
    """Make a folder with all above it. On S3 nothing is made; a bucket that is missing is an error."""
    filesystem, path = filesystem_and_path(url)
    if _S3.match(url):  # `makedirs` would make the bucket, which is likelier mistyped than wanted
        filesystem.mkdir(path, create_parents=False)
    else:
        filesystem.makedirs(path, exist_ok=True)


def list_names(url: str) -> list[str]:
    """The sorted names (not paths) directly inside a folder; empty if there is no such folder."""
    filesystem, path = filesystem_and_path(url)
    if not filesystem.exists(path):
        return []
    inside = {name.rstrip("/") for name in filesystem.ls(path, detail=False)}
    return sorted(name.rsplit("/", 1)[-1] for name in inside - {path.rstrip("/")})


def read_bytes(url: str) -> bytes:
    filesystem, path = filesystem_and_path(url)
    return filesystem.cat_file(path)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file that appears whole or not at all (rename locally, one put on S3)."""
    filesystem, path = filesystem_and_path(url)
    if not is_local(url):
        filesystem.pipe_file(path, data)
        return
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    # A name of its own: a lost process may still be writing the same file.
    temporary = f"{path}.{secrets.token_hex(4)}.partial"
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
    return str(Path(absolute(url)).resolve()) if is_local(url) else _S3.sub("s3://", url).rstrip("/")


@contextlib.contextmanager
def staged_output(url: str, overwrite: bool) -> Iterator[str]:
    """Yield a folder to write into, which becomes ``url`` only if the block succeeds.

    The folder stands beside the output (``.NAME.partial``), so that an older output stays whole until
    the new one is; what a failed block left there is removed by the next. Locally the folder is
    renamed into place. An object store cannot rename: there the older output is removed, its manifest
    first, and the objects are copied inside the store, the new manifest last: what is half copied has none.
    Raises ``UserError`` if the output holds something and ``overwrite`` is not given.
    """
    url = absolute(url)
    recover_folder(url)
    check_output_is_free(url, overwrite)
    staging = staging_folder(url)
    remove(staging)
    make_folder(staging)
    yield staging
    put_in_place(staging, url)


def staging_folder(url: str) -> str:
    """Where an output is written before it is whole: ``.NAME.partial`` beside it."""
    return _sibling(url, "partial")


def put_in_place(staging: str, url: str) -> None:
    """Make a staging folder that is whole the output ``url``, as ``staged_output`` does at its end."""
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
    _check_inside_bucket(url)  # what stands beside a bucket is another bucket
    parent, _, name = url.rstrip("/").rpartition("/")
    return join(parent, f".{name}.{suffix}")


def _check_inside_bucket(url: str) -> None:
    if not is_local(url) and url.rstrip("/").rpartition("/")[0].endswith(":/"):
        raise UserError(f"{url}: is a whole bucket; give a folder inside it")


def _replace_objects(staging: str, final: str) -> None:
    """Move objects inside their store to where others may stand, which are removed before."""
    remove(final)
    filesystem, source = filesystem_and_path(staging)
    _, target = filesystem_and_path(final)
    names = [path[len(source) + 1 :] for path in _files(filesystem, source)]
    markers = [name for name in _WRITTEN_LAST if name in names]
    contents = [name for name in names if name not in markers]
    filesystem.copy([join(source, name) for name in contents], [join(target, name) for name in contents])
    for name in markers:
        filesystem.copy(join(source, name), join(target, name))
    remove(staging)
