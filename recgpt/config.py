"""Settings: dataclasses that state unit and scope of every field, checked when they are built.

"global" means over all workers together, "per rank" means for each worker.
"""

from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Stage = Literal["pretrain", "prompt_tune"]
Continuation = Literal["mean", "best", "sampled", "beam"]
STAGES = get_args(Stage)  # in the order in which they run

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(config=_STRICT)
class SplitSettings:
    """How histories are divided into training, validation and test."""

    protocol: Literal["leave_one_out", "time"] = "leave_one_out"
    """`leave_one_out`: the last item of a user is test, the one before validation. `time`: two instants."""
    valid_from: int | None = None
    """Protocol `time`: where validation begins, in the log's unit. None: after 80 % of interactions."""
    test_from: int | None = None
    """Protocol `time`: where test begins, in the log's unit. None: after 90 % of interactions."""


@dataclass(config=_STRICT)
class UserSettings:
    """The user module: a vector per user at every position."""

    kind: Literal["none", "hashed", "table"] = "none"
    """`none`: the model is not personal. `hashed`: users share `buckets` rows by a hash of their id.
    `table`: a row for each user of the dataset, sharded over the ranks like the item table."""
    combine: Literal["add", "gate"] = "add"
    """`add`: the user's vector is added to each item's. `gate`: as much of each of its values as a layer
    decides that looks at the item's vector and the user's."""
    buckets: Positive = 4096
    """Kind `hashed`: rows of the user table (global)."""
    dropout: Rate = 0.5
    """Share of training histories shown without their user (row 0), so that the model does not lean on it."""


@dataclass(config=_STRICT)
class ModelSettings:
    """The GPT."""

    width: Positive = 128
    """Size of the hidden state, and of the item vectors, of each member."""
    layers: Positive = 2
    """Number of transformer blocks."""
    heads: Positive = 2
    """Attention heads of each member; must divide `width`."""
    members: Positive = 6
    """Models like this side by side, each with a loss of its own; their mean score counts. They err
    differently, and together less. Work and memory grow with them: item vectors are as wide as all of them
    together."""
    max_history: Annotated[int, Field(ge=2)] = 50
    """Longest input, in items per user, generated ones included; older items are cut off."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How an interest vector scores an item: `cosine` over `temperature`, so that rare items, whose vectors
    stay short, are not behind; or `dot`, their dot product."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Similarity `cosine`: what it is divided by; the lower, the sharper."""
    dropout: Rate = 0.45
    """Dropout on the input vectors and after each attention and feed-forward part; less for large logs."""
    user: UserSettings = Field(default_factory=UserSettings)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")

    @property
    def vector_width(self) -> int:
        """D, the size of the item vectors: those of the members end to end."""
        return self.members * self.width


@dataclass(config=_STRICT)
class ItemTableSettings:
    """The item table: rows of item vectors, input and (tied) output of the model."""

    placement: Literal["auto", "replicated", "sharded"] = "auto"
    """`replicated`: whole on every rank, its state under ZeRO. `sharded`: rows split over the ranks.
    `auto`: sharded from `sharded_from_items` items on."""
    sharded_from_items: Positive = 100_000
    """Number of items (global) from which `auto` means `sharded`."""
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    """Of sharded tables. `adam`: two values of state per weight. `adagrad`: one per row. `sgd`: none."""
    row_dtype: Literal["float32", "bfloat16"] = "float32"
    """How a sharded table keeps and sends its rows; optimizer state is float32 always."""


@dataclass(config=_STRICT)
class LossSettings:
    """What the interest vectors are trained for."""

    kind: Literal["auto", "full", "sampled", "binary"] = "auto"
    """`full`: cross-entropy over all items. `sampled`: over drawn items, with logQ correction. `binary`: of
    the target against `negatives_per_target` drawn items. `auto`: full below `sampled_from_items` items."""
    sampled_from_items: Positive = 100_000
    """Number of items (global) from which `auto` means `sampled`."""
    block_items: Positive = 1024
    """Items scored at a time (per rank): bounds the loss's memory at targets x block."""
    negatives: Positive = 8192
    """`sampled`: items drawn for all targets of a micro-batch together (global)."""
    popularity_share: Rate = 0.5
    """`sampled`: share of `negatives` drawn by popularity; the rest is drawn uniformly."""
    popularity_power: Annotated[float, Field(ge=0)] = 0.75
    """`sampled`: by popularity means in proportion to an item's count to this power."""
    in_batch: bool = True
    """`sampled`: the targets of the micro-batch are negatives of each other too."""
    negatives_per_target: Positive = 1
    """`binary`: items drawn uniformly for each target."""
    calibration: Rate = 0.0
    """`binary`: t of gBCE (Petrov & Macdonald 2023, arXiv 2308.07192); 0 is plain binary cross-entropy."""


@dataclass(config=_STRICT)
class OptimizerSettings:
    """AdamW for the GPT and a replicated item table; learning rates and decay for every table."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Peak learning rate."""
    table_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of sharded tables. None: as `learning_rate`."""
    warmup_steps: NotNegative = 100
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "linear"] = "linear"
    """After the warm-up the rate stays, or falls to 0 in a line over the stage's `max_epochs`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay per step, times the learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the running mean of squared gradients."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient, over the GPT and all tables together (global). None: no limit."""

    def __post_init__(self) -> None:
        rate = max(self.learning_rate, self.table_learning_rate or 0.0)
        if rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay={self.weight_decay:g} times the learning rate {rate:g} is not below 1: "
                "a step would take away whole weights"
            )


@dataclass(config=_STRICT)
class DataSettings:
    """Batches and their order."""

    tokens_per_batch: Positive = 2048
    """Most real inputs in a step (global: the sum over all ranks); a history of n items gives n - 1."""
    lanes: Positive = 4
    """Independent streams of histories (global), dealt out to the ranks; best a multiple of the workers, at
    least their number. The batches depend on the lanes, not on the number of workers."""
    micro_batches: Positive = 1
    """Parts that each rank computes its share of a step in, one after the other: less memory, same step."""
    shuffle_window_users: Positive = 65_536
    """Users that are shuffled together in memory (per lane)."""
    split: SplitSettings = Field(default_factory=SplitSettings)


@dataclass(config=_STRICT)
class ValidationSettings:
    """What is measured on the validation split after each epoch, and what follows from it."""

    metric: Literal["ndcg@5", "ndcg@10", "ndcg@20", "hit_rate@5", "hit_rate@10", "hit_rate@20"] = "ndcg@10"
    """The metric that chooses the best checkpoint and stops early."""
    every_epochs: Positive = 1
    """Epochs between two validations."""
    max_users: Positive = 50_000
    """Users drawn for validation (global, about); those of them with a target are measured."""


@dataclass(config=_STRICT)
class StageSettings:
    """One training stage."""

    max_epochs: Positive = 32
    """Epochs at most."""
    patience: Positive = 10
    """Validations without a new best after which the stage ends."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)


@dataclass(config=_STRICT)
class PromptSettings:
    """Prompt-tuning: where generated items (segment 1) stand in a training history."""

    interleaved_share: Rate = 0.5
    """Share of histories in which each real item is followed by one generated item."""
    last_share: Rate = 0.25
    """Share of histories whose last `last_items` inputs are replaced by generated ones; the rest is plain."""
    last_items: Positive = 1
    """How many inputs the `last` placement replaces."""
    train_from_rank: Positive | None = 1
    """`interleaved`: a generated item is trained for the item that the user chose in its place, where the
    model ranks that no better than this: what a step of recall is asked for once the steps before have taken
    the better ones. And one follows the last real item, too. None: a generated item has no target."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """A generated item is drawn in proportion to exp(score / `temperature`). 0: it is the best one."""
    allow_seen: bool = False
    """True: an item that is in the history already may be generated."""
    pool_items: Positive | None = None
    """A generated item is one of this many items, drawn like negatives (global). None: of all items."""


@dataclass(config=_STRICT)
class RecallSettings:
    """Autoregressive recall at generation and evaluation; travels with the exported model."""

    k: Positive = 20
    """Candidates per user."""
    quotas: tuple[Positive, ...] = (18, 2)
    """Candidates taken by each recall step; their sum is `k`."""
    batch_users: Positive = 256
    """Users in a batch (per actor)."""
    block_items: Positive = 16_384
    """Items scored at a time (per actor)."""
    keep_seen: bool = False
    """True: items of the history may be candidates again."""
    continuation: Continuation = "mean"
    """What a step appends to the history: the `mean` of its new items, weighted by exp(score /
    `temperature`), the `best` of them, one `sampled` with these weights, or, `beam`, the `beam_width` best,
    as so many continuations."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """Continuations `mean` and `sampled`: the higher, the more even."""
    beam_width: Positive = 4
    """Continuation `beam`: continuations kept of each user."""

    def __post_init__(self) -> None:
        if sum(self.quotas) != self.k:
            raise ValueError(f"quotas {list(self.quotas)} sum to {sum(self.quotas)}, not to k={self.k}")


@dataclass(config=_STRICT)
class TrainSettings:
    """Everything that `recgpt train` can be told."""

    seed: NotNegative = 0
    """Seed of weights, order and dropout."""
    workers: Positive = 1
    """Number of training processes (global)."""
    min_workers: Positive | None = None
    """With fewer than `workers`, but so many, the run goes on too while machines are missing (global)."""
    threads_per_worker: Positive = 1
    """CPU threads of each worker (per rank)."""
    stages: tuple[Stage, ...] = ("pretrain", "prompt_tune")
    """Stages to run. A run that has finished one can be gone on with for the next."""
    deepspeed: str = "zero1"
    """Name of a file in deepspeed_configs/ without .json, or a path to one."""
    checkpoint_every_steps: Positive = 1000
    """Optimizer steps between two checkpoints; one is also written after each epoch."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept, besides the best one."""
    checkpoint_in_background: bool = True
    """Train on while a checkpoint is written, which takes a second copy of a rank's part of the tables and
    their optimizer state in host memory meanwhile (per rank)."""
    max_failures: NotNegative = 3
    """How often lost workers are replaced, and training goes on from the newest checkpoint (global)."""
    collective_timeout_seconds: Positive = 600
    """Seconds that a rank waits for the others at a step before it takes them for lost (per rank)."""
    not_finite: Literal["stop", "skip"] = "stop"
    """At a step whose loss or gradient is NaN or infinite: stop the run, or leave the step out. After ten
    such steps in a row the run is stopped either way."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Who is told of the run's figures besides metrics.jsonl and TensorBoard: Weights & Biases, MLflow."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    item_table: ItemTableSettings = Field(default_factory=ItemTableSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    pretrain: StageSettings = Field(default_factory=StageSettings)
    prompt_tune: StageSettings = Field(
        default_factory=lambda: StageSettings(
            max_epochs=8, patience=4, optimizer=OptimizerSettings(learning_rate=5e-4)
        )
    )
    prompts: PromptSettings = Field(default_factory=PromptSettings)
    validation: ValidationSettings = Field(default_factory=ValidationSettings)
    recall: RecallSettings = Field(default_factory=RecallSettings)

    @property
    def fewest_workers(self) -> int:
        """With which a run goes on where machines are missing."""
        return self.min_workers or self.workers

    def __post_init__(self) -> None:
        if self.data.lanes < self.workers:
            raise ValueError(f"data.lanes={self.data.lanes} is less than workers={self.workers}")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        if list(self.stages) not in (["pretrain"], ["prompt_tune"], list(STAGES)):
            raise ValueError(f"stages must be one or both of {', '.join(STAGES)}, in this order")
        if len(self.recall.quotas) > self.model.max_history:
            raise ValueError(
                f"recall.quotas has {len(self.recall.quotas)} steps, "
                f"more than model.max_history={self.model.max_history} has room for"
            )
