"""Which matrices `precision.compute=fp8` multiplies in float8, and which of them stay in bf16 because of their size."""

from __future__ import annotations

from functools import cache

from castalia.config.attention_kernels import Capability
from castalia.config.schema import ModelConfig, RunConfig
from castalia.config.tensor_table import row_of, tensor_shapes
from castalia.errors import ConfigError

MULTIPLE = 16  # of rows and columns, which torch._scaled_mm asks for on GPUs
FIRST_CAPABILITY: Capability = (8, 9)  # of GPUs that multiply float8: Ada, Hopper, Blackwell
KINDS = ("attention qkv", "attention out", "mlp up", "mlp gate", "mlp down")


def activation_type(compute: str) -> str:
    """The type of activations, and of all but a float8 run's large products, where `precision.compute` is so."""
    return "bf16" if compute == "fp8" else compute


def refuse_float8(name: str, capability: Capability) -> None:
    """Raises ConfigError for a GPU that does not multiply float8."""
    if capability < FIRST_CAPABILITY:
        raise ConfigError(
            "precision.compute=fp8 needs GPUs of compute capability {}.{} or newer".format(*FIRST_CAPABILITY)
            + f" (Ada, Hopper, Blackwell), and {name} "
            + "has {}.{}; set precision.compute=bf16".format(*capability)
        )


@cache
def float8_matrices(model: ModelConfig, tp: int) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Modules that multiply in float8 with a tensor rank's [rows, columns] of their weight; and those that would, but
    for a size that is no multiple of 16. The matrices of attention and of dense MLPs; experts and other kinds do not.
    """
    fitting: dict[str, tuple[int, int]] = {}
    others = []
    for name, shape in tensor_shapes(model.with_({"vocab_size": model.vocab_size or 1})).items():
        row = row_of(name)
        if row.kind not in KINDS:
            continue
        rows, columns = (size // tp if dim == row.tp_dim else size for dim, size in enumerate(shape))
        if rows % MULTIPLE or columns % MULTIPLE:
            others.append(name.removesuffix(".weight"))
        else:
            fitting[name.removesuffix(".weight")] = rows, columns
    return fitting, others


def describe_float8(config: RunConfig) -> str:
    """Which matrices a run multiplies in float8, in words; empty where no model is known."""
    if config.model is None:
        return ""
    fitting, others = float8_matrices(config.model, config.parallel.tp)
    kinds = list(dict.fromkeys(row_of(f"{name}.weight").module for name in fitting))
    text = f"{' and '.join(kinds)} of {len({name.split('.')[1] for name in fitting})} blocks multiply in float8"
    text += ", with a scale for each tensor, all else in bf16"
    if others:
        named = dict.fromkeys(row_of(f"{name}.weight").module for name in others)
        text += f"; {', '.join(named)} also in bf16, having a size that is no multiple of {MULTIPLE}"
    return text
