"""Everything that is applied to a finished model, in one visible order.

Tensor parallelism, adapters, activation checkpointing, compiling, FSDP.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from castalia.config.float8_matrices import float8_matrices
from castalia.config.layout_rules import stages_per_rank
from castalia.config.schema import CompleteConfig, ParallelConfig
from castalia.model.experts import Experts
from castalia.model.float8 import set_float8
from castalia.model.layers import hold_in
from castalia.model.lora import add_adapters, freeze
from castalia.model.transformer import Transformer
from castalia.parallel.activation_checkpointing import apply_activation_checkpointing, has_dropout
from castalia.parallel.compile import compile_blocks
from castalia.parallel.expert_parallel import apply_expert_parallel, shard_dim
from castalia.parallel.mesh import Mesh
from castalia.parallel.pipeline import cut_stage
from castalia.parallel.tensor_parallel import (
    apply_tensor_parallel,
    float8_on_ranks,
    replicate_other_parameters,
    shard_adapters,
)
from castalia.plan.layout import stages_of_rank


def build_stages(
    cfg: CompleteConfig, mesh: Mesh, compute_dtype: torch.dtype, device: torch.device, frozen: bool = False
) -> dict[int, Transformer]:
    """This rank's pipeline stages by number (one stage, 0, without a pipeline), their parameters still unset.

    A `frozen` model, which does not train, holds its parameters in the compute dtype instead of fp32, see `hold_in`.
    """
    parallel, per_rank = cfg.parallel, stages_per_rank(cfg.parallel)
    num_stages = parallel.pp * per_rank
    stages = {}
    for index in stages_of_rank(parallel.pipeline, parallel.pp, per_rank, mesh.pp_rank):
        # On the meta device nothing is allocated; `to_empty` then allocates this rank's shards alone.
        with torch.device("meta"):
            model = Transformer(cfg.model, compute_dtype=compute_dtype, exact=cfg.neox_exact, z_loss=cfg.train.z_loss)
        if num_stages > 1:
            model = cut_stage(model, index, num_stages, cfg.data.seq_length)
        if frozen:
            hold_in(model, compute_dtype)
        elif cfg.precision.compute == "fp8":
            set_float8(model, float8_matrices(cfg.model, mesh.layout.tp)[0])
        model = parallelize(model, mesh, cfg, compute_dtype)
        stages[index] = model.to_empty(device="cpu" if cfg.parallel.offload else device)
    return stages


def parallelize(model: Transformer, mesh: Mesh, cfg: CompleteConfig, compute_dtype: torch.dtype) -> Transformer:
    """Splits, wraps and shards a model (or one of its pipeline stages) that is on the meta device.

    The order matters: adapters follow their matrices' split, checkpointing and compiling wrap the forward passes that
    FSDP then surrounds with its communication.
    """
    if mesh.layout.tp > 1:
        apply_tensor_parallel(model, mesh.tensor, cfg.parallel.sequence_parallel)
    if mesh.experts is not None:
        apply_expert_parallel(model, mesh.experts)
    add_adapters(model, cfg.finetune.lora)
    if mesh.layout.tp > 1:
        shard_adapters(model, mesh.tensor)
        float8_on_ranks(model)
        replicate_other_parameters(model, mesh.tensor)
    freeze(model, cfg.finetune)
    apply_activation_checkpointing(model, cfg.train.recompute, dropout=has_dropout(cfg))
    compile_blocks(model, cfg, torch.device(mesh.data.device_type))
    apply_fsdp(model, mesh, cfg.parallel, compute_dtype)
    assert_tied(model)
    return model


def apply_fsdp(model: Transformer, mesh: Mesh, cfg: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Applies `fully_shard` to each block, then to the rest of the model.

    Embedding, final norm and head form one group, so that a tied head stays the embedding itself. Gradients are summed
    over ranks, not averaged: the loss is already divided by the number of tokens in the global batch.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype, reduce_dtype=torch.float32
    )
    options: dict[str, Any] = {
        "mesh": mesh.data,
        "mp_policy": policy,
        # A pipeline runs other micro-batches between a forward pass and its backward pass; parameters stay gathered
        # meanwhile.
        "reshard_after_forward": cfg.zero == 3 and mesh.layout.pp == 1,
        "shard_placement_fn": partial(shard_dim, ranks=mesh.layout.dp_shard * mesh.layout.cp),
    }
    if cfg.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    exact = options | {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)}
    if mesh.experts is not None:  # of which each rank has some, and shares them with those that have the same
        shards = partial(shard_dim, ranks=mesh.layout.expert_copies[1])
        own = options | {"mesh": mesh.expert_data, "shard_placement_fn": shards}
    for block in model.blocks.values():
        for module in block.modules():
            if getattr(module, "stays_fp32", False):
                fully_shard(module, **exact)
            if isinstance(module, Experts) and mesh.experts is not None:
                fully_shard(module, **own)
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale values while it reduces them


def assert_tied(model: Transformer) -> None:
    """Asserts that a tied head still is the embedding itself: none of the wrappers may have copied it."""
    if model.cfg.tie_embeddings and model.embed is not None:
        assert model.head is None and model.head_weight is model.embed.weight
