"""The law of quality, fitted to losses that follow one and that do not; what is trained and measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recgpt.config import ModelSettings, TrainSettings
from recgpt.errors import UserError
from recgpt.model.attention import Layout
from recgpt.model.export import load_model
from recgpt.model.losses import full_cross_entropy_reference
from recgpt.scaling import law_runs
from recgpt.scaling.laws import Law, Run, caveats, fit, fit_law, markdown, to_json
from recgpt.schema import USER_HASH
from tests.ray_jobs.random_model import save_random_model

TRUE = Law(4.0, 1.0, 0.4, 0.8, 0.5, reference=(30_000, 25_000))
SIZES, DATA = (10_000, 20_000, 45_000, 110_000), (10_000, 20_000, 40_000, 80_000)
RESAMPLES = 8


def runs_of(loss):
    """The grid of sizes and data with the losses that ``loss(weights, targets)`` gives."""
    return [
        Run(
            width,
            1,
            targets / DATA[-1],
            weights,
            targets,
            48.0 * weights * targets,
            float(loss(weights, targets)),
        )
        for width, weights in enumerate(SIZES, 1)
        for targets in DATA
    ]


@pytest.fixture(scope="module")
def fitted():
    noise = np.random.default_rng(0)
    return fit(runs_of(lambda n, d: TRUE.loss(n, d) * (1 + noise.normal(0, 0.001))), RESAMPLES)


def test_a_law_is_found_again():
    runs = runs_of(TRUE.loss)
    columns = [
        np.array([getattr(run, name) for run in runs], float) for name in ("weights", "targets", "loss")
    ]
    found = fit_law(*columns, TRUE.reference)
    assert found.irreducible == pytest.approx(4.0, abs=0.02)
    assert (found.size_exponent, found.data_exponent) == pytest.approx((0.4, 0.5), abs=0.01)
    # A = term x reference^exponent: 30,000^0.4 = 61.8 and 0.8 x 25,000^0.5 = 126.5.
    assert TRUE.size_coefficient == pytest.approx(61.78, abs=0.01)
    assert TRUE.data_coefficient == pytest.approx(126.49, abs=0.01)


def test_with_noise_the_interval_holds_the_truth(fitted):
    assert np.abs(fitted.residuals()).max() < 0.004
    low, high = fitted.interval("b")
    assert low < 0.5 < high
    assert low < high


def test_the_best_choice_is_the_best_along_its_budget(fitted):
    exact = replace(fitted, law=TRUE)
    best = exact.best(1e11)
    product = 1e11 / 48
    assert best.weights * best.targets == pytest.approx(product)
    around = TRUE.loss(best.weights * np.array([0.8, 1.25]), best.targets / np.array([0.8, 1.25]))
    assert best.loss < around.min()
    low, high = fitted.best_weights_interval(1e11)
    assert low <= high


def test_what_does_not_hold_is_said():
    flat = fit(runs_of(lambda n, d: 4 + (d / 25_000) ** -0.5), RESAMPLES)
    assert any("size" in text and "no influence" in text for text in caveats(flat, []))
    assert "no best choice" in caveats(flat, [1e11])[-1]
    assert "| 1e+11 | none |" in markdown(flat, [1e11], "a log")


def test_a_larger_model_that_is_worse_and_a_large_residual_are_said():
    runs = runs_of(TRUE.loss)
    runs[-4] = replace(runs[-4], loss=1.2 * runs[-4].loss)  # the largest on the least data
    told = " ".join(caveats(fit(runs, RESAMPLES), []))
    assert "share 0.125 of the users width 3 with 1 layers is better than larger models" in told
    assert "misses width 4, 1 layers, share 0.125 by +" in told


def test_few_runs_and_choices_outside_of_them_are_said(fitted):
    assert any("4 runs are few" in text for text in caveats(fit(runs_of(TRUE.loss)[:4], 2), []))
    assert caveats(fitted, [1e14])[-1].endswith("lies outside the runs (N, D).")


def test_tables_and_json(fitted):
    text = markdown(fitted, [1e11], "a log")
    assert "| 1 | 1 | 0.125 | 10,000 | 10,000 | 4.8e+09 |" in text
    assert "A training takes 48 N D operations." in text
    told = to_json(fitted, [1e11])
    assert set(told["law"]) == set(told["intervals"]) == {"E", "A", "a", "B", "b"}
    assert len(told["runs"]) == 16


# What is trained and measured


EXPERIMENT = law_runs.LawExperiment(
    sizes=(law_runs.Size(width=16, layers=2), law_runs.Size(width=8, layers=1)),
    shares=(1.0, 0.25),
    settings=TrainSettings(model=ModelSettings(members=1)),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_dataset):
    histories = {user: [(7 * user + place) % 23 for place in range(3 + user % 6)] for user in range(400)}
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=150)


def column_of(dataset, name):
    return [
        value for group in dataset.row_groups for value in dataset.read_row_group(group)[name].to_pylist()
    ]


def test_a_grid_takes_the_same_steps_on_every_share():
    grid = law_runs.trainings(EXPERIMENT)
    assert [training.name for training in grid] == [
        "width-8-layers-1-share-0.25",
        "width-8-layers-1-share-1",
        "width-16-layers-2-share-0.25",
        "width-16-layers-2-share-1",
    ]
    few, all_ = grid[0].settings, grid[1].settings
    assert (few.pretrain.max_epochs, all_.pretrain.max_epochs) == (4 * 32, 32)
    assert (few.validation.every_epochs, all_.validation.every_epochs) == (4, 1)
    assert (few.model.width, few.stages) == (8, ("pretrain",))


def test_shares_are_nested_and_apart_from_those_held_out(dataset, tmp_path):
    small, large = (
        set(
            column_of(
                law_runs.write_share(dataset, str(tmp_path / str(share)), share, held_out=0.2), USER_HASH
            )
        )
        for share in (0.25, 1.0)
    )
    held_out = [users.user_hash for users in law_runs._held_out_histories(dataset, 0.2)]
    assert small < large
    assert 60 < len(small) < 100  # 0.25 x 0.8 x 400 are 80
    assert sorted([*large, *np.concatenate(held_out).tolist()]) == sorted(column_of(dataset, USER_HASH))


def test_a_share_is_a_dataset_under_the_same_vocabulary(dataset, tmp_path):
    share = law_runs.write_share(dataset, str(tmp_path / "share"), 0.5, 0.2)
    assert share.manifest.vocabulary_fingerprint == dataset.manifest.vocabulary_fingerprint
    assert share.vocabulary().item_ids == dataset.vocabulary().item_ids
    again = law_runs.write_share(dataset, str(tmp_path / "share"), 0.5, 0.2)
    assert again.fingerprint == share.fingerprint


def test_a_share_of_nobody_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="no user falls into a share of 1e-09"):
        law_runs.write_share(dataset, str(tmp_path / "share"), 1e-9, 0.2)
    assert not (tmp_path / "share").exists()


def test_the_loss_is_the_mean_over_all_next_items(dataset, tmp_path):
    run = save_random_model(tmp_path / "run", dataset)
    info, gpt, item_RD = load_model(str(run / "model"))
    total, targets = 0.0, 0
    for histories in law_runs._held_out_histories(dataset, 0.2):
        for user in range(len(histories)):
            items = torch.from_numpy(histories.slice(user, user + 1).values.astype(np.int64))
            inputs, target = items[:-1][-6:], items[1:][-6:]  # the model takes 6
            layout = Layout.from_offsets(torch.tensor([0, len(inputs)]))
            row = gpt.user_rows(torch.from_numpy(histories.user_hash[user : user + 1].copy()))
            with torch.no_grad():
                total += float(
                    full_cross_entropy_reference(gpt(item_RD[inputs], layout, row), item_RD, target)
                )
            targets += len(target)
    assert law_runs.held_out_loss(str(run), dataset, 0.2) == pytest.approx(total / targets, rel=1e-5)


def test_a_run_is_counted_by_hand(tmp_path, write_dataset):
    # Training histories of 3 and 1 items (two are held out of each): 2 targets and 2 x 3 / 2 pairs.
    dataset = write_dataset(tmp_path, {1: [1, 2, 3, 4, 5], 2: [5, 6, 7]})
    training = law_runs.trainings(EXPERIMENT)[1]
    run = law_runs.measured(training, dataset, epochs=10, loss=3.5)
    # Position and segment vectors, two norms of a block, attention, feed-forward, a last norm; 8 table rows.
    gpt = 50 * 8 + 2 * 8 + (2 * 16 + 4 * 72 + 8 * 32 + 32 + 32 * 8 + 8) + 16
    assert (run.width, run.layers, run.share, run.loss) == (8, 1, 1.0, 3.5)
    assert run.targets == 2
    assert run.weights == gpt + 8 * 8
    # 3 x (2 x 12 x 8^2 x 2 tokens + 4 x 8 x 3 pairs + 2 x 8 x 2 targets x 7 items), ten times.
    assert run.flops == 10 * 3 * (2 * 12 * 64 * 2 + 4 * 8 * 3 + 2 * 8 * 2 * 7)


def test_the_shipped_experiment_is_read():
    experiment = law_runs.load_experiment("laws")
    assert len(law_runs.trainings(experiment)) == 15
    assert max(experiment.shares) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("share: [0.5, 1]", "unknown setting share; the nearest known one is shares"),
        (
            "settings: {model: {widht: 8}}",
            "settings.model.widht; the nearest known one is settings.model.width",
        ),
        ("shares: [0.5, 0.5]", "shares names one twice"),
        ("shares: [0.5, 1.5]", "shares: Input should be less than or equal to 1"),
    ],
)
def test_a_wrong_experiment_is_one_line(tmp_path, text, message):
    file = tmp_path / "laws.yaml"
    given = "sizes: [{width: 8, layers: 1}, {width: 16, layers: 1}]\n"
    file.write_text(given + ("" if text.startswith("shares") else "shares: [0.5, 1]\n") + text)
    with pytest.raises(UserError, match=message):
        law_runs.load_experiment(str(file))


def test_a_plot_shows_both_directions(fitted):
    drawn = law_runs.plot(fitted, "Loss of <users>")
    assert drawn["png"].startswith(b"\x89PNG")
    assert "Loss of &lt;users&gt;" in drawn["svg"].decode()
