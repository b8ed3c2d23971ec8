"""A Mamba block's tensors in GPT-NeoX and in transformers, which call them alike."""

from __future__ import annotations

from castalia.checkpoint.rules import Interleave, Inverse, Op, Reshape, Rule, Same
from castalia.config.schema import ModelConfig


def mamba_rules(model: ModelConfig, theirs: str) -> list[Rule]:
    """The rules of a Mamba block's mixer, in the order and by the names of GPT-NeoX's modules, which are those of the
    original and of transformers, too. `theirs`: what their names begin with."""
    sizes, width, ours = model.mamba_sizes, model.mamba_width, "blocks.{i}.mamba."
    halves = Inverse(Interleave((width, width)))

    def linear(own: str, name: str, op: Op | None = None, bias: bool = sizes.linear_bias) -> list[Rule]:
        """The rules of a matrix and its bias; of two matrices of ours, separated by a space, each has its own."""
        kinds = ("weight", "bias") if bias else ("weight",)
        parts = own.split()
        return [
            Rule(" ".join(f"{ours}{part}.{kind}" for part in parts), f"{theirs}{name}.{kind}", op or Same())
            for kind in kinds
        ]

    return [
        Rule(f"{ours}scan.a_log", f"{theirs}A_log"),
        Rule(f"{ours}scan.d", f"{theirs}D"),
        *linear("in_x in_z", "in_proj", halves),
        Rule(f"{ours}conv.weight", f"{theirs}conv1d.weight", Reshape((width, 1, sizes.taps), (width, sizes.taps))),
        *([Rule(f"{ours}conv.bias", f"{theirs}conv1d.bias")] if sizes.conv_bias else []),
        *linear("x_proj", "x_proj"),
        Rule(f"{ours}dt_proj.weight", f"{theirs}dt_proj.weight"),
        Rule(f"{ours}scan.dt_bias", f"{theirs}dt_proj.bias"),
        *linear("out", "out_proj"),
    ]
