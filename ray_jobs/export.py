"""`recgpt export`: a trained model as a folder that serves without RecGPT. Needs no Ray."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ray_jobs.command_line import DatasetOption, ModelOption, OverwriteOption, verb_app
from ray_jobs.runtime import run_command
from recgpt import storage

if TYPE_CHECKING:
    from recgpt.retrieval.serving_export import Format


def run_export(
    model: str, dataset: str, output: str, format: "Format", *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a model for serving; returns the manifest.

    What the user can put right raises ``UserError`` and leaves what was in ``output`` before as it was.
    """
    from recgpt.data.dataset import HistoryDataset
    from recgpt.retrieval.recall_model import model_for_dataset
    from recgpt.retrieval.serving_export import releases, write_serving_folder

    releases(format)  # what is missing shows now
    histories = HistoryDataset.open(dataset)
    model_url, _ = model_for_dataset(model, histories)
    storage.check_output_apart(output, dataset, model)
    with storage.staged_output(output, overwrite) as folder:
        return write_serving_folder(folder, format, model_url, histories)


def command(
    model: ModelOption,
    dataset: DatasetOption,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Folder to write (path or s3:// URL); it appears only once it is whole. "
            "Example: --output serving/beauty",
        ),
    ],
    format: Annotated[
        Literal["torch", "onnx", "faiss"],
        typer.Option(
            help="`torch`: weights in safetensors, for plain torch. `onnx`: a graph for ONNX Runtime. "
            "`faiss`: the items in an exact faiss index. Example: --format onnx",
        ),
    ],
    overwrite: OverwriteOption = False,
) -> None:
    """Hand a model over for serving: a folder that gives candidates without RecGPT.

    It holds the model, the ids of the items (for which the dataset is needed), a `README.txt` that says what
    goes in and what comes out, and `serve.py`, which serves the folder: `python serve.py --history ID ID`.
    The lists are those of `recgpt generate`.

    Example: `recgpt export --model runs/beauty --dataset data/beauty --output serving/beauty --format onnx`
    """
    manifest = run_export(model, dataset, output, format, overwrite=overwrite)
    size = sum(file["bytes"] for file in manifest["files"].values())
    typer.echo(
        f"{output}: {manifest['num_items']:,} items, {size / 1e6:,.1f} MB; "
        "`python serve.py --history ID ID` there gives candidates"
    )


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
