"""The yardstick: torchrec's row-wise sharded table with fused row-wise Adagrad, on CPU.

Runs in an environment of its own, which has torchrec and knows nothing of RecGPT.
"""

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv

from benchmarks.yardsticks.lookup_workload import LookupWorkload

CPU = torch.device("cpu")


def measure(
    num_rows: int,
    width: int,
    tokens: int,
    steps: int,
    learning_rate: float,
    epsilon: float,
    unique: bool,
    vectors: str,
) -> list[float]:
    """Seconds of each step.

    Args:
        unique: make the ids distinct before torchrec sees them; its own ``use_index_dedup`` needs CUDA.
        vectors: where to leave the used rows as they are in the end, float32 [U, D]: VECTORS-RANK.npy.
    """
    workload = LookupWorkload(dist.get_rank(), num_rows, width, tokens, steps)
    table = _sharded_table(num_rows, width, learning_rate, epsilon)
    for shard in table.state_dict()["embeddings.table.weight"].local_shards():
        first, (rows, _) = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes
        shard.tensor.copy_(workload.rows(first, first + rows))

    def step(ids: Tensor, gradient: Tensor) -> None:
        if unique:
            ids, position = ids.unique(return_inverse=True)
            _look_up(table, ids).index_select(0, position).backward(gradient)
        else:
            _look_up(table, ids).backward(gradient)

    seconds = workload.measure(step)
    np.save(f"{vectors}-{dist.get_rank()}.npy", _look_up(table, workload.used()).detach().numpy())
    return seconds


def _sharded_table(
    num_rows: int, width: int, learning_rate: float, epsilon: float
) -> ShardedEmbeddingCollection:
    config = EmbeddingConfig(
        name="table", embedding_dim=width, num_embeddings=num_rows, feature_names=["item"]
    )
    collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    optimizer = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": learning_rate,
        "eps": epsilon,
    }
    sharder = EmbeddingCollectionSharder(fused_params=optimizer)
    ranks = dist.get_world_size()
    plan = construct_module_sharding_plan(
        collection,
        # "dense", the other kernel for CPUs, crashes.
        {"table": row_wise(compute_kernel="fused")},
        sharder=sharder,
        world_size=ranks,
        local_size=ranks,
        device_type="cpu",
    )
    return sharder.shard(collection, plan, ShardingEnv.from_process_group(dist.group.WORLD), CPU)


def _look_up(table: ShardedEmbeddingCollection, ids: Tensor) -> Tensor:
    features = KeyedJaggedTensor(
        keys=["item"], values=ids, lengths=torch.tensor([len(ids)], dtype=torch.int32)
    )
    return table(features)["item"].values()
