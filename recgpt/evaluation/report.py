"""The result of an evaluation as a table for people; ``ray_jobs.evaluate`` says what is in the result."""

from typing import Any

from rich.table import Table

from recgpt.evaluation.metrics import metric_names
from recgpt.tables import console, print_tables


def metrics_table(result: dict[str, Any]) -> Table:
    """One row per baseline and recall variant, one column per metric; the best of a column is bold."""
    rows = metric_rows(result)
    metrics = metric_names(result["k"])
    table = Table("", *metrics, title=caption(result))
    best = {metric: max(row[metric] for row in rows.values()) for metric in metrics}
    for name, row in rows.items():
        cells = [f"{row[metric]:.4f}" for metric in metrics]
        bold = [row[metric] == best[metric] for metric in metrics]
        table.add_row(name, *(f"[bold]{cell}[/]" if b else cell for cell, b in zip(cells, bold, strict=True)))
    return table


def caption(result: dict[str, Any]) -> str:
    """What was measured."""
    return (
        f"{result['split']} split, {result['protocol']}, {result['num_users']:,} users, "
        f"lists of {result['k']}, seen items: {result['seen']}"
    )


def metric_rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of each row by its title. The served list has none of its own where it is one of them."""
    rows: dict[str, dict[str, Any]] = {}
    for name, title in (("popularity", "popularity"), ("markov", "item-to-item Markov")):
        if name in result["baselines"]:
            rows[title] = result["baselines"][name]
    rows["RecGPT, one step"] = result["one_step"]
    rows["RecGPT, two steps"] = result["two_step"]
    if result["quotas"] not in (result["one_step"]["quotas"], result["two_step"]["quotas"]):
        rows[f"RecGPT, {len(result['quotas'])} steps"] = result
    if "unknown_users" in result:
        rows["RecGPT, unknown users"] = result["unknown_users"]
    return rows


def difference_line(result: dict[str, Any]) -> str:
    """By how much the served list is better than that of one step, at its end."""
    metric = f"hit_rate@{result['k']}"
    interval = result["difference"][metric]
    return (
        f"served list against one step, {metric}: {interval['mean']:+.4f} "
        f"(95 % interval {interval['low']:+.4f} to {interval['high']:+.4f})"
    )


def print_result(result: dict[str, Any]) -> None:
    """Print the table on stdout, and what more than one step changes if the model takes more."""
    print_tables(metrics_table(result))
    if len(result["quotas"]) > 1:
        console().print(difference_line(result), highlight=False, soft_wrap=True)
