"""An RWKV-6 block's tensors in GPT-NeoX and in RWKV's own files, which call them alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from castalia.checkpoint.rules import Reshape, Rule, with_bias
from castalia.config.schema import ModelConfig, RWKVConfig
from castalia.errors import CheckpointError


def rwkv_rules(model: ModelConfig, theirs: str) -> list[Rule]:
    """The rules of an RWKV block in the order and by the names of GPT-NeoX's modules. `theirs`: what their names begin
    with."""
    ours, h = "blocks.{i}.rwkv.", model.hidden_size
    row = Reshape((1, 1, h), (h,))

    def mixes(own: str, name: str, which: str) -> list[Rule]:
        """The shares of the token before in what each input of a part of the block sees."""
        return [Rule(f"{ours}{own}.mix_{each}", f"{theirs}{name}.time_maa_{each}", row) for each in which]

    def matrices(own: str, name: str, parts: dict[str, str]) -> list[Rule]:
        """The matrices of a part of the block, by our names."""
        return [Rule(f"{ours}{own}.{mine}.weight", f"{theirs}{name}.{its}.weight") for mine, its in parts.items()]

    alike = {part: part for part in ("receptance", "key", "value")}
    return [
        *with_bias(f"{ours}norm1", f"{theirs}ln1"),
        *with_bias(f"{ours}norm2", f"{theirs}ln2"),
        *mixes("time", "att", "xwkvrg"),
        Rule(f"{ours}time.mix_down", f"{theirs}att.time_maa_w1"),
        Rule(f"{ours}time.mix_up", f"{theirs}att.time_maa_w2"),
        Rule(f"{ours}time.scan.decay", f"{theirs}att.time_decay", row),
        Rule(f"{ours}time.decay_down", f"{theirs}att.time_decay_w1"),
        Rule(f"{ours}time.decay_up", f"{theirs}att.time_decay_w2"),
        Rule(f"{ours}time.scan.bonus", f"{theirs}att.time_faaaa"),
        *matrices("time", "att", alike | {"out": "output", "gate": "gate"}),
        *with_bias(f"{ours}time.norm", f"{theirs}att.ln_x"),
        *mixes("channels", "ffn", "kr"),
        *matrices("channels", "ffn", {"key": "key", "receptance": "receptance", "value": "value"}),
    ]


def rwkv_settings(shapes: Mapping[str, tuple[int, ...]], theirs: str, path: str) -> dict[str, Any]:
    """What the tensors of a block, whose names begin with `theirs`, say about the model: heads and sizes.

    Raises CheckpointError where they are missing, or no matrices of such a block.
    """
    needed = [
        f"{theirs}{name}" for name in ("att.time_faaaa", "ffn.key.weight", "att.time_decay_w1", "att.time_maa_w2")
    ]
    for name, dimensions in zip(needed, (2, 2, 2, 3), strict=True):
        if name not in shapes:
            raise CheckpointError(f"{path}: {name} is missing: files are mixed, or from elsewhere")
        if len(shapes[name]) != dimensions:
            raise CheckpointError(
                f"{path}: {name} has shape {list(shapes[name])}, where {dimensions} dimensions belong"
            )
    if empty := [name for name in needed if not all(shapes[name])]:
        raise CheckpointError(f"{path}: {empty[0]} has shape {list(shapes[empty[0]])}, without a value")
    (heads, _), (width, hidden), (_, decay_rank), (_, mix_rank, _) = (shapes[name] for name in needed)
    plain = ModelConfig(num_layers=1, hidden_size=hidden, num_heads=1).rwkv_width
    sizes = RWKVConfig(width=None if width == plain else width, mix_rank=mix_rank, decay_rank=decay_rank)
    return {"num_heads": heads, "rwkv": None if sizes == RWKVConfig() else sizes.model_dump()}
