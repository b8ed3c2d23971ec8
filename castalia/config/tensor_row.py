"""A row of the table of tensors, and the rows of norms."""

from __future__ import annotations

from typing import Literal, NamedTuple

Init = Literal["random", "residual", "fan_in", "adapter", "ones", "zeros", "decays", "steps", "tiny", "by depth"]
Kind = Literal[
    "adapters", "embedding", "positions", "head", "reward head", "attention qkv", "attention out", "mlp up", "mlp gate",
    "mlp down", "router", "router bias", "experts", "shared expert", "gmlp up", "gmlp spatial", "gmlp attention",
    "gmlp down", "mamba in", "mamba conv", "mamba selection", "mamba scan", "mamba out", "rwkv mix", "rwkv decay",
    "rwkv scan", "rwkv in", "rwkv out", "rwkv channels", "norms", "biases",
]  # fmt: skip


class TensorRow(NamedTuple):
    """What follows from the name of a tensor."""

    name: str  # as in `Transformer.named_parameters()`; with {i} it stands for that tensor of every block
    shape: str  # words of `SIZES`, and "rank" in adapters
    needs: str = ""  # words of `CONDITIONS` and `LAYER_KINDS` that must all hold
    kind: Kind | None = None  # the heading under which reports list it, in the order of `Kind`; None: not listed
    # random: by model.init_method; residual: by model.output_init_method; adapter: as PEFT does; fan_in: within
    # +-1 / sqrt of `fan_in`, as torch's modules begin; decays and steps: as Mamba's; tiny and by depth: as RWKV's
    init: Init = "random"
    tp_dim: int | None = None  # the dimension that tensor parallelism splits; None: a copy on every tensor rank
    decays: bool = True  # whether weight decay applies
    mup: Literal["matrix", "vector"] = "vector"  # matrix: both dimensions grow with the width of the model
    adaptable: bool = False  # whether it is the weight of a linear map on which a LoRA adapter may sit
    # The bias of a row-parallel matrix: we add it once, after the all-reduce. GPT-NeoX with a parallel residual adds
    # it on every tensor rank, before the all-reduce.
    row_parallel_bias: bool = False
    used: bool = True  # false: nothing is computed with it, so that it never gets a gradient
    fan_in: str = ""  # the word for the inputs of the module, of a tensor whose initial values depend on them

    @property
    def module(self) -> str:
        """The module that holds the tensor, without the block: attn.qkv, norm1, head."""
        return self.name.removeprefix("blocks.{i}.").rpartition(".")[0]

    @property
    def is_drawn(self) -> bool:
        """Whether it is a matrix of random initial values, and no adapter."""
        return self.init in ("random", "residual", "tiny") or (self.init == "fan_in" and " " in self.shape)

    @property
    def stays_fp32(self) -> bool:
        """Whether it is held in fp32 whatever the model computes in."""
        return self.kind in ("mamba scan", "rwkv scan", "router bias")

    def held_bytes(self, element_bytes: int) -> int:
        """Bytes of a value where the model computes in values of so many bytes, and does not train."""
        return 4 if self.stays_fp32 else element_bytes

    @property
    def has_token_rows(self) -> bool:
        """Whether each row belongs to a token of the vocabulary, or pads it."""
        return self.shape.partition(" ")[0] == "vocab"


def norm_rows(module: str, needs: str = "", weight: str = "norm", bias: str = "hidden") -> list[TensorRow]:
    """The parameters of a norm that `model.norm` names."""
    return [
        TensorRow(f"{module}.weight", weight, f"{needs} norm_weight", "norms", "ones", decays=False),
        TensorRow(f"{module}.bias", bias, f"{needs} norm_bias", "biases", "zeros", decays=False),
    ]


def layer_norm_rows(module: str, needs: str, weight_decays: bool = False, tp_dim: int | None = None) -> list[TensorRow]:
    """A norm that is LayerNorm whatever `model.norm` says."""
    return [
        TensorRow(f"{module}.weight", "hidden", needs, "norms", "ones", tp_dim, weight_decays),
        TensorRow(f"{module}.bias", "hidden", needs, "biases", "zeros", tp_dim, False),
    ]
