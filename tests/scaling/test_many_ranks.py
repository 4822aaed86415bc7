"""What ranks do at 1,024 of them, and at odd numbers: the real code, each rank a thread of this process."""

import itertools
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from recgpt import storage
from recgpt.config import LossSettings, SplitSettings, TrainSettings
from recgpt.data.arrow import make_lists, offsets_of
from recgpt.data.packing import empty_step, lane_steps
from recgpt.data.plan import epoch_units, read_unit
from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import ShardedItemTable
from recgpt.distributed.sharded_table import ShardedTable, row_range
from recgpt.model.item_table import ItemTable
from recgpt.model.losses import full_cross_entropy_reference
from recgpt.schema import ITEM_INDICES, USER_HASH
from recgpt.training import checkpoint
from recgpt.training.validation import Validator

WORLD_SIZES = (1024, 1000, 37)
CPU = torch.device("cpu")


class Ranks:
    """Stands in for torch.distributed in ``collectives``: ranks are threads that meet at a barrier.

    One computes at a time, until it waits for the others: a thousand that want the interpreter are slow.
    A rank that gets another number of rows than it expects, or that does not come, fails all of them.
    """

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, world_size):
        self.world_size = world_size
        self._here = threading.local()
        self._turn = threading.Lock()
        self._barrier = threading.Barrier(world_size, timeout=120)
        self._given = [None] * world_size
        self._combined = None

    def run(self, work):
        """What ``work(rank)`` returns on each rank."""
        results, problems = [None] * self.world_size, []

        def be(rank):
            self._here.rank = rank
            try:
                with self._turn:
                    results[rank] = work(rank)
            except BaseException as problem:
                problems.append(problem)
                self._barrier.abort()

        threads = [threading.Thread(target=be, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for problem in problems:
            if not isinstance(problem, threading.BrokenBarrierError):
                raise problem
        assert not problems, "a rank waited in vain"
        return results

    def is_initialized(self):
        return True

    def get_rank(self):
        return self._here.rank

    def get_world_size(self):
        return self.world_size

    def barrier(self, group=None):
        self._meet()

    def _meet(self):
        """Until all ranks are here; true on one of them."""
        self._turn.release()
        try:
            return self._barrier.wait() == 0
        finally:
            self._turn.acquire()

    def _exchange(self, value, combine):
        """What one rank combines from what all have given."""
        self._given[self.get_rank()] = value
        if self._meet():
            self._combined = combine(self._given)
        self._meet()
        return self._combined

    def all_reduce(self, tensor, operation):
        def reduce(given):
            stacked = torch.stack(given)
            return stacked.sum(0) if operation == self.ReduceOp.SUM else stacked.amax(0)

        tensor.copy_(self._exchange(tensor, reduce))

    def all_gather_into_tensor(self, gathered, tensor):
        gathered.copy_(self._exchange(tensor, torch.cat))

    def all_gather_object(self, values, value, group=None):
        values[:] = self._exchange(value, list)

    def all_to_all_single(self, received, rows, receive_sizes=None, send_sizes=None):
        even = [len(rows) // self.world_size] * self.world_size

        def deliver(given):
            sent = torch.tensor([sizes for _, sizes in given])  # [from, to]
            receiver = torch.arange(self.world_size).repeat(self.world_size).repeat_interleave(sent.flatten())
            by_receiver = torch.cat([rows for rows, _ in given])[receiver.argsort(stable=True)]
            return sent, by_receiver.split(sent.sum(0).tolist())

        sent, delivered = self._exchange((rows, send_sizes or even), deliver)
        mine = self.get_rank()
        assert sent[:, mine].tolist() == (receive_sizes or even), "sent and expected differ"
        received.copy_(delivered[mine])


@pytest.fixture
def as_ranks(monkeypatch):
    """Runs ``work(rank)`` on so many ranks."""

    def run(world_size, work):
        ranks = Ranks(world_size)
        monkeypatch.setattr(collectives, "dist", ranks)
        return ranks.run(work)

    return run


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_rows", [2048, 12_102, 1_000_000_001])
def test_every_row_has_one_owner_and_all_have_as_many(world_size, num_rows):
    ranges = [row_range(num_rows, rank, world_size) for rank in range(world_size)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    sizes = {end - first for first, end in ranges}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_owner_of_a_row_has_it(as_ranks, world_size):
    num_rows = 5003
    tables = as_ranks(world_size, lambda rank: ShardedTable(num_rows, 1, seed=0, device=CPU))
    owned = torch.cat([torch.full((table.end - table.first,), rank) for rank, table in enumerate(tables)])
    for table in (tables[0], tables[-1]):
        assert torch.equal(table.owner(torch.arange(num_rows)), owned)
    local = torch.stack([table.local_rows(torch.arange(num_rows)) >= 0 for table in tables])
    assert (local.sum(0) == 1).all()


@pytest.mark.parametrize("world_size", [1024, 37])
def test_a_step_gives_what_one_rank_would(as_ranks, world_size):
    """Lookup, loss over all items, their gradients; some ranks have nothing, as at the end of an epoch."""
    num_items, width = 2 * world_size + 5, 2
    loss, counts = LossSettings(kind="full", block_items=2), torch.ones(num_items + 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(1, num_items + 1, (0 if rank % 3 == 2 else 2,), generator=generator)
        for rank in range(world_size)
    ]
    targets = [(own % num_items) + 1 for own in ids]
    plain = ItemTable(num_items, width, seed=0, loss=loss, count_R=counts).double()

    def step(rank):
        table = ShardedItemTable(num_items, width, 0, loss, counts, CPU, torch.float64)
        table.rows = plain.weight.detach()[table.first : table.end].clone()
        vectors = table(ids[rank])
        loss_sum = table.loss_sum(vectors, targets[rank])
        loss_sum.backward()
        return vectors.detach(), loss_sum.detach(), table.take_gradient()

    results = as_ranks(world_size, step)
    vectors = plain.vectors()
    expected = full_cross_entropy_reference(vectors[torch.cat(ids)], vectors, torch.cat(targets))
    expected.backward()
    assert torch.equal(torch.cat([found for found, _, _ in results]), vectors[torch.cat(ids)])
    torch.testing.assert_close(sum(found for _, found, _ in results), expected)
    gradient = torch.cat([rows_gradient for _, _, (rows, rows_gradient) in results if rows is None])
    torch.testing.assert_close(gradient * world_size, plain.weight.grad)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_draws_are_shared_out(as_ranks, world_size):
    def share(rank):
        loss, counts = LossSettings(kind="sampled"), torch.ones(3001, dtype=torch.int64)
        table = ShardedItemTable(3000, 1, 0, loss, counts, CPU)
        return table._share(8192), table._share(10)

    shares = as_ranks(world_size, share)
    many = [each for each, _ in shares]
    assert sum(many) == 8192
    assert max(many) - min(many) <= 1
    assert min(few for _, few in shares) == 1, "fewer draws than ranks: one each"


LANES, ROW_COUNTS, WINDOW = 1024, (700, 500, 900, 400, 600), 1000
NUM_USERS = sum(ROW_COUNTS)


def units_of(world_size, rank, consumed, lanes=LANES):
    mine = list(range(lanes))[rank::world_size]  # as the trainer deals them out
    return mine, epoch_units(ROW_COUNTS, mine, lanes, WINDOW, shuffle=(5, 0), consumed=consumed)


def places(units):
    """(window, place in it) of each user of some units."""
    return [(unit.shuffle_key, place) for unit in units for place in range(unit.start, unit.end)]


def users_of_all_ranks(world_size, consumed):
    return [place for rank in range(world_size) for place in places(units_of(world_size, rank, consumed)[1])]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_user_is_read_by_one_rank(world_size):
    users = users_of_all_ranks(world_size, [0] * LANES)
    assert len(users) == len(set(users)) == NUM_USERS


@pytest.mark.parametrize(("before", "after"), [(1024, 37), (1000, 1024), (37, 1000)])
def test_a_resume_on_another_number_of_ranks_reads_the_other_users(before, after):
    lengths = np.diff([lane * NUM_USERS // LANES for lane in range(LANES + 1)])
    consumed = np.random.default_rng(0).integers(0, lengths + 1).tolist()
    read = []
    for rank in range(before):
        lanes, units = units_of(before, rank, [0] * LANES)
        for lane in lanes:
            read += places([unit for unit in units if unit.lane == lane])[: consumed[lane]]
    left = users_of_all_ranks(after, consumed)
    assert len(read) == sum(consumed)
    assert not set(read) & set(left)
    assert set(read) | set(left) == set(users_of_all_ranks(1, [0] * LANES))


class InMemory:
    """Row groups of a dataset whose user u has the items u + 1, u + 2, ...: 3 to 6 of them."""

    def __init__(self):
        self.row_groups = list(range(len(ROW_COUNTS)))
        self.num_users = NUM_USERS
        self._first = offsets_of(np.array(ROW_COUNTS))

    def read_row_group(self, group, columns=None):
        users = np.arange(self._first[group], self._first[group + 1])
        lengths = 3 + users % 4
        offsets = offsets_of(lengths)
        items = np.repeat(users + 1 - offsets[:-1], lengths) + np.arange(offsets[-1])
        lists = make_lists(items.astype(np.int32), offsets)
        return pa.table({USER_HASH: pa.array(users), ITEM_INDICES: lists})


def steps_of_all_ranks(world_size):
    """Of each step the users of all ranks, in any order, and how many lanes each rank has."""
    dataset, by_rank = InMemory(), []
    for rank in range(world_size):
        lanes, units = units_of(world_size, rank, [0] * LANES)
        tables = (read_unit(dataset, unit, SplitSettings(), None) for unit in units)
        by_rank.append(list(lane_steps(tables, lanes, budget=4, max_history=50)))
    longest = max(map(len, by_rank))
    nothing = empty_step([])
    return [
        Counter(
            user
            for steps in by_rank
            for user in (steps[number] if number < len(steps) else nothing).batch.user_hash_B.tolist()
        )
        for number in range(longest)
    ]


def test_steps_do_not_depend_on_the_number_of_ranks():
    first, *others = map(steps_of_all_ranks, (1, 1024, 37))
    assert all(steps == first for steps in others)
    trained = sum(first, Counter())
    with_target = {user for user in range(NUM_USERS) if (3 + user % 4) - 2 >= 2}
    assert trained == Counter(with_target)


def test_a_checkpoint_of_1024_ranks_is_read_by_37(as_ranks, tmp_path, monkeypatch):
    num_rows = 1500
    rows = torch.arange(num_rows, dtype=torch.float32)[:, None]
    monkeypatch.setattr(checkpoint, "ROWS_PER_FILE", 1)  # some ranks write one file, some two
    write_bytes = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda url, data, durable=False: write_bytes(url, data))
    name = checkpoint.checkpoint_name(7, 1)

    def write(rank):
        first, end = row_range(num_rows, rank, 1024)
        tables = {"item_table": checkpoint.TableRows(num_rows, first, {"rows": rows[first:end]})}
        state = {"step": 7}
        snapshot = checkpoint.Snapshot(name, state, {"weight": torch.ones(2)}, {}, tables)
        return checkpoint.write(str(tmp_path), snapshot)

    manifests = as_ranks(1024, write)
    assert all(manifest == manifests[0] for manifest in manifests)
    assert checkpoint.finished(str(tmp_path)) == [name]

    def read(rank):
        first, end = row_range(num_rows, rank, 37)
        part = {"rows": torch.empty(end - first, 1)}
        checkpoint.load_table_into(str(tmp_path), name, "item_table", first, part)
        return part["rows"]

    assert torch.equal(torch.cat(as_ranks(37, read)), rows)
    assert as_ranks(37, lambda rank: checkpoint.newest_whole(str(tmp_path), pytest.fail)) == [name] * 37


@pytest.mark.parametrize("world_size", [1024, 37])
def test_every_user_is_validated_on_one_rank_also_where_ranks_have_none(as_ranks, world_size):
    dataset = InMemory()

    def validate(rank):
        validator = Validator(dataset, TrainSettings(), None, CPU)
        batches = list(validator._same_number_everywhere())
        users = np.concatenate([histories.user_hash for histories, _ in batches])
        return validator.num_users(), len(batches), users.tolist()

    results = as_ranks(world_size, validate)
    assert {number for number, _, _ in results} == {NUM_USERS}
    assert len({batches for _, batches, _ in results}) == 1
    assert sorted(user for _, _, users in results for user in users) == list(range(NUM_USERS))
