"""The ablations: which settings change, and the table and plot of results made up by hand."""

import io

import pytest
from rich.console import Console

from recgpt import storage
from recgpt.config import STAGES
from recgpt.errors import UserError
from recgpt.evaluation import ablation
from recgpt.evaluation.ablation import SHOWN_METRICS, Cell
from recgpt.evaluation.metrics import metric_names
from recgpt.settings_reading import known_keys, load_train_settings, to_dict

METRICS = metric_names()
SEEDS = (3, 4)
# Means .2 and .25, deviations 0.1 * 2 ** 0.5 and 0: half the squared distance between two values.
RESULTS = {
    ablation.NO_PROMPT_TUNING: {seed: dict.fromkeys(METRICS, 0.25) for seed in SEEDS},
    ablation.FULL: {
        seed: dict.fromkeys(METRICS, value) for seed, value in zip((*SEEDS, 5), (0.1, 0.3, 0.9), strict=True)
    },
}
MARKDOWN = """\
| variant | hit_rate@10 | ndcg@10 | hit_rate@20 |
| --- | ---: | ---: | ---: |
| full | 0.2000 ± 0.1414 | 0.2000 ± 0.1414 | 0.2000 ± 0.1414 |
| no prompt-tuning | 0.2500 ± 0.0000 (+25.0 %) | 0.2500 ± 0.0000 (+25.0 %) | 0.2500 ± 0.0000 (+25.0 %) |

Test split: mean ± standard deviation over the seeds 3, 4; in brackets the difference to full.
"""


def changes(settings, variant):
    """The settings in which a variant differs from the full model, by dotted key."""
    (training,) = (one for one in ablation.trainings(settings) if one.name == variant)
    before, after = to_dict(settings), to_dict(training.settings)
    return {
        key: value_of(after, key)
        for key in known_keys(type(settings))
        if value_of(after, key) != value_of(before, key)
    }


def value_of(settings, key):
    for part in key.split("."):
        settings = settings[part]
    return settings


def variants(*overrides):
    trainings = ablation.trainings(load_train_settings(None, overrides))
    return [variant for training in trainings for variant in ablation.measured_variants(training)]


# What is trained


def test_each_variant_changes_one_thing():
    settings = load_train_settings(None, ["model.user.kind=hashed", "loss.negatives_per_target=7"])
    assert changes(settings, "no user module") == {"model.user.kind": "none"}
    assert changes(settings, "no prompt-tuning") == {"stages": ["pretrain"]}
    assert changes(settings, "the paper's loss") == {"loss.kind": "binary", "loss.negatives_per_target": 1}


def test_full_goes_on_from_the_pre_training_that_is_measured_alone():
    settings = load_train_settings(None)
    assert changes(settings, "full") == {"stages": ["prompt_tune"]}
    first, second, *others = ablation.trainings(settings)
    assert (first.name, second.starts_from) == ("no prompt-tuning", "no prompt-tuning")
    assert all(training.settings.stages == STAGES and not training.starts_from for training in others)


def test_a_model_without_users_is_compared_with_one_that_has_them():
    settings = load_train_settings(None, ["model.user.kind=none"])
    assert changes(settings, "with user module") == {"model.user.kind": "hashed"}
    assert "no user module" not in variants("model.user.kind=none")


def test_what_changes_nothing_is_left_out():
    every = ["no prompt-tuning", "full", "no autoregressive recall", "no user module", "the paper's loss"]
    personal = ("model.user.kind=table", "loss.kind=full")
    assert variants(*personal) == every
    assert variants(*personal, "recall.quotas=[20]") == [name for name in every if "recall" not in name]
    paper = ("loss.kind=binary", "loss.negatives_per_target=1", "loss.calibration=0")
    assert variants(*personal, *paper) == every[:-1]


def test_a_stage_cannot_be_left_out():
    with pytest.raises(UserError, match="needs both, pretrain and prompt_tune"):
        variants("stages=[pretrain]")


def test_only_recall_without_autoregression_is_measured_with_one_step():
    evaluation = {**dict.fromkeys(METRICS, 0.2), "quotas": [18, 2], "one_step": dict.fromkeys(METRICS, 0.1)}
    assert ablation.metrics_of(ablation.FULL, evaluation) == dict.fromkeys(METRICS, 0.2)
    assert ablation.metrics_of(ablation.NO_AUTOREGRESSIVE_RECALL, evaluation) == dict.fromkeys(METRICS, 0.1)


# What is shown


def test_means_deviations_and_changes_over_the_seeds_asked_for():
    summary = ablation.summarize(RESULTS, SEEDS)
    assert list(summary) == ["full", "no prompt-tuning"]
    for metric in SHOWN_METRICS:
        full, other = summary["full"][metric], summary["no prompt-tuning"][metric]
        assert full == (pytest.approx(0.2), pytest.approx(0.1 * 2**0.5), None)
        assert other == (0.25, 0.0, pytest.approx(0.25))


def test_one_seed_has_no_deviation_and_nothing_is_compared_with_zero():
    assert ablation.summarize(RESULTS, SEEDS[:1])["no prompt-tuning"]["ndcg@10"] == (0.25, None, 1.5)
    nothing = {**RESULTS, "full": dict.fromkeys(SEEDS, dict.fromkeys(METRICS, 0.0))}
    assert ablation.summarize(nothing, SEEDS)["no prompt-tuning"]["ndcg@10"] == Cell(0.25, 0.0, None)


def test_the_table_in_markdown_and_on_the_terminal():
    summary = ablation.summarize(RESULTS, SEEDS)
    assert ablation.markdown_table(summary, SEEDS) == MARKDOWN
    console = Console(file=io.StringIO(), width=130)
    console.print(ablation.rich_table(summary, SEEDS))
    text = console.file.getvalue()
    assert all(metric in text for metric in SHOWN_METRICS)
    assert text.count("0.2500 ± 0.0000 (+25.0 %)") == 3


def test_the_plot_is_a_picture():
    assert ablation.bar_plot(ablation.summarize(RESULTS, SEEDS[:1])).startswith(b"\x89PNG")


def test_results_outlast_their_file(tmp_path):
    storage.write_json(f"{tmp_path}/results.json", RESULTS)
    assert ablation.read_results(f"{tmp_path}/results.json") == RESULTS


@pytest.mark.parametrize("damaged", ['{"full": {"zero": {}}}', "[]", '{"full": {"0": {"ndcg@10": "high"}}}'])
def test_damaged_results_are_refused(tmp_path, damaged):
    (tmp_path / "results.json").write_text(damaged)
    with pytest.raises(UserError, match=r"results\.json: "):
        ablation.read_results(f"{tmp_path}/results.json")
