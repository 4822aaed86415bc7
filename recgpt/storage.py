"""Files by path or URL (local, ``s3://``), and outputs that appear whole or not at all.

Everything goes through fsspec; credentials come from the environment or an instance role only.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import Any

import fsspec

from recgpt.errors import UserError, without_credentials
from recgpt.schema import CANDIDATES_MANIFEST_FILE, MANIFEST_FILE, SUCCESS_FILE

# What shows a folder to be finished, in the order in which it is written.
_WRITTEN_LAST = (CANDIDATES_MANIFEST_FILE, MANIFEST_FILE, SUCCESS_FILE)

# What makes a name a URL, a chain of URLs or a path of another system.
_LEADS_ELSEWHERE = re.compile(r"\\|://|::")

_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.partial$")
_LONGEST_NAME = 255  # bytes
_S3 = re.compile(r"s3a?://")
_S3_WITH_BUCKET = re.compile(r"s3a?://([\w.-]+|arn:[^@/]+)(/|$)")


def join(url: str, *parts: str) -> str:
    """``join("s3://bucket/a/", "b", "c")`` is ``"s3://bucket/a/b/c"``."""
    return "/".join([url.rstrip("/"), *parts])


def join_inside(folder: str, name: str, where: str) -> str:
    """The place of a name that was read from a file, which must lie inside ``folder``.

    ``name``: what a manifest says, so anything at all; a file, or a path of folders and a file with ``/``.
    ``where``: the file that says so, for the message.
    Raises ``UserError`` for what is no such name: absolute, with ``..`` or an empty part, another URL.
    """
    plain = isinstance(name, str) and name.isprintable() and not _LEADS_ELSEWHERE.search(name)
    if not plain or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"{where}: names {name!r}, which is no file inside {folder}; the file is damaged")
    return join(folder, name)


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def filesystem_and_path(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URL, and the path inside it.

    Raises ``UserError`` for a URL with credentials, and for ``s3://`` without a bucket's name.
    """
    if problem := _problem_of_path(url):
        raise UserError(f"{url}: {problem}; give another path")
    if without_credentials(url) != url or (_S3.match(url) and not _S3_WITH_BUCKET.match(url)):
        raise UserError(f"{url}: write s3://BUCKET/FOLDER; credentials come from the environment")
    if not _S3.match(url):
        return fsspec.core.url_to_fs(url)
    from recgpt.object_store import open_object_store  # slow to import, and most paths are local

    filesystem = open_object_store()
    return filesystem, filesystem._strip_protocol(url)


def _problem_of_path(url: str) -> str | None:
    """Why no file can have this path, wherever it came from."""
    try:
        encoded = os.fsencode(url)
    except UnicodeEncodeError:
        return "holds half a character"
    if b"\0" in encoded:
        return "holds the character 0"
    if max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        return f"has a name longer than {_LONGEST_NAME} bytes"
    return None


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
    Raises ``UserError`` for a whole bucket, and for a pattern in an object store.
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


def size(url: str) -> int:
    """Bytes of a file."""
    filesystem, path = filesystem_and_path(url)
    return filesystem.size(path)


def read_bytes(url: str) -> bytes:
    filesystem, path = filesystem_and_path(url)
    return filesystem.cat_file(path)


def write_bytes(url: str, data: bytes, *, durable: bool = False) -> None:
    """Write a file that appears whole or not at all (rename locally, one put on S3).

    ``durable``: what a local disk holds afterwards survives a loss of power; an object store always does so.
    Raises ``OSError`` with the path if the disk is full; the file is then what it was before.
    """
    filesystem, path = filesystem_and_path(url)
    if not is_local(url):
        filesystem.pipe_file(path, data)
        return
    with _temporary_file(path, data, durable) as temporary:
        temporary.replace(path)


def create_bytes(url: str, data: bytes) -> None:
    """Write a file that is not there yet, whole, durable, or not at all: of several writers, one succeeds.

    Raises ``FileExistsError`` if there is one with other contents. With the same contents it counts as
    written, because an object store whose answer got lost refuses the second attempt; so writers that
    have to know which of them was first write something that is theirs alone. An object store must know
    conditional writes (``If-None-Match``).
    Raises ``UserError`` for a local file system without hard links.
    """
    filesystem, path = filesystem_and_path(url)
    try:
        if is_local(url):
            with _temporary_file(path, data, durable=True) as temporary:
                os.link(temporary, path)
        else:
            filesystem.pipe_file(path, data, mode="create")
    except OSError as error:
        if is_local(url) and error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(f"{url}: this file system has no hard links; choose another folder") from None
        answer = getattr(error.__cause__, "response", {}).get("Error", {})
        if not isinstance(error, FileExistsError) and answer.get("Code") != "PreconditionFailed":
            raise
        if read_bytes(url) != data:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url) from None


@contextlib.contextmanager
def _temporary_file(path: str, data: bytes, durable: bool) -> Iterator[Path]:
    """A local file beside ``path``, hidden from readers, that the block gives its final name.

    The name is its own: a lost process may still be writing the same file. It is gone after the block.
    """
    folder = Path(path).parent
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{Path(path).name}.{secrets.token_hex(4)}.partial"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
        if durable:
            for changed in (folder, *(new.parent for new in made)):
                _sync_folder(changed)
    except OSError as error:
        error.filename = path  # a write that fails does not say where, and the temporary name says nothing
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do this for folders
            raise
    finally:
        os.close(handle)


def remove_temporary_files(folder: str) -> None:
    """Remove what processes that were lost while writing left in a local folder, at any depth.

    Nobody may be writing there. In an object store such leftovers are parts of uploads, which are no files.
    """
    if is_local(folder):
        for path in Path(absolute(folder)).rglob(".*.partial"):
            if _TEMPORARY.search(path.name) and path.is_file():
                path.unlink(missing_ok=True)


def read_json(url: str) -> Any:
    """Raises ``UserError`` if the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(url))
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    except (ValueError, RecursionError) as error:  # the latter from lists in lists in lists ...
        raise UserError(f"{url}: not valid JSON ({error}); the file is damaged") from None


def read_json_object(url: str) -> dict[str, Any]:
    """Raises ``UserError`` if the file is missing or is not an object in JSON."""
    value = read_json(url)
    if not isinstance(value, dict):
        raise UserError(f"{url}: holds no object; the file is damaged")
    return value


def write_json(url: str, value: Any, *, durable: bool = False) -> None:
    """Write JSON as ``write_bytes`` does."""
    write_bytes(url, (json.dumps(value, indent=2) + "\n").encode(), durable=durable)


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
        remove_temporary_files(staging)
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
    if is_local(url):
        return
    if url.rstrip("/").rpartition("/")[0].endswith(":/"):
        raise UserError(f"{url}: is a whole bucket; give a folder inside it")
    if has_magic(url):  # to remove or copy it would be to remove or copy all that it matches
        raise UserError(f"{url}: an output in an object store cannot have *, ? or [ in its name")


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
