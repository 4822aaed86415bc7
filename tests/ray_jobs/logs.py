"""Small logs, and what `recgpt prepare` has to make of them."""

import random

import numpy as np
import pyarrow as pa

from recgpt import storage
from recgpt.data.dataset import HistoryDataset

HEADER = "user_id,item_id,timestamp\n"


def csv_of(rows):
    return HEADER + "".join(f"{user},{item},{time}\n" for user, item, time in rows)


def histories_by_user(url):
    """{user id: [(item id, time), ...]}, or items alone without times; also checks what is stored twice."""
    dataset = HistoryDataset.open(str(url))
    manifest = dataset.manifest
    vocabulary = dataset.vocabulary()
    tables = [dataset.read_row_group(group) for group in dataset.row_groups]
    rows = pa.concat_tables(tables).to_pylist()
    assert [group.rows for group in dataset.row_groups] == [len(table) for table in tables]
    assert [storage.checksum(file) for file in dataset.files] == [file.sha256 for file in manifest.files]
    assert sum(file.interactions for file in manifest.files) == manifest.num_interactions
    assert [row["user_hash"] for row in rows] == sorted(row["user_hash"] for row in rows)
    counts = np.bincount([i for row in rows for i in row["item_indices"]], minlength=manifest.num_items + 1)
    assert counts[1:].tolist() == vocabulary.counts.tolist()
    assert counts.min() == counts[0] == 0 < counts[1:].min()
    result = {}
    for row in rows:
        items = vocabulary.decode(np.array(row["item_indices"])).to_pylist()
        times = row.get("timestamps")
        result[row["user_id"]] = items if times is None else list(zip(items, times, strict=True))
    assert len(result) == manifest.num_users
    return result


def reference(log, min_user=1, min_item=1):
    """The definition, in plain Python: distinct interactions in order, rare ones removed to a fixed point."""
    left = {(u, i, t) for u, i, t in log if None not in (u, i, t)}
    while True:
        users = [u for u, _, _ in left]
        items = [i for _, i, _ in left]
        kept = {r for r in left if users.count(r[0]) >= min_user and items.count(r[1]) >= min_item}
        if kept == left:
            break
        left = kept
    by_user = {}
    for user, item, time in sorted(left, key=lambda row: (row[2], row[1])):
        by_user.setdefault(user, []).append((item, time))
    return by_user


def log_table(log):
    users, items, times = zip(*log, strict=True)
    return pa.table({"user_id": users, "item_id": items, "timestamp": times})


def random_log(seed, rows=600):
    """String ids, many ties in time, some duplicates and missing values."""
    generator = random.Random(seed)
    log = []
    for _ in range(rows):
        user, item = f"user {generator.randrange(60)}", f"item-{int(generator.paretovariate(0.6)) % 80}"
        row = [user, item, generator.randrange(25)]
        if generator.random() < 0.02:
            row[generator.randrange(3)] = None
        log.append(tuple(row))
    return log
