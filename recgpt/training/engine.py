"""The DeepSpeed engine around the dense weights: the one file that imports DeepSpeed.

Dense state enters and leaves as whole float32 tensors by parameter name, so that it does not
depend on the ZeRO stage or on the number of workers.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recgpt import storage
from recgpt.config import OptimizerSettings
from recgpt.distributed import collectives
from recgpt.errors import UserError
from recgpt.settings_reading import shipped_file
from recgpt.training.checkpoint import MOMENTS
from recgpt.training.model import NextItemModel

LARGEST_BUCKET = 500_000_000
"""Values that are reduced at a time, at most; DeepSpeed's default."""
_DECIDED_HERE = {
    # Batches are counted in tokens, not in samples: DeepSpeed is told one sample per rank and step.
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    # Left out, DeepSpeed clips at a norm of 1.
    "gradient_clipping": 0.0,
}


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops

    # This op makes DeepSpeed compile C++ at the first start on a CPU; gloo alone is as fast here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_process_group() -> None:
    """Make DeepSpeed use the process group that exists (Ray Train's, or one made by the caller)."""
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    backend = deepspeed.comm.comm.cdb
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast"):
        if name not in vars(backend):  # of an engine before this one
            setattr(backend, name, _counted(getattr(backend, name)))


def _counted(call: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of DeepSpeed's that counts as `dense` among ours."""

    @functools.wraps(call)
    def counting(*arguments: Any, **named: Any) -> Any:
        handed = [named[name] for name in ("input_tensor", "tensor") if name in named] or arguments
        with collectives.counted("dense", handed[0]):
            return call(*arguments, **named)

    return counting


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration by the name of a shipped file or by path.

    Raises ``UserError`` if there is none, or if it sets what RecGPT's own settings decide.
    """
    path = shipped_file("deepspeed_configs", name, ".json")
    config = storage.read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"{path}: is no DeepSpeed configuration; it needs an object zero_optimization")
    for key in sorted({"optimizer", "scheduler", "train_batch_size", *_DECIDED_HERE} & set(config)):
        raise UserError(f"{path}: {key} is decided by RecGPT's settings; remove it from the DeepSpeed file")
    if zero_stage(config) not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 1, 2 or 3")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 if it names none."""
    return config.get("zero_optimization", {}).get("stage", 0)


class DenseEngine:
    """A model whose parameters are trained under ZeRO.

    Args:
        micro_batches: calls of ``backward`` that make up a step.
    """

    def __init__(
        self,
        module: NextItemModel,
        optimizer: OptimizerSettings,
        deepspeed_config: dict[str, Any],
        micro_batches: int = 1,
    ):
        self._deepspeed = _import_deepspeed()
        # Under ZeRO-3 DeepSpeed's hooks take a parameter away again after each use, which leaves
        # only the training step itself: everything else reads a copy.
        self.stage = zero_stage(deepspeed_config)
        self._twin = module.twin() if self.stage == 3 else None
        inner = torch.optim.AdamW(
            module.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
        self._micro_batches = micro_batches
        self._clipping = optimizer.gradient_clipping or 0.0
        decided = {"gradient_accumulation_steps": micro_batches, "gradient_clipping": self._clipping}
        # DeepSpeed allocates the bucket whole: no larger than there are weights.
        weights = sum(weight.numel() for weight in module.parameters())
        bucket = {"reduce_bucket_size": min(weights, LARGEST_BUCKET)}
        zero = {"zero_optimization": bucket | deepspeed_config["zero_optimization"]}
        config = {**deepspeed_config, **zero, **_DECIDED_HERE, **decided}
        with _quiet():
            self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=inner, config=config)
        self._discarding = False
        self._make_discardable()
        if self._clipping:
            self._tables_norm = 0.0
            self._clip_with_tables()

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the mean over ranks of ``loss``; a step sums ``micro_batches`` of them."""
        # DeepSpeed divides by the number of micro-batches: it expects means, and these are parts of a sum.
        self._engine.backward(loss * self._micro_batches)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, updates nothing

    def step(self, learning_rate: float, tables_norm: float = 0.0) -> float:
        """Update the weights; returns the factor by which clipping scaled the gradient.

        Args:
            tables_norm: norm of the gradients outside the engine, over all ranks, which counts for
                the limit; they must be scaled by the same factor.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._tables_norm = tables_norm
        self._engine.step()
        if not self._clipping:
            return 1.0
        norm = math.hypot(float(self.gradient_norm()), tables_norm)
        return 1.0 / max((norm + 1e-6) / self._clipping, 1.0)  # DeepSpeed's formula

    def gradient_norm(self) -> Tensor | float:
        """Of the last step, over all ranks and before clipping; without what is outside the engine."""
        return self._engine.get_global_grad_norm()

    def gradients_are_finite(self) -> bool:
        """Whether those of the step under way are, on every rank. Collective."""
        return not self._engine.optimizer.has_overflow()

    def discard(self) -> None:
        """End the step under way without an update. Collective."""
        self._discarding = True
        self._engine.step()
        self._discarding = False

    def _make_discardable(self) -> None:
        """Let DeepSpeed take a step that is to be discarded for one that has overflowed in float16."""
        zero = self._engine.optimizer

        def check(*_: Any, **__: Any) -> bool:
            zero.overflow = self._discarding
            return self._discarding

        if self.stage == 3:
            zero._overflow_check_and_loss_scale_update = check
        else:
            zero.check_grad_overflow = True
            zero.check_overflow = check

    def _clip_with_tables(self) -> None:
        """Make DeepSpeed clip by the norm over its own gradients and those of the tables together."""
        zero = self._engine.optimizer
        clip = zero.unscale_and_clip_grads

        def clip_by_joint_norm(gradients: Any, dense_norm: Any) -> None:
            clip(gradients, (dense_norm**2 + self._tables_norm**2) ** 0.5)

        zero.unscale_and_clip_grads = clip_by_joint_norm

    @contextlib.contextmanager
    def readable(self) -> Iterator[NextItemModel]:
        """The model with its current weights, whole on every rank, in evaluation mode. Collective."""
        if self._twin is not None:
            ours = self._twin.named_parameters()
            with self._deepspeed.zero.GatheredParameters(list(self._engine.module.parameters())):
                current = dict(self._engine.module.named_parameters())
                for name, parameter in ours:
                    parameter.data.copy_(current[name].data)
            yield self._twin
            return
        self._engine.eval()
        try:
            yield self._engine.module
        finally:
            self._engine.train()

    def weights(self) -> dict[str, Tensor]:
        """All parameters by name, whole, float32 on the CPU. Collective."""
        get = self._deepspeed.utils.safe_get_full_fp32_param
        return {name: get(parameter).cpu().clone() for name, parameter in self._named_parameters()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Both moments of every parameter (``exp_avg/NAME``), whole, float32, and ``step``. Collective."""
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        self._create_optimizer_state()
        state = {
            f"{moment}/{name}": get(parameter, moment).cpu().clone()
            for name, parameter in self._named_parameters()
            for moment in MOMENTS
        }
        steps = [entry["step"] for entry in self._inner_state()]
        return state | {"step": torch.as_tensor(float(steps[0]))}

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``optimizer_state``, at any number of workers and ZeRO stage."""
        self._create_optimizer_state()
        for name, parameter in self._named_parameters():
            for moment in MOMENTS:
                self._set_moment(parameter, state[f"{moment}/{name}"], moment)
        for entry in self._inner_state():
            entry["step"] = state["step"].clone()

    def close(self) -> None:
        with _quiet():
            self._engine.destroy()

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._engine.module.named_parameters())

    def _flat_partitions(self) -> list[Tensor]:
        """The flat float32 pieces of this rank, which the inner optimizer knows as its parameters."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _inner_state(self) -> list[dict[str, Tensor]]:
        inner = self._engine.optimizer.optimizer
        return [inner.state[flat] for flat in self._flat_partitions()]

    def _create_optimizer_state(self) -> None:
        """Make the moments that the first step would make, so that they can be read and set before it."""
        zero = self._engine.optimizer
        for flat in self._flat_partitions():
            if not zero.optimizer.state[flat]:
                moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
                zero.optimizer.state[flat] = {"step": torch.tensor(0.0), **moments}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: Any, value: Tensor, moment: str) -> None:
        utils = self._deepspeed.utils
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        # DeepSpeed's setter of whole tensors fails where the last rank's piece is padded.
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * dist.get_world_size())
        padded[: value.numel()] = value.flatten()
        piece = padded[dist.get_rank() * size :][:size]
        utils.safe_set_local_optimizer_state(parameter, piece, moment)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints and logs its configuration at every start."""
    import logging

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)
