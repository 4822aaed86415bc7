"""The console script `recgpt`: collects the verbs."""

from typing import Annotated

import typer

from ray_jobs import (
    ablate,
    doctor,
    evaluate,
    export,
    generate,
    index,
    laws,
    plan,
    prepare,
    project,
    quickstart,
    report,
    runs,
    scaling,
    show,
    submit,
    train,
    tune_quotas,
    validate,
    verify_candidates,
)
from ray_jobs.command_line import new_app, with_common_options
from ray_jobs.runtime import run_command
from recgpt import __version__

app = new_app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recgpt {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def recgpt(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Generative recommendation over item ids: from interaction logs to candidates per user.

    Start with `recgpt quickstart`. With a log of your own: `recgpt prepare`, `recgpt train`,
    `recgpt generate`, `recgpt evaluate`.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for module in (
    prepare,
    train,
    index,
    generate,
    verify_candidates,
    show,
    evaluate,
    tune_quotas,
    ablate,
    export,
    report,
    quickstart,
    validate,
    plan,
    project,
    laws,
    doctor,
):
    name = module.__name__.rsplit(".", 1)[-1].replace("_", "-")
    app.command(name)(with_common_options(module.command))
app.command("scale")(with_common_options(scaling.command))
app.add_typer(runs.app, name="runs")
# What follows the verb that is submitted is for that verb.
app.command(
    "submit",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)(with_common_options(submit.command))


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name, as the verbs do it.
    from ray_jobs import cli

    cli.main()
