"""The yardstick: DuckDB turns a log in Parquet into a vocabulary and one history per user.

    python -m benchmarks.yardsticks.duckdb_prepare --input LOG --output FOLDER --json FILE

Writes vocabulary.parquet and histories/, with the columns that ``recgpt prepare`` gives them. Runs in an
environment of its own, which has DuckDB and knows nothing of RecGPT.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import duckdb

from recgpt.peak_memory import peak_memory

# Of the ways that were tried this one took the least time and memory: time and item in one number. Sorted
# lists of structs take half as long again, list(... ORDER BY ...) takes twice as long.
# An item's index follows from its id, so that equal times stand by item id. Times are not negative.
SQL = """
CREATE VIEW log AS
    SELECT user_id, item_id, "timestamp" FROM read_parquet({input})
    WHERE user_id IS NOT NULL AND item_id IS NOT NULL AND "timestamp" IS NOT NULL;

CREATE TABLE items AS
    SELECT item_id, (row_number() OVER (ORDER BY item_id))::INTEGER AS item_index
    FROM (SELECT DISTINCT item_id FROM log);

CREATE TABLE histories AS
    SELECT user_id,
        [(step & 4294967295)::INTEGER FOR step IN steps] AS item_indices,
        [(step >> 32)::BIGINT FOR step IN steps] AS timestamps
    FROM (
        SELECT user_id, list_sort(list_distinct(list(("timestamp"::HUGEINT << 32) + item_index))) AS steps
        FROM log JOIN items USING (item_id)
        GROUP BY user_id
    );

CREATE TABLE counts AS
    SELECT item_index, count(*) AS count
    FROM (SELECT unnest(item_indices) AS item_index FROM histories)
    GROUP BY item_index;

COPY (SELECT item_id, item_index, count FROM items JOIN counts USING (item_index) ORDER BY item_index)
    TO {vocabulary} (FORMAT parquet, COMPRESSION zstd);

COPY histories TO {histories} (FORMAT parquet, COMPRESSION zstd, PER_THREAD_OUTPUT true);
"""


def prepare(log: Path, output: Path, threads: int, memory_limit: str) -> dict[str, Any]:
    """Numbers of users, items and interactions, seconds, and the most bytes that were resident.

    Args:
        log: folder of Parquet files.
        output: folder to write; does not exist yet.
        memory_limit: as DuckDB understands it, such as 6GB. What does not fit goes to disk beside the output.
    """
    started = time.perf_counter()
    output.mkdir(parents=True)
    settings = {
        "threads": threads,
        "memory_limit": memory_limit,
        "temp_directory": str(output.with_name(f"{output.name}.temporary")),
        "preserve_insertion_order": False,
    }
    paths = {
        "input": log / "*.parquet",
        "vocabulary": output / "vocabulary.parquet",
        "histories": output / "histories",
    }
    database = duckdb.connect(config=settings)
    database.execute(SQL.format_map({name: _quoted(path) for name, path in paths.items()}))
    numbers = "count(*), (SELECT count(*) FROM items), sum(len(item_indices))::BIGINT"
    users, items, interactions = database.execute(f"SELECT {numbers} FROM histories").fetchall()[0]
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_memory(),
        "version": duckdb.__version__,
    }


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare a log with DuckDB.")
    parser.add_argument("--input", type=Path, required=True, help="Folder of Parquet files.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", default="6GB", help="As DuckDB understands it.")
    parser.add_argument("--json", type=Path, help="File to write the result to.")
    arguments = parser.parse_args()
    result = prepare(arguments.input, arguments.output, arguments.threads, arguments.memory_limit)
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
