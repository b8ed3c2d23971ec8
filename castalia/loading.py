"""Build and fill the model of a checkpoint. `castalia.checkpoint` itself knows only tensors, no networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import LoadReport, architecture, load_shards, load_tokenizer_for, require_finite
from castalia.checkpoint.tensors import Checkpoint, Shard
from castalia.config.schema import CompleteConfig, DataConfig, ParallelConfig, TokenizerConfig
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.model.layers import hold_in
from castalia.model.transformer import Transformer
from castalia.parallel.rank_grid import check_run, layout
from castalia.parallel.rendezvous import world_size

if TYPE_CHECKING:
    from castalia.parallel.inference import SplitModel
    from castalia.parallel.mesh import Mesh

M = TypeVar("M", bound=Transformer)


def tokenizer_at(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint of any format, or the one in a file such as tokenizer.json or in a folder of such.

    Raises CheckpointError where a checkpoint names no tokenizer, DataError where a file cannot be read.
    """
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
        return load_tokenizer_for(open_checkpoint(path))
    return load_tokenizer(TokenizerConfig(path=str(path)))


def build_model(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of an opened checkpoint, see `build_as`."""
    return build_as(Transformer, checkpoint, device, dtype)


def build_as(kind: type[M], checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype | None) -> M:
    """The model of an opened checkpoint in eval mode, an instance of `Transformer` or of a class made from it.

    `dtype`: of the computation and the parameters, but for those that stay fp32; None for fp32. Raises CheckpointError
    as `load_shards` does.
    """
    cfg = architecture(checkpoint)
    with torch.device("meta"):
        model = kind(cfg, exact=checkpoint.config is not None and checkpoint.config.neox_exact)
    hold_in(model, dtype or torch.float32)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            # `to_empty` does the same, but imports sympy for it, which takes half a second
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)))
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: Transformer, checkpoint: Checkpoint) -> LoadReport:
    """Fill every parameter of a whole model. Errors as for `load_shards`."""
    return load_shards({name: Shard.whole(p) for name, p in model.named_parameters()}, model.cfg, checkpoint)


def split_config(checkpoint: Checkpoint, tp: int, pp: int, world: int, seq_length: int | None = None) -> CompleteConfig:
    """A config that says how the checkpoint's model lies on `world` ranks. ConfigError where it cannot."""
    model = architecture(checkpoint)
    config = CompleteConfig(
        model=model,
        parallel=ParallelConfig(tp=tp, pp=pp),
        data=DataConfig(seq_length=seq_length or model.max_positions or 1),
        neox_exact=checkpoint.config is not None and checkpoint.config.neox_exact,
    )
    check_run(config, world)
    return config


def load_split(
    checkpoint: Checkpoint, tp: int, pp: int, dtype: torch.dtype, device: torch.device, mesh: Mesh | None = None
) -> SplitModel:
    """This process's part of the checkpoint's model, for writing and for log-probabilities.

    `mesh`: of the ranks, for several models on the same ones; without it a new one is built.
    """
    # Here because meshes and shards take a second to import.
    from castalia.parallel.inference import SplitModel, empty_stage, inference_mesh
    from castalia.parallel.shards import part

    config = split_config(checkpoint, tp, pp, world_size())
    mesh = mesh or inference_mesh(layout(config.parallel, world_size()), device.type)
    model = SplitModel(empty_stage(config.model, mesh, dtype, device, config.neox_exact), mesh, dtype, device)
    # The local tensor, the whole shape, and where the one begins in the other.
    shards = {name: Shard(*part(parameter)[:3]) for name, parameter in model.stage.named_parameters()}
    load_shards(shards, config.model, checkpoint)
    require_finite({name: shard.tensor for name, shard in shards.items()}, checkpoint.path)
    return model
