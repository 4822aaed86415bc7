"""What one rank of a multi-process test runs: a function of a test file, inside a gloo process group."""

import importlib.util
import json
import os
import sys
import warnings

import torch
import torch.distributed as dist


def main() -> None:
    file, function, rank, world_size, store, arguments = sys.argv[1:]
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = rank  # as a launcher of several processes on one machine sets it
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world_size))
    specification = importlib.util.spec_from_file_location("test_module", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    getattr(module, function)(*json.loads(arguments))
    dist.barrier()
    # The work is done; while the interpreter winds down, a thread of gloo can still abort the process.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
