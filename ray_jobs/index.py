"""`recgpt index`: an approximate index of a trained model's items, where exact search is too slow."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ray_jobs.command_line import DatasetOption, ModelOption, OverwriteOption, verb_app
from ray_jobs.runtime import run_command
from recgpt import storage
from recgpt.schema import INDEX_SCHEMA_VERSION

if TYPE_CHECKING:
    from recgpt.retrieval.approximate_index import Kind


def run_index(
    model: str,
    dataset: str,
    output: str,
    kind: "Kind",
    *,
    min_index_recall: float = 0.95,
    recall_at: int = 100,
    lists: int | None = None,
    neighbors: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build an index, find the effort that it is searched with, and write both; returns the manifest.

    It runs in this process, on all of its machine's processors. What the user can put right raises
    ``UserError`` and leaves what was in ``output`` before as it was.
    """
    from recgpt.data.dataset import HistoryDataset
    from recgpt.model.export import load_without_items, model_fingerprint
    from recgpt.retrieval import index_building
    from recgpt.retrieval.approximate_index import IndexManifest, import_faiss, save_index
    from recgpt.retrieval.index_loading import load_exact_index
    from recgpt.retrieval.recall_model import model_for_dataset

    import_faiss()
    histories = HistoryDataset.open(dataset)
    model_url, info = model_for_dataset(model, histories)
    parameters = index_building.default_parameters(kind, info.num_items, lists, neighbors)
    storage.check_output_apart(output, dataset, model)
    storage.check_output_is_free(storage.absolute(output), overwrite)
    info, gpt = load_without_items(model_url)
    exact = load_exact_index(model_url, info.recall.block_items)
    found = index_building.build(kind, parameters, exact.table_RD, info.recall.block_items)
    interest_UD = index_building.interest_vectors(gpt, exact, histories, info.recall)
    recall_at = min(recall_at, info.num_items)
    measured = index_building.choose_effort(
        found, kind, parameters, exact, interest_UD, recall_at, min_index_recall, info.recall.batch_users
    )
    manifest = IndexManifest(
        schema_version=INDEX_SCHEMA_VERSION,
        kind=kind,
        parameters=parameters,
        recall_at=recall_at,
        recall_users=len(interest_UD),
        num_items=info.num_items,
        model_fingerprint=model_fingerprint(model_url),
        sha256="",  # known once it is written
        **asdict(measured),
    )
    with storage.staged_output(output, overwrite) as folder:
        return asdict(save_index(folder, found, manifest))


def command(
    model: ModelOption,
    dataset: DatasetOption,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="INDEX",
            help="Folder to write (path or s3:// URL); it appears only once it is whole. "
            "Example: --output indexes/beauty",
        ),
    ],
    kind: Annotated[
        Literal["ivf", "hnsw"],
        typer.Option(
            help="`ivf` looks into some of many lists of similar items, `hnsw` walks a graph of neighbours: "
            "faster to search, slower to build, and larger. Example: --kind ivf",
        ),
    ],
    min_index_recall: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the best items that the index must find; it is searched with as much effort as "
            "that takes. Example: --min-index-recall 0.99",
        ),
    ] = 0.95,
    recall_at: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="How many best items are looked for. Example: --recall-at 20"),
    ] = 100,
    lists: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --kind ivf: lists that the items are divided into. Example: --lists 4096",
            show_default="4 times the square root of the number of items, with 40 items each or more",
        ),
    ] = None,
    neighbors: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="With --kind hnsw: neighbours of an item in the graph. Example: --neighbors 48",
            show_default="16, and 32 from 100,000 items on",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Build an approximate index of a model's items, to give to `recgpt generate --index`.

    It is measured against exact search, on the interest vectors of users of the dataset, and refused if it
    does not find enough of what they should get. Needs faiss: `pip install 'recgpt[faiss]'`.

    Example: `recgpt index --model runs/beauty --dataset data/beauty --output indexes/beauty --kind ivf`
    """
    manifest = run_index(
        model,
        dataset,
        output,
        kind,
        min_index_recall=min_index_recall,
        recall_at=recall_at,
        lists=lists,
        neighbors=neighbors,
        overwrite=overwrite,
    )
    typer.echo(
        f"It finds {manifest['recall']:.1%} of the {manifest['recall_at']} best items (of "
        f"{manifest['recall_users']} users), {manifest['speed_up']:.1f} times as fast as the exact index; "
        f"{output}"
    )


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name, as the other verbs do it.
    from ray_jobs import index

    index.main()
