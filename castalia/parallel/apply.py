"""What is applied to a finished model, in one visible order: splits, adapters, recomputation, compiling, sharding."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from castalia.config.layout_rules import stages_per_rank
from castalia.config.schema import CompleteConfig, ParallelConfig, RunConfig
from castalia.model.lora import add_adapters, freeze
from castalia.model.transformer import Transformer
from castalia.parallel.activation_checkpointing import apply_recompute, has_dropout
from castalia.parallel.compile import compile_blocks
from castalia.parallel.mesh import Mesh
from castalia.parallel.pipeline import cut_stage
from castalia.parallel.tensor_parallel import apply_tensor_parallel, replicate_rest, split_adapters
from castalia.plan.layout import stages_of_rank


def build_stages(
    cfg: CompleteConfig, mesh: Mesh, compute_dtype: torch.dtype, device: torch.device, frozen: bool = False
) -> dict[int, Transformer]:
    """This rank's part of the model by stage number (one stage, 0, without a pipeline), its parameters still unset.

    Those of a `frozen` model are in the compute dtype.
    """
    wanted, each = cfg.parallel, stages_per_rank(cfg.parallel)
    num_stages = wanted.pp * each
    stages = {}
    for index in stages_of_rank(wanted.pipeline, wanted.pp, each, mesh.pp_rank):
        with torch.device("meta"):
            model = Transformer(cfg.model, compute_dtype=compute_dtype, exact=cfg.neox_exact, z_loss=cfg.train.z_loss)
        if num_stages > 1:
            model = cut_stage(model, index, num_stages, cfg.data.seq_length)
        if frozen:
            model.to(compute_dtype)
        model = parallelize(model, mesh, cfg, compute_dtype)
        stages[index] = model.to_empty(device="cpu" if cfg.parallel.offload else device)
    return stages


def parallelize(model: Transformer, mesh: Mesh, cfg: RunConfig, compute_dtype: torch.dtype) -> Transformer:
    """Splits, wraps and shards a model (or a pipeline stage of one) that is on the meta device, in this order."""
    if mesh.layout.tp > 1:
        apply_tensor_parallel(model, mesh.tensor, cfg.parallel.sequence_parallel)
    add_adapters(model, cfg.finetune.lora)
    if mesh.layout.tp > 1:
        split_adapters(model, mesh.tensor)
        replicate_rest(model, mesh.tensor)
    freeze(model, cfg.finetune)
    apply_recompute(model, cfg.train.recompute, dropout=has_dropout(model.cfg))
    compile_blocks(model, cfg, torch.device(mesh.data.device_type))
    apply_sharding(model, mesh, cfg.parallel, compute_dtype)
    assert_tied(model)
    return model


def apply_sharding(model: Transformer, mesh: Mesh, cfg: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """`fully_shard` for each block, then for what is left: embedding, norm and head are one group, so that ties hold.

    Gradients are summed, not averaged: the loss is divided by the global number of tokens beforehand.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype, reduce_dtype=torch.float32
    )
    options: dict[str, Any] = {
        "mesh": mesh.data,
        "mp_policy": policy,
        # Pipelines keep parameters gathered from a forward to its backward: other micro-batches come in between.
        "reshard_after_forward": cfg.zero == 3 and mesh.layout.pp == 1,
    }
    if cfg.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for block in model.blocks.values():
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces


def assert_tied(model: Transformer) -> None:
    """A tied head is the embedding itself; nothing that was applied may have given it a copy."""
    if model.cfg.tie_embeddings and model.embed is not None:
        assert model.head is None and model.head_weight is model.embed.weight
