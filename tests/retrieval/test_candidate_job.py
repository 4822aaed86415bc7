"""A job of candidates over several runs: what is kept, what is made again, and what appears when."""

import contextlib
import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from recgpt import storage
from recgpt.config import RecallSettings
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.retrieval import candidates
from recgpt.retrieval.autoregressive import Recalled
from recgpt.retrieval.candidate_job import (
    CandidateJob,
    begin,
    check_run_is_latest,
    clear_after,
    finish_job,
    finished_manifest,
    write_receipt,
)
from recgpt.retrieval.candidates import MadeFrom, candidates_table, manifest_of, read_candidates, write_part

JOB = CandidateJob(
    model_fingerprint="m" * 64,
    dataset_fingerprint="d" * 64,
    recall={"k": 2},
    allowed_items=None,
    index=None,
    units="u" * 64,
)
OTHER = dataclasses.replace(JOB, recall={"k": 3})
PARTS = {number: f"part-{number:05d}.parquet" for number in (0, 1, 5)}
VOCABULARY = Vocabulary(pa.array(["a", "b", "c"]), np.ones(3, np.int64))


@pytest.fixture(params=["local", "object store"])
def url(request, tmp_path):
    """Where the output shall lie."""
    if request.param == "local":
        return str(tmp_path / "out")
    return storage.join(request.getfixturevalue("s3_bucket"), "folder", "out")


def make(run, part):
    """What an actor does for one part."""
    recalled = Recalled(
        torch.tensor([[1, 2]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 1]], dtype=torch.int8)
    )
    table = candidates_table(pa.chunked_array([pa.array([part])]), recalled, VOCABULARY)
    check_run_is_latest(run.folder, run.token)
    file = write_part(run.folder, part, table)
    write_receipt(run, file)
    return file


def start(url, job=JOB, overwrite=False):
    return begin(url, job, set(PARTS.values()), overwrite)


def manifest(files, job=JOB):
    made_from = MadeFrom("model", "m" * 64, "dataset", "d" * 64, "v" * 64)
    return dataclasses.replace(manifest_of(files, RecallSettings(2, (2,)), made_from), job=job.fingerprint)


def make_all(url, job=JOB, overwrite=False):
    run = start(url, job, overwrite)
    finish_job(run, url, manifest([make(run, part) for part in PARTS], job))
    return run


def done_parts(run):
    return sorted(file.path for file in run.done)


def test_a_run_goes_on_from_what_the_receipts_prove(url):
    first = start(url)
    assert first.done == []
    files = [make(first, 0), make(first, 5)]
    assert storage.is_empty(url)
    second = start(url)
    assert second.folder == first.folder
    assert sorted(second.done, key=lambda file: file.path) == files
    finish_job(second, url, manifest([*second.done, make(second, 1)]))
    assert storage.list_names(url) == ["_SUCCESS", "_manifest.json", *PARTS.values()]
    assert not storage.exists(second.folder)
    assert [row["user_id"] for table in read_candidates(url) for row in table.to_pylist()] == [0, 1, 5]
    assert finished_manifest(url, JOB, check=True) == candidates.read_manifest(url)


def test_parts_without_a_right_receipt_are_made_again(url):
    run = start(url)
    for part in PARTS:
        make(run, part)
    storage.write_bytes(storage.join(run.folder, PARTS[0]), b"another content")
    storage.write_bytes(storage.join(run.folder, "_receipts", f"{PARTS[1]}.json"), b'{"path": "part-0')
    assert done_parts(start(url)) == [PARTS[5]]
    storage.remove(storage.join(run.folder, PARTS[5]))
    make(start(url), 0)
    assert done_parts(start(url)) == [PARTS[0]]
    storage.write_json(storage.join(run.folder, "_receipts", f"{PARTS[0]}.json"), {"rows": 1})
    assert start(url).done == []


def test_another_job_begins_in_an_empty_folder(url):
    make(start(url), 0)
    run = start(url, OTHER)
    assert run.done == []
    assert storage.list_names(run.folder) == ["_job.json"]
    assert start(url, JOB).done == []


def test_a_job_file_that_is_damaged_proves_nothing(url):
    run = start(url)
    make(run, 0)
    storage.write_bytes(storage.join(run.folder, "_job.json"), b"[]")
    assert start(url).done == []


def test_an_older_run_must_not_write_any_more(url):
    old = start(url)
    new = start(url)
    with pytest.raises(UserError, match="another run has taken over"):
        make(old, 0)
    finish_job(new, url, manifest([make(new, part) for part in PARTS]))
    with pytest.raises(UserError, match="another run has taken over"):
        make(new, 0)


def test_a_finished_output_is_known_by_its_job(url):
    make_all(url)
    assert finished_manifest(url, JOB, check=False) is not None
    assert finished_manifest(url, OTHER, check=False) is None
    with pytest.raises(UserError, match="already holds something"):
        start(url, OTHER)
    storage.write_bytes(storage.join(url, PARTS[0]), b"damaged")
    assert finished_manifest(url, JOB, check=False) is not None
    assert finished_manifest(url, JOB, check=True) is None


def test_the_older_output_stays_until_the_new_one_is_whole(url):
    make_all(url)
    before = candidates.read_manifest(url)
    run = start(url, OTHER, overwrite=True)
    files = [make(run, part) for part in PARTS]
    assert candidates.read_manifest(url) == before
    finish_job(run, url, manifest(files, OTHER))
    assert candidates.read_manifest(url).job == OTHER.fingerprint


class Killed(BaseException):
    """The end of the process, as far as it can be had inside one."""


def finish_or_be_killed(run, url, manifest):
    with contextlib.suppress(Killed):
        finish_job(run, url, manifest)


KILLS = ["write_json", "remove", "write_bytes", "put_in_place"]


@pytest.mark.parametrize("url", ["local"], indirect=True)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", KILLS)
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_run_that_was_killed_at_its_end_has_nothing_to_make_again(
    url, monkeypatch, overwrite, place, calls
):
    if overwrite:
        make_all(url, OTHER)
    run = start(url, JOB, overwrite)
    files = [make(run, part) for part in PARTS]
    left = [calls]
    original = getattr(storage, place)

    def killed(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, place, killed)
        finish_or_be_killed(run, url, manifest(files))
    if finished_manifest(url, JOB, check=True) is None:
        again = start(url, JOB, overwrite)
        assert done_parts(again) == list(PARTS.values())
        finish_job(again, url, manifest(again.done))
    assert finished_manifest(url, JOB, check=True) == manifest(files)
    assert storage.list_names(url) == ["_SUCCESS", "_manifest.json", *PARTS.values()]


@pytest.mark.parametrize("copies", [0, 1, 3, 4])
def test_a_store_that_was_cut_off_while_it_copied_goes_on(s3_bucket, monkeypatch, copies):
    url = storage.join(s3_bucket, "out")
    run = start(url)
    files = [make(run, part) for part in PARTS]
    filesystem, _ = storage.filesystem_and_path(url)
    original, left = type(filesystem)._cp_file, [copies]

    async def cut_off(self, *arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("gone")
        return await original(self, *arguments, **options)

    monkeypatch.setattr(type(filesystem), "_cp_file", cut_off)
    with pytest.raises(OSError, match="gone"):
        finish_job(run, url, manifest(files))
    monkeypatch.undo()
    if finished_manifest(url, JOB, check=True) is None:
        again = start(url)  # without --overwrite: what stands there is its own
        assert done_parts(again) == list(PARTS.values())
        finish_job(again, url, manifest(again.done))
    assert finished_manifest(url, JOB, check=True) == manifest(files)
    assert not storage.exists(run.folder)


def test_a_store_with_something_else_in_it_is_refused(s3_bucket):
    url = storage.join(s3_bucket, "out")
    run = start(url)
    candidates.finish(run.folder, manifest([make(run, part) for part in PARTS]))
    storage.write_bytes(storage.join(url, "precious"), b"")
    with pytest.raises(UserError, match="already holds something"):
        start(url)


def test_leftovers_beside_a_finished_output_go_but_not_another_job(url):
    make_all(url)
    staging = storage.staging_folder(url)
    storage.write_bytes(storage.join(staging, PARTS[0]), b"left by a removal that was cut off")
    clear_after(url, JOB)
    assert not storage.exists(staging)
    make(start(url, OTHER, overwrite=True), 0)
    clear_after(url, JOB)
    assert done_parts(start(url, OTHER, overwrite=True)) == [PARTS[0]]


def test_a_run_that_another_has_taken_over_does_not_finish(url):
    older = start(url)
    files = [make(older, part) for part in PARTS]
    newer = start(url)
    with pytest.raises(UserError, match="another run has taken over"):
        finish_job(older, url, manifest(files))
    finish_job(newer, url, manifest(newer.done))
    assert sum(len(table) for table in read_candidates(url)) == len(PARTS)


def test_parts_that_went_away_are_not_taken_for_there(url):
    run = start(url)
    files = [make(run, part) for part in PARTS]
    storage.remove(storage.join(run.folder, PARTS[1]))
    with pytest.raises(UserError, match=f"{PARTS[1]} is gone"):
        finish_job(run, url, manifest(files))
    assert storage.is_empty(url)


def test_a_straggler_of_another_job_leaves_nothing_that_is_trusted(url):
    straggler = start(url, OTHER)
    start(url)
    with pytest.raises(UserError, match="another run has taken over"):
        make(straggler, 0)
    current = start(url)
    as_if_current = dataclasses.replace(straggler, token=current.token)
    make(as_if_current, 0)  # between its look and its receipt the newer run began
    assert done_parts(start(url)) == []


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CandidateJob)])
def test_every_part_of_a_job_is_in_its_fingerprint(field):
    changed = dataclasses.replace(JOB, **{field: {"k": 4} if field == "recall" else "changed"})
    assert changed.fingerprint != JOB.fingerprint
