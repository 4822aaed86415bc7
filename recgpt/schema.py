"""Names and constants that more than one part of the system relies on, each stated once."""

# Interactions: one row per event, in the columns every reader delivers.
USER_ID = "user_id"  # int64 or string, as in the log
ITEM_ID = "item_id"  # int64 or string, as in the log
TIMESTAMP = "timestamp"  # int64; its unit stands in the manifest

# Vocabulary: one row per item.
ITEM_INDEX = "item_index"  # int32, 1..num_items
COUNT = "count"  # int64, interactions of the item in the prepared dataset

# Histories: one row per user.
USER_HASH = "user_hash"  # int64, stable 64-bit hash of the user id
ITEM_INDICES = "item_indices"  # list<int32>, in time order
TIMESTAMPS = "timestamps"  # list<int64>, parallel to item_indices
TARGET = "target"  # int32, the held-out item of a split

# Candidates: one row per user.
ITEM_IDS = "item_ids"  # list of the log's own item ids
SCORES = "scores"  # list<float>
STEPS = "steps"  # list<int8>, the recall step (1, 2, ...) that found each item
POPULARITY_STEP = 0  # for users without a history, to whom recall gives the most popular items

# Item indices and segments.
PADDING_INDEX = 0  # never an item, never scored
SEGMENT_REAL = 0  # an item that the user really chose
SEGMENT_GENERATED = 1  # an item that the model generated
UNKNOWN_USER = 0  # row of the user table for users that the model does not know

# Files of a dataset, an exported model and a candidates folder.
DATASET_SCHEMA_VERSION = 1
MODEL_SCHEMA_VERSION = 3
CANDIDATES_SCHEMA_VERSION = 1
INDEX_SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"  # written last: a folder without it is not finished
VOCABULARY_FILE = "vocabulary.parquet"
HISTORIES_FOLDER = "histories"
QUARANTINE_FOLDER = "quarantine"
REPORT_FILE = "report.html"
# Beside candidates: readers of Parquet folders skip names that begin with an underscore.
CANDIDATES_MANIFEST_FILE = "_manifest.json"
SUCCESS_FILE = "_SUCCESS"  # written last of all
