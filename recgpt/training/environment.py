"""Where a run was trained: versions, machine, commit; kept in the run's folder as environment.json."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from recgpt import __version__, storage
from recgpt.config import TrainSettings
from recgpt.distributed import collectives

ENVIRONMENT_FILE = "environment.json"
_PACKAGES = ("torch", "deepspeed", "ray", "pyarrow", "numpy")


def commit() -> str | None:
    """The git commit of this code, with `+changes` if files differ from it; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        # In an environment inside of somebody's own repository, the commit would be theirs.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        name = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}+changes" if changes else name


def _git(folder: Path, *arguments: str) -> str:
    call = ["git", "-C", str(folder), *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def environment(settings: TrainSettings, code_commit: str | None) -> dict[str, str | int | None]:
    """What this rank runs on, and since when."""
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": code_commit,
        "seed": settings.seed,
        "workers": collectives.world_size(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "recgpt": __version__,
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_environment(folder: str, settings: TrainSettings, code_commit: str | None) -> None:
    """Note it in the run's folder; the newest process that trains there is the one that counts."""
    storage.write_json(storage.join(folder, ENVIRONMENT_FILE), environment(settings, code_commit))
