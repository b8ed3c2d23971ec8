"""A dump shaped like GPT-NeoX-20B's: 44 layers on 2 tensor x 4 pipeline ranks, fp16, ZeRO 1 over 2. Of any size.

    python -m tests.checkpoint.synthetic FOLDER [HIDDEN_SIZE]

A hidden size of 512 gives 2.6 GB. One pipeline stage at a time is in memory.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch

from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import BLOCK, shapes_of
from castalia.model.init_std import standard_deviation
from tests.checkpoint.neox_writer import ROLES, config_yml, write_rank

TP, PP, DP = 2, 4, 2
ERA = "v2"
THEIRS = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
}  # fmt: skip
OUTPUTS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
SUMMED = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")


def shape_of_20b(
    hidden_size: int = 6144, vocab_size: int = 50432, num_layers: int = 44, num_heads: int = 64
) -> ModelConfig:
    """The model, or a smaller one of its kind."""
    return ModelConfig(
        num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads, vocab_size=vocab_size, vocab_multiple=1,
        max_positions=2048, rotary_pct=0.25, parallel_residual=True,
        init_method="small_init", output_init_method="wang_init",
    )  # fmt: skip


def write_20b(folder: Path, model: ModelConfig, step: int = 150000, optimizer: bool = True) -> Path:
    """Write `folder/latest` and the step's folder, which is returned. Values are drawn anew for every tensor."""
    roles, kind = (ROLES, "zero") if optimizer else (("master",), "none")
    path = folder / f"global_step{step}"
    (path / "configs").mkdir(parents=True)
    (path / "configs" / "config.yml").write_text(config_yml(model))
    positions = [0, *range(2, model.num_layers + 2), model.num_layers + 3, model.num_layers + 4]
    cuts = [len(positions) * stage // PP for stage in range(PP + 1)]
    for stage, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        parts: list[dict[str, dict]] = [{role: {} for role in roles} for _ in range(TP)]
        for position in positions[first:last]:
            for role in roles:
                for name, tensor in layer(model, position, role).items():
                    for rank in range(TP):
                        parts[rank][role][f"{position}.{name}"] = _on_rank(name, tensor, role, rank)
            for rank in range(TP):
                _write_layer(path, position, rank, parts[rank]["master"])
        for rank in range(TP):
            write_rank(
                path, model, stage * TP + rank, parts[rank], {}, TP, PP, DP, kind, ERA, True, True, torch.float16
            )
    (folder / "latest").write_text(path.name)
    return path


def _write_layer(path: Path, position: int, rank: int, masters: dict[str, torch.Tensor]) -> None:
    start = f"{position}."
    named = OrderedDict((n.removeprefix(start), tensor.half()) for n, tensor in masters.items() if n.startswith(start))
    torch.save(named, path / f"layer_{position:02d}-model_{rank:02d}-model_states.pt")


def layer(model: ModelConfig, position: int, role: str) -> dict[str, torch.Tensor]:
    """The whole tensors of one place in the pipeline, by their names inside it. Weights spread like fresh ones."""
    generator = torch.Generator().manual_seed(position * len(ROLES) + ROLES.index(role))
    h, last = model.hidden_size, model.num_layers + 2
    vocabulary = (model.padded_vocab_size, h)
    norm = {"norm.weight": (h,), "norm.bias": (h,)}
    ends = {0: {"word_embeddings.weight": vocabulary}, last + 1: norm, last + 2: {"final_linear.weight": vocabulary}}
    shapes = ends.get(position) or {
        _their(name.removeprefix("blocks.{i}.")): shape for name, shape in shapes_of(BLOCK, model).items()
    }
    return {name: _values(model, name, shape, role, generator) for name, shape in shapes.items()}


def _their(name: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{THEIRS[module]}.{kind}"


def _values(
    model: ModelConfig, name: str, shape: tuple[int, ...], role: str, generator: torch.Generator
) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if role != "master":
        return noise * 1e-3 if role == "exp_avg" else noise.square() * 1e-6
    if len(shape) == 1:
        return noise * 0.01 + (1.0 if "norm.weight" in name else 0.0)
    method = model.output_init_method if name in OUTPUTS else model.init_method
    return noise * standard_deviation(model, method, shape)


def _on_rank(name: str, tensor: torch.Tensor, role: str, rank: int) -> torch.Tensor:
    """Its part of the rank; of the row-parallel biases a share, which the ranks add up."""
    if name in OUTPUTS:
        return tensor.chunk(TP, 1)[rank].clone()
    if any(part in name for part in ("word_embeddings", "final_linear", "query_key_value", "h_to_4h")):
        return tensor.chunk(TP, 0)[rank].clone()
    return tensor / TP if role == "master" and name in SUMMED else tensor


if __name__ == "__main__":
    print(write_20b(Path(sys.argv[1]), shape_of_20b(int(sys.argv[2]) if len(sys.argv) > 2 else 512)))
