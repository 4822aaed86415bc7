"""`recgpt verify-candidates`: whether candidates are whole and keep what they promise. Needs no Ray."""

from dataclasses import replace
from typing import Annotated

import typer

from ray_jobs.command_line import UsersOption, verb_app
from ray_jobs.runtime import run_command
from recgpt.errors import UserError
from recgpt.progress import progress_bar

PROBLEMS_SHOWN = 20


def run_verify(candidates: str, *, dataset: str | None = None, users: str | None = None) -> str:
    """Check a candidates folder; returns what was checked. Problems are printed as they are found.

    ``dataset`` and ``users`` are where the candidates' manifest says, unless they are given.
    Raises ``UserError`` if there are problems, or if something that is needed cannot be read.
    """
    from recgpt import storage
    from recgpt.retrieval.candidate_checks import check_candidates, dataset_of
    from recgpt.retrieval.candidate_plan import selected_units
    from recgpt.retrieval.candidates import read_manifest

    candidates = storage.absolute(candidates)
    manifest = read_manifest(candidates)
    histories = dataset_of(manifest, dataset)
    asked_for = manifest.asked_for if users is None else replace(manifest.asked_for, users=users)
    units = selected_units(histories, asked_for)
    found = 0
    with progress_bar("verify", len(manifest.files) + 1, "files") as bar:
        for problems in check_candidates(candidates, manifest, histories, units):
            for problem in problems[: max(0, PROBLEMS_SHOWN - found)]:
                bar.write(problem)
            found += len(problems)
            bar.update(1)
    if found:
        shown = f", the first {PROBLEMS_SHOWN} are shown" if found > PROBLEMS_SHOWN else ""
        raise UserError(
            f"{candidates}: {found} problems{shown}; run `recgpt generate` again with --overwrite"
        )
    seen = "" if manifest.keep_seen else ", none that the user has seen"
    return (
        f"{candidates}: {manifest.num_users} users in {len(manifest.files)} files; checksums and row counts "
        "are right, every user that was asked for is there exactly once, no item is repeated or "
        f"unknown{seen}, scores descend within a step, k={manifest.k} and quotas {manifest.quotas} are kept"
    )


def command(
    candidates: Annotated[
        str,
        typer.Argument(metavar="CANDIDATES", help="Folder made by `recgpt generate` (path or s3:// URL)."),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="The dataset that they were made from, if it has moved. Example: --dataset data/beauty",
            show_default="where it lay",
        ),
    ] = None,
    users: UsersOption = None,
) -> None:
    """Check candidates: checksums, every user exactly once, and what each list promises.

    Lists hold no item twice, none that the dataset does not know and none that the user has seen (unless made
    with `--keep-seen`); scores descend within a step; `k` and quotas are kept. Each problem is one line, the
    first 20 are shown, and the exit status is 2.

    Example: `recgpt verify-candidates candidates/beauty`
    """
    typer.echo(run_verify(candidates, dataset=dataset, users=users))


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
