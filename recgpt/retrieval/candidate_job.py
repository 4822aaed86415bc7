"""One job of candidates, made part by part in as many runs as it takes: each user exactly once.

While it is under way, its parts lie in a staging folder beside the output (``.NAME.partial``): first comes
``_job.json``, which says what is being made; then the part files, and for each, once it is whole, a receipt
in ``_receipts/``. A run that finds the staging folder of its own job goes on from what the receipts prove.
The output itself appears only when all parts are there.
"""

import hashlib
import json
import secrets
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from recgpt import storage
from recgpt.errors import UserError
from recgpt.progress import progress_bar
from recgpt.retrieval.candidates import (
    CandidateFile,
    CandidatesManifest,
    finish,
    load_manifest,
    read_manifest,
    read_part,
)
from recgpt.schema import CANDIDATES_MANIFEST_FILE, SUCCESS_FILE

JOB_FILE = "_job.json"
RECEIPTS_FOLDER = "_receipts"
_READERS = 8  # parts checked at once: each waits for storage most of the time


@dataclass(frozen=True)
class CandidateJob:
    """What is made, and of what: two commands with equal jobs make the same candidates."""

    model_fingerprint: str
    dataset_fingerprint: str
    recall: dict[str, Any]
    """The settings ``recall.*`` as resolved."""
    allowed_items: str | None
    """SHA-256 over the items that may be candidates; None: all."""
    index: str | None
    """As in ``MadeFrom``."""
    units: str
    """SHA-256 over the parts and their users (see ``checksum_of_units``)."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """One run of a job: what it writes into, and what earlier runs have left there."""

    folder: str
    """The staging folder."""
    job: str
    """Fingerprint of the job."""
    token: str
    """The run's own mark in ``_job.json``: a later run of the job puts its own there."""
    done: list[CandidateFile]
    """Parts that are proven to be whole."""


def finished_manifest(url: str, job: CandidateJob, check: bool) -> CandidatesManifest | None:
    """The manifest of an output that this very job has finished, or None.

    ``check``: read every file, and take an output with a damaged one for none.
    """
    storage.recover_folder(url)
    if not storage.exists(storage.join(url, SUCCESS_FILE)):
        return None
    try:
        manifest = read_manifest(url)
    except UserError:
        return None  # damaged, or of another release; whether it may be replaced is asked elsewhere
    if manifest.job != job.fingerprint:
        return None
    if check and len(_proven(url, manifest.files)) < len(manifest.files):
        return None
    return manifest


def begin(url: str, job: CandidateJob, parts: Collection[str], overwrite: bool) -> Run:
    """Start a run of a job: go on in the staging folder if it is this job's, else begin with an empty one.

    ``parts``: names of all part files of the job.
    Raises ``UserError`` if the output holds something and ``overwrite`` is not given.
    """
    folder = storage.staging_folder(url)
    if not _was_cut_off_while_placed(folder, url, job):
        storage.check_output_is_free(url, overwrite)
    left = [file for file in _left(folder, job) if file.path in parts]
    if not left:
        storage.remove(folder)
        storage.make_folder(folder)
    token = secrets.token_hex(8)
    note = {"job": job.fingerprint, "run": token, **asdict(job)}
    # Before the parts are checked, which takes a while: an older run must not finish meanwhile.
    storage.write_json(storage.join(folder, JOB_FILE), note)
    return Run(folder, job.fingerprint, token, _proven(folder, left))


def check_run_is_latest(folder: str, token: str) -> None:
    """Raises ``UserError`` if another run has taken over the staging folder, or has finished it.

    Asked before a part is written: what is left of a run whose driver was killed must not write any more.
    """
    try:
        latest = storage.read_json(storage.join(folder, JOB_FILE))["run"]
    except UserError:
        latest = None
    if latest != token:
        raise UserError(f"{folder}: another run has taken over this output; let one run at a time write it")


def write_receipt(run: Run, file: CandidateFile) -> None:
    """Note that a part file of the run's job is whole. Raises ``UserError`` as ``check_run_is_latest``."""
    check_run_is_latest(run.folder, run.token)
    storage.write_json(_receipt(run.folder, file.path), {"job": run.job, **asdict(file)})


def finish_job(run: Run, url: str, manifest: CandidatesManifest) -> None:
    """Write the manifest and ``_SUCCESS``, remove job file and receipts, and put the folder in its place.

    Raises ``UserError`` if another run has taken over, or if a part is not there any more.
    """
    check_run_is_latest(run.folder, run.token)
    missing = sorted({file.path for file in manifest.files} - set(storage.list_names(run.folder)))
    if missing:
        raise UserError(
            f"{run.folder}: {missing[0]} is gone; let one run at a time write it, and run it again"
        )
    finish(run.folder, manifest)
    storage.put_in_place(run.folder, url)


def clear_after(url: str, job: CandidateJob) -> None:
    """Remove what a run that was killed after its output was finished left of the staging folder."""
    folder = storage.staging_folder(url)
    copied = _staged_manifest(folder, job) is not None  # and not yet removed
    if copied or not any(
        storage.exists(storage.join(folder, name)) for name in (JOB_FILE, CANDIDATES_MANIFEST_FILE)
    ):
        storage.remove(folder)


def _receipt(folder: str, part: str) -> str:
    return storage.join(folder, RECEIPTS_FOLDER, f"{part}.json")


def _left(folder: str, job: CandidateJob) -> list[CandidateFile]:
    """What receipts, or the manifest if it was written already, say about parts in the staging folder."""
    manifest = _staged_manifest(folder, job)
    if manifest is not None:
        return manifest.files
    try:
        same = storage.read_json(storage.join(folder, JOB_FILE))["job"] == job.fingerprint
    except (UserError, KeyError, TypeError):
        return []
    if not same:
        return []
    receipts = [storage.join(folder, RECEIPTS_FOLDER, name) for name in _receipt_names(folder)]
    with ThreadPoolExecutor(_READERS) as readers:
        read = readers.map(lambda receipt: _read_receipt(receipt, job), receipts)
        return [file for file in read if file is not None]


def _staged_manifest(folder: str, job: CandidateJob) -> CandidatesManifest | None:
    """The manifest that a run of this job had written before it was killed, on the way into its place."""
    try:
        manifest = load_manifest(folder)
    except UserError:
        return None
    return manifest if manifest.job == job.fingerprint else None


def _receipt_names(folder: str) -> list[str]:
    return [
        name for name in storage.list_names(storage.join(folder, RECEIPTS_FOLDER)) if name.endswith(".json")
    ]


def _read_receipt(url: str, job: CandidateJob) -> CandidateFile | None:
    """None for one that is damaged, or of another job's straggler: the part is made again."""
    try:
        values = storage.read_json(url)
        if values.pop("job") != job.fingerprint:
            return None
        return TypeAdapter(CandidateFile).validate_python(values)
    except (UserError, ValidationError, KeyError, AttributeError, TypeError):
        return None


def _proven(folder: str, files: list[CandidateFile]) -> list[CandidateFile]:
    """Those of the files that are there and hold what is said of them."""

    def is_whole(file: CandidateFile) -> bool:
        try:
            read_part(folder, file)
        except UserError:
            return False
        return True

    with (
        ThreadPoolExecutor(_READERS) as readers,
        progress_bar("check finished parts", len(files), "parts", passing=True) as bar,
    ):
        proven = []
        for file, whole in zip(files, readers.map(is_whole, files), strict=True):
            bar.update(1)
            proven += [file] if whole else []
    return proven


def _was_cut_off_while_placed(folder: str, url: str, job: CandidateJob) -> bool:
    """Whether the output holds nothing but what a killed run of this job had copied from the staging folder.

    Only an object store copies, and ``_SUCCESS`` last.
    """
    if storage.is_local(url) or _staged_manifest(folder, job) is None:
        return False
    placed = storage.list_names(url)
    return SUCCESS_FILE not in placed and set(placed) <= set(storage.list_names(folder))
