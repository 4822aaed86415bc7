"""`recgpt doctor`: what this machine has of what RecGPT needs, and what to do about the rest."""

from typing import Annotated

import typer

from ray_jobs.command_line import verb_app
from ray_jobs.runtime import run_command, start_ray
from recgpt.errors import UserError
from recgpt.machine import Finding

MARKS = {"ok": "ok", "note": "[yellow]note[/yellow]", "problem": "[red]problem[/red]"}


def command(
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Also write, read and remove a small file there. Example: --store s3://bucket/runs",
            show_default="no store is looked at",
        ),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            help="Also start Ray, or join the cluster of RAY_ADDRESS, and run a task. Example: --no-ray"
        ),
    ] = True,
) -> None:
    """Look at this machine: versions, processors, memory, ports, GPU, an object store, and Ray.

    Ends with status 2 if something will fail. Nothing is changed.

    Example: `recgpt doctor --store s3://bucket/runs`
    """
    from rich.console import Console
    from rich.table import Table

    from recgpt.machine import look

    table = Table("", "", "seen", "what to do", title="This machine")
    problems = []
    for finding in [*look(store), *([_ray()] if ray else [])]:
        table.add_row(finding.what, MARKS[finding.state], finding.seen, finding.advice)
        problems += [finding.what] if finding.state == "problem" else []
    Console().print(table)
    if problems:
        raise UserError(f"{', '.join(problems)}: will not work; see what to do above")


def _ray() -> Finding:
    """Whether Ray starts, or can be joined, and runs a task."""
    try:
        start_ray(min_cpus=1)
        import ray

        answer = ray.get(ray.remote(num_cpus=1)(lambda: "ran").remote(), timeout=60)
        cpus = ray.cluster_resources().get("CPU", 0)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        advice = "unset RAY_ADDRESS for a local Ray, or see docs/cluster.md"
        return Finding("Ray", "problem", f"{type(error).__name__}: {text}", advice)
    return Finding("Ray", "ok", f"a task {answer}; {cpus:.0f} CPUs")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name, as the other verbs do it.
    from ray_jobs import doctor

    doctor.main()
