"""Table optimizers against a twin that updates one row at a time and decays every row in every step."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from recgpt.config import OptimizerSettings
from recgpt.distributed import table_optimizer
from recgpt.distributed.sharded_table import ShardedTable
from recgpt.distributed.table_optimizer import row_optimizer

KINDS = ["adam", "adagrad", "sgd"]
NUM_ROWS, WIDTH = 7, 3
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True, scope="module")
def several_pieces():
    """Even a small table is worked on in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_optimizer, "_ROWS_AT_A_TIME", 3)
        yield


class StrictTable(ShardedTable):
    def write(self, row_U, value_UD):
        assert len(row_U.unique()) == len(row_U), "of a row written twice it is open which value stays"
        super().write(row_U, value_UD)


def table_of(row_ND, dtype=torch.float64):
    table = StrictTable(*row_ND.shape, seed=0, device=torch.device("cpu"), dtype=dtype)
    table.rows.copy_(row_ND)
    return table


def random_rows(num_rows=NUM_ROWS, seed=0):
    return torch.randn(num_rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


class Twin:
    """Each row is a parameter of its own, with an optimizer of its own."""

    def __init__(self, kind, row_ND, settings):
        self.kind, self.settings = kind, settings
        self.row_N = [torch.nn.Parameter(row.clone()) for row in row_ND]
        self.square_sum_N = [0.0] * len(row_ND)
        adam = {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon, "weight_decay": 0.0}
        self.optimizer_N = [
            torch.optim.SGD([row]) if kind == "sgd" else torch.optim.AdamW([row], **adam)
            for row in self.row_N
        ]

    def step(self, row_U, gradient_UD, rate):
        for row in self.row_N:
            row.data *= 1 - rate * self.settings.weight_decay
        for number, gradient in zip(row_U, gradient_UD, strict=True):
            if self.kind == "adagrad":
                self.square_sum_N[number] += float((gradient**2).mean())
                scale = rate / (self.square_sum_N[number] ** 0.5 + self.settings.epsilon)
                self.row_N[number].data -= scale * gradient
                continue
            self.row_N[number].grad = gradient.clone()
            self.optimizer_N[number].param_groups[0]["lr"] = rate
            self.optimizer_N[number].step()

    def rows(self):
        return torch.stack([row.data for row in self.row_N])


# Equal to the twin


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_twin_when_every_row_is_used(kind, dense):
    settings = OptimizerSettings(weight_decay=0.1)
    table, twin = table_of(random_rows()), Twin(kind, random_rows(), settings)
    optimizer = row_optimizer(kind, table, settings)
    for step in range(5):
        gradient, rate = random_rows(seed=step + 1), 0.1 / (step + 1)
        optimizer.step(None if dense else torch.arange(NUM_ROWS), gradient, rate)
        twin.step(range(NUM_ROWS), gradient, rate)
        torch.testing.assert_close(table.rows_in_use(), twin.rows(), **EXACT)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, {"rtol": 1e-5, "atol": 1e-6})]
)
def test_adam_equals_adamw_of_torch_on_the_whole_table(dtype, tolerance, dense):
    settings = OptimizerSettings(weight_decay=0.1)
    weight = torch.nn.Parameter(random_rows().to(dtype))
    betas = (settings.beta1, settings.beta2)
    expected = torch.optim.AdamW([weight], lr=0.02, betas=betas, eps=settings.epsilon, weight_decay=0.1)
    table = table_of(weight.data, dtype)
    optimizer = row_optimizer("adam", table, settings)
    for step in range(5):
        weight.grad = random_rows(seed=step + 1).to(dtype)
        expected.step()
        optimizer.step(None if dense else torch.arange(NUM_ROWS), weight.grad, 0.02)
    torch.testing.assert_close(table.rows_in_use(), weight.data, **tolerance)


def test_adagrad_by_hand():
    settings = OptimizerSettings(epsilon=5.0)
    table = table_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = row_optimizer("adagrad", table, settings)
    # (1 + 49) / 2 = 25, and 0.5 / (5 + 5) = 0.05
    optimizer.step(rows(0), torch.tensor([[1.0, 7.0]], dtype=torch.float64), 0.5)
    torch.testing.assert_close(table.rows, torch.tensor([[0.95, 1.65], [3.0, 4.0]], dtype=torch.float64))
    # 25 + 144 = 169, and 1.8 / (13 + 5) = 0.1
    optimizer.step(rows(0), torch.tensor([[12.0, 12.0]], dtype=torch.float64), 1.8)
    torch.testing.assert_close(table.rows, torch.tensor([[-0.25, 0.45], [3.0, 4.0]], dtype=torch.float64))
    assert optimizer.state["square_sum"].tolist() == [pytest.approx(169), 0]


SOME_ROWS = st.lists(st.integers(0, NUM_ROWS - 1), max_size=NUM_ROWS)
RATE = st.floats(0.0, 0.5)
STEPS = st.lists(st.tuples(st.none() | SOME_ROWS, RATE, st.none() | SOME_ROWS), max_size=20)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(steps=STEPS)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_order_of_steps_and_reads_equals_the_twin(kind, decay, steps):
    """A step on some or all rows, then a read of some (with repeats) or all, at a rate that varies."""
    settings = OptimizerSettings(weight_decay=decay)
    table, twin = table_of(random_rows()), Twin(kind, random_rows(), settings)
    optimizer = row_optimizer(kind, table, settings)
    for seed, (used, rate, read) in enumerate(steps):
        used = None if used is None else sorted(set(used))
        gradient = random_rows(NUM_ROWS if used is None else len(used), seed)
        optimizer.step(None if used is None else rows(*used), gradient, rate)
        twin.step(range(NUM_ROWS) if used is None else used, gradient, rate)
        if read is None:
            torch.testing.assert_close(table.rows_in_use(), twin.rows(), **EXACT)
        else:
            torch.testing.assert_close(table.read(rows(*read)), twin.rows()[read], **EXACT)
    torch.testing.assert_close(table.rows_in_use(), twin.rows(), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_used_does_not_change(kind):
    table = table_of(random_rows())
    optimizer = row_optimizer(kind, table, OptimizerSettings())
    optimizer.step(None, random_rows(seed=1), 0.1)
    before = {name: tensor.clone() for name, tensor in {"rows": table.rows, **optimizer.state}.items()}
    optimizer.step(rows(1, 4), random_rows(2), 0.1)
    after = {"rows": table.rows, **optimizer.state}
    for name, tensor in after.items():
        changed = (tensor != before[name]).reshape(NUM_ROWS, -1).any(1)
        assert changed.nonzero()[:, 0].tolist() == [1, 4], name


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_rows_only_decays(kind):
    table = table_of(random_rows())
    optimizer = row_optimizer(kind, table, OptimizerSettings(weight_decay=0.5))
    optimizer.step(rows(), random_rows(0), 0.1)
    torch.testing.assert_close(table.rows_in_use(), 0.95 * random_rows(), **EXACT)
    assert all(not tensor.any() for tensor in optimizer.state.values())


class _LargestResult(TorchDispatchMode):
    """Notes how many values the largest new tensor has."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and not function._schema.is_mutable:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_few_rows_of_many_makes_only_small_tensors(kind, dtype):
    table = table_of(random_rows(1000), dtype)
    optimizer = row_optimizer(kind, table, OptimizerSettings(weight_decay=0.1))
    with _LargestResult() as results:
        for used in (rows(1, 4), rows(4, 999)):
            optimizer.step(used, random_rows(2).float(), 0.1)
            table.read(rows(1, 1, 7))
    assert results.largest == 3 * WIDTH


# State


@pytest.mark.parametrize(
    ("rows_dtype", "dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_state_has_an_entry_per_row(rows_dtype, dtype):
    expected = {
        "adam": {
            "mean": (dtype, (NUM_ROWS, WIDTH)),
            "mean_square": (dtype, (NUM_ROWS, WIDTH)),
            "steps": (torch.int64, (NUM_ROWS,)),
        },
        "adagrad": {"square_sum": (dtype, (NUM_ROWS,))},
        "sgd": {},
    }
    for kind in KINDS:
        table = table_of(random_rows(), rows_dtype)
        optimizer = row_optimizer(kind, table, OptimizerSettings(weight_decay=0.1))
        for used in (None, rows(2, 3)):
            gradient = random_rows(NUM_ROWS if used is None else 2)
            optimizer.step(used, gradient.to(table.compute_dtype), 0.1)
            state = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in optimizer.state.items()}
            assert state == expected[kind]
            assert table.rows_in_use().dtype == rows_dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_saved_rows_and_state_equals_uninterrupted(kind, dtype):
    settings = OptimizerSettings(weight_decay=0.1)

    def train(table, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)  # for rounding
            used = rows(step % NUM_ROWS) if step % 4 else rows(0, 2, 5)
            optimizer.step(used, random_rows(len(used), step).to(table.compute_dtype), 0.01 * step)
            table.read(rows(step % 3))

    table = table_of(random_rows(), dtype)
    optimizer = row_optimizer(kind, table, settings)
    train(table, optimizer, range(1, 10))

    resumed_table = table_of(table.rows_in_use(), dtype)
    resumed = row_optimizer(kind, resumed_table, settings)
    for name, tensor in optimizer.state.items():
        resumed.state[name].copy_(tensor)

    train(table, optimizer, range(10, 30))
    train(resumed_table, resumed, range(10, 30))
    torch.manual_seed(30)
    expected = table.rows_in_use()
    torch.manual_seed(30)
    assert torch.equal(resumed_table.rows_in_use(), expected)


# bfloat16 rows: right on average


def many_weights(value, num_rows=100):
    """A table of 100 x num_rows equal weights in bfloat16."""
    return table_of(torch.full((num_rows, 100), value), torch.bfloat16)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_goes_to_both_neighbours_with_the_right_probability(sign, dense):
    torch.manual_seed(0)
    table = many_weights(sign)
    gap = 2**-7  # from 1 to the next number in bfloat16
    gradient = torch.full((100, 100), -sign * 0.3 * gap)
    row_optimizer("sgd", table, OptimizerSettings()).step(
        None if dense else torch.arange(100), gradient, learning_rate=1.0
    )
    assert set(table.rows.unique().tolist()) == {sign, sign * (1 + gap)}
    share = (table.rows != sign).float().mean()
    assert share == pytest.approx(0.3, abs=0.03)  # some six standard deviations


@pytest.mark.parametrize("dense", [True, False])
def test_what_bfloat16_can_represent_is_exact(dense):
    numbers = torch.tensor([[0.0, 1.0, -3.140625, 1e-30, 3e38, torch.inf]]).bfloat16().expand(50, 6)
    table = table_of(numbers, torch.bfloat16)
    optimizer = row_optimizer("sgd", table, OptimizerSettings())
    used = None if dense else torch.arange(50)
    optimizer.step(used, torch.zeros(50, 6), 0.1)
    assert torch.equal(table.rows, numbers)
    optimizer.step(used, torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0, 0.0]).expand(50, 6), 0.5)
    assert table.rows[:, 1].tolist() == [0.0] * 50


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])  # as processors and CUDA write it
def test_rounding_does_not_hide_a_nan(bits):
    nan = torch.full((100, WIDTH), bits, dtype=torch.int32).view(torch.float32)
    table = table_of(torch.zeros(100, WIDTH), torch.bfloat16)
    row_optimizer("sgd", table, OptimizerSettings()).step(None, nan, 1.0)
    assert table.rows.isnan().all()


def test_steps_smaller_than_the_gap_add_up():
    torch.manual_seed(0)
    step = 1e-4
    nearest = torch.tensor(1.0).bfloat16()
    assert (nearest.float() - step).bfloat16() == nearest  # rounded to the nearest, nothing ever moves
    table = many_weights(1.0, 10)
    optimizer = row_optimizer("sgd", table, OptimizerSettings())
    for _ in range(1000):
        optimizer.step(torch.arange(10), torch.full((10, 100), 1.0), step)
    assert table.rows.float().mean() == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("used", [(0,), (0, 1, 2, 3), None])
def test_decay_smaller_than_the_gap_adds_up(used):
    """Whether rows are only read in each step, or updated too."""
    torch.manual_seed(0)
    table = many_weights(1.0, 4)
    optimizer = row_optimizer("sgd", table, OptimizerSettings(weight_decay=0.1))
    for _ in range(1000):
        selected = None if used is None else rows(*used)
        optimizer.step(selected, torch.zeros(len(used or range(4)), 100), 1e-3)
        table.read(rows(1, 2, 3))
    assert table.rows_in_use()[1:].float().mean() == pytest.approx((1 - 1e-4) ** 1000, abs=0.01)
