"""The training loop of both stages, as one rank runs it.

Read it from ``train`` down: stages, epochs, steps. Every rank takes every step, also a rank whose
lanes are exhausted (with an empty batch), so that no rank waits for ever in a collective.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recgpt.config import STAGES, StageSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.packing import LaneStep, PackedBatch, empty_step, lane_steps
from recgpt.data.plan import ReadUnit, epoch_units
from recgpt.data.sequences import resolve_time_bounds
from recgpt.distributed import collectives
from recgpt.distributed.sharded_table import ShardedTable, gradient_norm
from recgpt.distributed.table_optimizer import RowOptimizer, row_optimizer
from recgpt.errors import Stopped, UserError
from recgpt.training import checkpoint, export, run_folder, start
from recgpt.training.bad_steps import BadSteps
from recgpt.training.checkpoint_writer import CheckpointWriter, Written
from recgpt.training.engine import DenseEngine, init_process_group, read_deepspeed_config
from recgpt.training.model import TrainingBatch, build_model
from recgpt.training.prompts import plain_batch, prompted_batch
from recgpt.training.recorder import Recorder
from recgpt.training.schedule import share_of_peak
from recgpt.training.state import TrainingState, needed_checkpoints, origin, read_state
from recgpt.training.step_figures import StepFigures
from recgpt.training.validation import Validator

ReadUnits = Callable[[list[ReadUnit]], Iterable[pa.Table]]


def train(
    settings: TrainSettings,
    dataset: HistoryDataset,
    folder: str,
    read_units: ReadUnits,
    recorder: Recorder,
    start_from: str | None = None,
    *,
    attempt: str | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train all stages in ``folder``, going on from its newest checkpoint, and export the best model.

    Collective: every rank calls it, inside an initialised process group.

    Args:
        read_units: gives the histories of ``ReadUnit``s in order, as ``recgpt.data.plan.read_unit`` does.
        start_from: folder of an exported model that fits (``start.find_start``), whose weights the run
            begins with; initial ones if not given. A run that has a checkpoint does not read it again.
        attempt: the mark of ``run_folder.begin_attempt``; without it nobody is looked out for.
        stop_wanted: asked at every step; if it is true on any rank, all of them write a checkpoint and stop.

    Returns for each stage its best validation value, the checkpoint that reached it, epochs and last step.
    Raises ``Stopped`` when it was asked to, and ``UserError`` for what the user can put right.
    """
    torch.set_num_threads(settings.threads_per_worker)
    init_process_group()
    trainer = Trainer(settings, dataset, folder, read_units, recorder, start_from, attempt, stop_wanted)
    with trainer.writer:
        newest = checkpoint.newest_whole(folder, recorder.warn)
        if newest:
            trainer.resume(newest)
        for stage in settings.stages:
            if STAGES.index(stage) < STAGES.index(trainer.state.stage or stage):
                continue
            if stage != trainer.state.stage:
                trainer.start_stage(stage, weights_from=trainer.state.best_checkpoint)
            trainer.run_stage()
        trainer.wait_for_checkpoint()
    recorder.flush()
    if collectives.rank() == 0:
        assert trainer.state.best_checkpoint, "a stage validates at least once"
        best, users = trainer.state.best_checkpoint, trainer.model.gpt.known_users
        export.export_checkpoint(folder, best, settings, dataset, users)
    collectives.barrier()
    trainer.close()
    return trainer.state.results


class Trainer:
    """One rank's engine, table and data, and the loop over them."""

    def __init__(
        self,
        settings: TrainSettings,
        dataset: HistoryDataset,
        folder: str,
        read_units: ReadUnits,
        recorder: Recorder,
        start_from: str | None,
        attempt: str | None,
        stop_wanted: Callable[[], bool],
    ):
        self.settings = settings
        self.dataset = dataset
        self.folder = folder
        self.read_units = read_units
        self.recorder = recorder
        recorder.begin(settings, dataset.num_items)
        self.start_from = start_from
        self.stop_wanted = stop_wanted
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.writer = CheckpointWriter(
            folder,
            needed=lambda: needed_checkpoints(folder, settings.keep_checkpoints),
            check_may_write=lambda: run_folder.check_attempt(folder, attempt) if attempt else None,
            in_background=settings.checkpoint_in_background,
            device=self.device,
        )
        self.lanes = list(range(settings.data.lanes))[collectives.rank() :: collectives.world_size()]
        time_bounds = resolve_time_bounds(settings.data.split, dataset.manifest)
        self.validator = Validator(dataset, settings, time_bounds, self.device)
        self.state = TrainingState(stage="")
        self.epochs_before_step = 0.0  # of the stage, the one under way by the share of its users
        self.bad_steps = BadSteps(settings.not_finite, recorder)
        self._engine: DenseEngine | None = None
        self.row_optimizers: dict[str, RowOptimizer] = {}

    # Stages

    def start_stage(self, stage: str, weights_from: str | None) -> None:
        """Begin a stage with fresh moments, from the weights of a checkpoint or those of the run's start."""
        self.state = TrainingState(
            stage,
            step=self.state.step,
            consumed=[0] * self.settings.data.lanes,
            results=self.state.results,
        )
        self._build(weights_from, with_moments=False)
        self.recorder.restart(self.state.step)

    def resume(self, name: str) -> None:
        """Go on from a checkpoint, exactly where it was written."""
        lanes = self.settings.data.lanes
        self.state = read_state(self.folder, name, self.dataset.fingerprint, lanes)
        self._build(name, with_moments=True)
        self.recorder.restart(self.state.step)

    def run_stage(self) -> None:
        """Epochs until the stage's limit, or until validation has not improved for ``patience`` times."""
        if not self.validator.num_users():
            raise UserError(
                f"{self.dataset.url}: no user has an item held out for validation, protocol "
                f"{self.settings.data.split.protocol}; train on a log with longer histories or another split"
            )
        stage = self._stage_settings
        while self.state.epoch < stage.max_epochs and self.state.validations_without_best < stage.patience:
            self._run_epoch()
            self.recorder.end_interval(self.state)
            if not self.state.stage_step:
                raise UserError(
                    f"{self.dataset.url}: no history has a training target, protocol "
                    f"{self.settings.data.split.protocol}; train on a log with longer histories"
                )
            self.state.epoch += 1
            self.state.consumed = [0] * self.settings.data.lanes
            last = self.state.epoch == stage.max_epochs
            if last or self.state.epoch % self.settings.validation.every_epochs == 0:
                self._validate()
            self._save()

    # Epochs and steps

    def _run_epoch(self) -> None:
        for lane_step in self.recorder.waiting_for(self._steps_of_epoch()):
            before = self.state.consumed
            num_targets, num_users = self._agree(lane_step)
            if not num_users:
                return
            if not num_targets:
                continue
            figures = self._optimize(lane_step.batch, num_targets, num_users)
            if figures is None:
                self.bad_steps.left_out(self.state, before)
            else:
                self.bad_steps.good()
                self.recorder.step(self.state, figures)
            if self.state.step % self.settings.checkpoint_every_steps == 0:
                self._save()

    def _steps_of_epoch(self) -> Iterator[LaneStep]:
        """This rank's steps and then empty ones: the epoch ends when all ranks have nothing left."""
        data = self.settings.data
        units = epoch_units(
            row_counts=[group.rows for group in self.dataset.row_groups],
            lanes=self.lanes,
            total_lanes=data.lanes,
            window_users=data.shuffle_window_users,
            shuffle=(self.settings.seed, self._epoch_of_run()),
            consumed=self.state.consumed,
        )
        budget = -(-data.tokens_per_batch // data.lanes)
        mine = lane_steps(self.read_units(units), self.lanes, budget, self.settings.model.max_history)
        yield from mine
        yield from itertools.repeat(empty_step(self.lanes))

    def _agree(self, lane_step: LaneStep) -> tuple[int, int]:
        """Targets and users of the step over all ranks; moves the cursor of every lane.

        If any rank was asked to stop, raises ``Stopped`` after a checkpoint of what was done before the step.
        """
        counts = torch.zeros(2 + self.settings.data.lanes, dtype=torch.int64, device=self.device)
        counts[0] = self.stop_wanted()
        self.recorder.where = f"step {self.state.step + 1} of the run"
        counts[1] = len(lane_step.batch.target_T)
        for lane, taken in lane_step.users.items():
            counts[2 + lane] = taken
        stop, num_targets, *users = map(int, collectives.sum_over_ranks(counts).tolist())
        # By users and not by steps: how many steps an epoch has is known only when it is over.
        self.epochs_before_step = self.state.epoch + sum(self.state.consumed) / self.dataset.num_users
        if stop:
            name = self._save()
            self.wait_for_checkpoint()
            raise Stopped(f"stopped at step {self.state.step} of the run, checkpoint {name}")
        self.state.consumed = [done + new for done, new in zip(self.state.consumed, users, strict=True)]
        return num_targets, sum(users)

    def _optimize(self, packed: PackedBatch, num_targets: int, num_users: int) -> StepFigures | None:
        """One optimizer step over targets and users of all ranks; None if it was left out on all ranks.

        The loss is summed over targets and divided by the number of targets of all ranks. The engine
        averages gradients over W ranks, hence the factor W; the sharded tables do the same.
        """
        # What is drawn depends on the step and the rank alone: resumed equals uninterrupted.
        key = np.random.SeedSequence((self.settings.seed, self.state.step, collectives.rank()))
        torch.manual_seed(int(key.generate_state(1)[0]))
        loss_sum = torch.zeros((), device=self.device)
        batches = self._micro_batches(packed)
        for batch in batches:
            part = self.engine(batch)
            self.engine.backward(part * (collectives.world_size() / num_targets))
            loss_sum += part.detach()
        gradients = {name: table.take_gradient() for name, table in self.model.sharded_tables().items()}
        figures = None
        if self._is_finite(loss_sum, [gradient for _, gradient in gradients.values()]):
            rate, table_rate, table_norm = self._update(gradients)
            dense_norm = self.engine.gradient_norm()
            figures = StepFigures(
                loss_sum, batches, num_targets, num_users, rate, table_rate, dense_norm, table_norm
            )
        else:
            self.engine.discard()
        self.state.step += 1
        self.state.stage_step += 1
        return figures

    def _is_finite(self, loss_sum: torch.Tensor, table_gradients: list[torch.Tensor]) -> bool:
        """Whether the loss and all gradients are, on every rank."""
        # A sum is finite only if all of its terms are.
        total = torch.stack([value.sum().float() for value in (loss_sum, *table_gradients)]).sum()
        return self.engine.gradients_are_finite() and bool(collectives.sum_over_ranks(total).isfinite())

    def _micro_batches(self, packed: PackedBatch) -> list[TrainingBatch]:
        """The parts of a step's batch; for prompt-tuning, with items that the current model generates."""
        parts = packed.split(self.settings.data.micro_batches)
        epoch = self._epoch_of_run()
        plain = [plain_batch(self.model, part, self.settings, epoch, self.device) for part in parts]
        if self.state.stage != "prompt_tune":
            return plain
        with self.engine.readable() as model:
            prompts, draw_key = self.settings.prompts, (self.settings.seed, epoch)
            return [
                prompted_batch(model, batch, part.user_hash_B, prompts, draw_key)
                for batch, part in zip(plain, parts, strict=True)
            ]

    def _update(
        self, gradients: dict[str, tuple[torch.Tensor | None, torch.Tensor]]
    ) -> tuple[float, float | None, float | None]:
        """The step of all optimizers, clipped by one norm over the GPT and all tables.

        Args:
            gradients: of each sharded table, the rows (None: all) and their gradient.

        Returns the learning rates of the engine and of the tables, and the norm of the tables' gradients:
        None if there are no tables, or if nobody asks for the norm.
        """
        optimizer = self._stage_settings.optimizer
        rate = self._scheduled(optimizer.learning_rate)
        table_norm = None
        if gradients and (optimizer.gradient_clipping or self.recorder.is_due(self.state.step + 1)):
            table_norm = gradient_norm([gradient for _, gradient in gradients.values()])
        scale = self.engine.step(rate, table_norm or 0.0)
        if not gradients:
            return rate, None, None
        table_rate = self._scheduled(optimizer.table_learning_rate or optimizer.learning_rate)
        for name, (rows, gradient) in gradients.items():
            self.row_optimizers[name].step(rows, gradient.mul_(scale), table_rate)
        return rate, table_rate, table_norm

    # Validation and checkpoints

    def _validate(self) -> None:
        self.recorder.where = f"validation after step {self.state.step} of the run"
        with self.engine.readable() as model:
            metrics = self.validator.measure(model)
        value = metrics[self.settings.validation.metric]
        if self.state.best_value is None or value > self.state.best_value:
            self.state.best_value = value
            self.state.best_checkpoint = checkpoint.checkpoint_name(self.state.step, self.state.epoch)
            self.state.validations_without_best = 0
        else:
            self.state.validations_without_best += 1
        self.state.results[self.state.stage] = {
            self.settings.validation.metric: self.state.best_value,
            "checkpoint": self.state.best_checkpoint,
            "epochs": self.state.epoch,
            "step": self.state.step,
        }
        self.recorder.validation(self.state, metrics)

    def _save(self) -> str:
        """Begin to write a checkpoint of now; returns its name."""
        name = checkpoint.checkpoint_name(self.state.step, self.state.epoch)
        self.recorder.flush()
        self._note(self.writer.save(lambda: self._snapshot(name)))
        return name

    def _snapshot(self, name: str) -> checkpoint.Snapshot:
        tables = {
            table: checkpoint.TableRows(sharded.num_rows, sharded.first, self._table_tensors(table, sharded))
            for table, sharded in self.model.sharded_tables().items()
        }
        weights, moments = self.engine.weights(), self.engine.optimizer_state()
        return checkpoint.Snapshot(
            name, asdict(self.state), weights, moments, tables, origin(self.settings, self.dataset)
        )

    def wait_for_checkpoint(self) -> None:
        written = self.writer.wait()
        if written:
            self._note(written)
            self.recorder.flush()

    def _note(self, written: Written | None) -> None:
        if written:
            self.recorder.checkpoint(self.state, written)

    def _build(self, weights_from: str | None, with_moments: bool) -> None:
        """Model, engine and table optimizer, with weights and perhaps moments of a checkpoint."""
        self.close()
        self.wait_for_checkpoint()
        self.model = build_model(self.settings, self.dataset, self.device)
        if weights_from:
            weights = checkpoint.load_dense(self.folder, weights_from, self.model.state_dict())
            self.model.load_state_dict(weights)
        elif self.start_from:
            start.load_start(self.start_from, self.model)
        optimizer = self._stage_settings.optimizer
        deepspeed = read_deepspeed_config(self.settings.deepspeed)
        self._engine = DenseEngine(self.model, optimizer, deepspeed, self.settings.data.micro_batches)
        if weights_from and with_moments:
            moments = checkpoint.load_dense_optimizer(self.folder, weights_from, weights)
            self.engine.load_optimizer_state(moments)
        # The engine has made groups of its own.
        collectives.give_up_after(timedelta(seconds=self.settings.collective_timeout_seconds))
        kind = self.settings.item_table.optimizer
        self.row_optimizers = {}
        for table, sharded in self.model.sharded_tables().items():
            self.row_optimizers[table] = row_optimizer(kind, sharded, optimizer)
            if weights_from:
                tensors = self._table_tensors(table, sharded) if with_moments else {"rows": sharded.rows}
                checkpoint.load_table_into(self.folder, weights_from, table, sharded.first, tensors)

    def _table_tensors(self, table: str, sharded: ShardedTable) -> dict[str, torch.Tensor]:
        """Rows and optimizer state of a table, as they are now."""
        return {"rows": sharded.rows_in_use(), **self.row_optimizers[table].state}

    def close(self) -> None:
        """Give back what the engine of the last stage holds."""
        if self._engine:
            self._engine.close()
            self._engine = None

    @property
    def engine(self) -> DenseEngine:
        assert self._engine, "a stage has been started or resumed"
        return self._engine

    @property
    def _stage_settings(self) -> StageSettings:
        return getattr(self.settings, self.state.stage)

    def _epoch_of_run(self) -> int:
        """A number that no other epoch of the run has, so that each has its own order."""
        return STAGES.index(self.state.stage) * 1_000_000 + self.state.epoch

    def _scheduled(self, rate: float) -> float:
        """The learning rate of the step under way, whose peak is ``rate``."""
        return rate * share_of_peak(self._stage_settings, self.state.stage_step, self.epochs_before_step)
