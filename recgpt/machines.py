"""Constants of machines: shipped ones in configs/machines/, each with its source, or measured ones."""

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from recgpt.settings_reading import from_dict, read_yaml, shipped_file

SHIPPED = "configs/machines"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(config=ConfigDict(extra="forbid"))
class Machine:
    """What one rank has: a GPU, or some threads of a CPU."""

    device: str
    """How torch's name of the device begins; `cpu` for CPUs."""
    matrix_flops: Positive
    """Most operations per second of matrix products, in the precision of training."""
    memory_bytes: Positive
    memory_bandwidth: Positive
    """Bytes per second, reads and writes together."""
    ranks_per_node: Annotated[int, Field(gt=0)]
    node_bandwidth: Positive
    """Bytes per second that a rank sends to ranks of its own machine."""
    network_bandwidth: Positive
    """Bytes per second that a rank sends to other machines."""
    latency: Positive
    """Seconds of an exchange of nothing between two ranks."""
    matrix_efficiency: Annotated[float, Field(gt=0, le=1)]
    """Share of `matrix_flops` that training reaches."""
    memory_efficiency: Annotated[float, Field(gt=0, le=1)]
    """Share of `memory_bandwidth` that lookups, updates and optimizers reach."""
    step_overhead: Positive
    """Seconds of a step that do not depend on its size."""
    input_rate: Positive
    """Tokens per second that reading and packing deliver to a rank, beside its steps."""
    host_bandwidth: Positive
    """Bytes per second from a rank's memory into a second copy in the host's."""
    process_bytes: Positive
    """What a rank holds before there is a model: libraries, a context on the GPU."""
    storage_bandwidth: Positive
    """Bytes per second to where checkpoints lie, per machine."""
    failure_hours: Positive = 6335.0
    """Mean hours between failures of one machine; by default as in h100.yaml."""
    price_per_hour: Positive | None = None
    """Of one rank, in USD; None: unknown."""


def load_machine(name: str) -> Machine:
    """Constants by the name of a shipped file or by path.

    Raises ``UserError`` if there are none, or if they are not of this form.
    """
    return from_dict(Machine, read_yaml(shipped_file(SHIPPED, name, ".yaml")), name)


def matrix_flops_of(device_name: str) -> float | None:
    """``Machine.matrix_flops`` of a GPU by torch's name of it; None if no shipped file is of it."""
    found = [machine for machine in _shipped_machines() if device_name.startswith(machine.device)]
    return found[0].matrix_flops if found else None


@cache
def _shipped_machines() -> tuple[Machine, ...]:
    folder = Path(shipped_file(SHIPPED, "h100", ".yaml")).parent
    return tuple(load_machine(str(file)) for file in sorted(folder.glob("*.yaml")))
