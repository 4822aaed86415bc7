"""The table that people read."""

import io

from rich.console import Console

from recgpt.evaluation.report import METRICS, metrics_table, print_result


def example(quotas, baselines=("popularity", "markov")):
    def row(value, quotas=None):
        return {**dict.fromkeys(METRICS, value), "num_users": 1234, "quotas": quotas}

    return {
        **row(0.5, quotas),
        "one_step": row(0.3, [20]),
        "two_step": row(0.4, [18, 2]),
        "baselines": {name: dict.fromkeys(METRICS, 0.1) for name in baselines},
        "split": "test",
        "protocol": "leave_one_out",
    }


def rendered(result) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(metrics_table(result))
    return console.file.getvalue()


def test_rows_and_numbers():
    text = rendered(example([18, 2]))
    assert "test split, leave_one_out, 1,234 users" in text
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
