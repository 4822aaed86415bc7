"""The result of an evaluation as a table for people; ``ray_jobs.evaluate`` says what is in the result."""

from typing import Any

from rich.console import Console
from rich.table import Table

from recgpt.evaluation.metrics import CUTOFFS

METRICS = (*(f"hit_rate@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS), "mrr")
WIDTH_WHERE_NO_TERMINAL = 130


def metrics_table(result: dict[str, Any]) -> Table:
    """One row per baseline and recall variant, one column per metric; the best of a column is bold."""
    rows: dict[str, dict[str, float]] = {}
    for name, title in (("popularity", "popularity"), ("markov", "item-to-item Markov")):
        if name in result["baselines"]:
            rows[title] = result["baselines"][name]
    rows["RecGPT, one step"] = result["one_step"]
    rows["RecGPT, two steps"] = result["two_step"]
    if result["quotas"] not in (result["one_step"]["quotas"], result["two_step"]["quotas"]):
        rows[f"RecGPT, {len(result['quotas'])} steps"] = result
    title = f"{result['split']} split, {result['protocol']}, {result['num_users']:,} users"
    table = Table("", *METRICS, title=title)
    best = {metric: max(row[metric] for row in rows.values()) for metric in METRICS}
    for name, row in rows.items():
        cells = [f"{row[metric]:.4f}" for metric in METRICS]
        bold = [row[metric] == best[metric] for metric in METRICS]
        table.add_row(name, *(f"[bold]{cell}[/]" if b else cell for cell, b in zip(cells, bold, strict=True)))
    return table


def print_result(result: dict[str, Any]) -> None:
    """Print the table on stdout."""
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width to respect: cut no number off there
        console = Console(width=max(console.width, WIDTH_WHERE_NO_TERMINAL))
    console.print(metrics_table(result))
