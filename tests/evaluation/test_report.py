"""The table that people read."""

import io

from rich.console import Console

from recgpt.evaluation.metrics import metric_names
from recgpt.evaluation.report import metrics_table, print_result

METRICS = metric_names(20)


def example(quotas, baselines=("popularity", "markov")):
    def row(value, quotas=None):
        return {**dict.fromkeys(METRICS, value), "num_users": 1234, "quotas": quotas}

    return {
        **row(0.5, quotas),
        "one_step": row(0.3, [20]),
        "two_step": row(0.4, [18, 2]),
        "baselines": {name: dict.fromkeys(METRICS, 0.1) for name in baselines},
        "difference": {"hit_rate@20": {"mean": 0.0012, "low": -0.00031, "high": 0.0021}},
        "split": "test",
        "protocol": "leave_one_out",
        "k": 20,
        "seen": "mask",
    }


def rendered(result) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(metrics_table(result))
    return console.file.getvalue()


def test_rows_and_numbers():
    text = rendered(example([18, 2]))
    assert "test split, leave_one_out, 1,234 users, lists of 20, seen items: mask" in text
    positions = [
        text.index(name)
        for name in ("popularity", "item-to-item Markov", "RecGPT, one step", "RecGPT, two steps")
    ]
    assert positions == sorted(positions)
    assert text.count("0.4000") == len(METRICS)
    assert "0.5000" not in text  # served with two steps: its row stands there already


def test_a_third_variant_has_a_row_of_its_own():
    text = rendered(example([16, 2, 2]))
    assert "RecGPT, 3 steps" in text
    assert text.count("0.5000") == len(METRICS)


def test_without_baselines():
    assert "Markov" not in rendered(example([18, 2], baselines=()))


def test_numbers_are_whole_when_the_output_is_no_terminal(capsys):
    print_result(example([18, 2]))
    out = capsys.readouterr().out
    assert out.count("0.4000") == len(METRICS)
    assert all(metric in out for metric in METRICS)


def test_unknown_users_have_a_row_of_their_own():
    unknown = dict.fromkeys(METRICS, 0.2)
    text = rendered({**example([18, 2]), "unknown_users": unknown})
    assert "RecGPT, unknown users" in text
    assert text.count("0.2000") == len(METRICS)


def test_lists_of_another_length_have_a_column_of_their_own():
    result = example([45, 5], baselines=())
    for row in (result, result["one_step"], result["two_step"]):
        row["hit_rate@50"] = 0.7
    assert "hit_rate@50" in rendered({**result, "k": 50})


def test_more_than_one_step_is_set_against_one(capsys):
    print_result(example([18, 2]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == ("served list against one step, hit_rate@20: +0.0012 (95 % interval -0.0003 to +0.0021)")
    print_result(example([20]))
    assert "against one step" not in capsys.readouterr().out
