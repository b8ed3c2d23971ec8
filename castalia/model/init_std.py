"""The standard deviation of initial values, for each method of initialisation. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import row_of


def standard_deviation(cfg: ModelConfig, method: str, shape: Sequence[int]) -> float:
    """Expected standard deviation of a matrix [out, in]; with the orthogonal methods it is exact.

    small_init: Nguyen & Salazar, 1910.05895; wang_init: mesh-transformer-jax; the others as in `torch.nn.init`.
    """
    deviations = {
        "normal": cfg.init_std,
        "scaled_normal": cfg.init_std / math.sqrt(2 * cfg.num_layers),
        "single_residual_scaled_normal": cfg.init_std / math.sqrt(cfg.num_layers),
        "small_init": math.sqrt(2 / (5 * cfg.hidden_size)),
        "wang_init": 2 / cfg.num_layers / math.sqrt(cfg.hidden_size),
        "xavier_uniform": math.sqrt(2 / sum(shape)),
        "xavier_normal": math.sqrt(2 / sum(shape)),
        "orthogonal": 1 / math.sqrt(max(shape)),
        "scaled_orthogonal": math.sqrt(2 / cfg.num_layers) / math.sqrt(max(shape)),
    }
    return deviations[method]


def mup_scale(cfg: ModelConfig, method: str, name: str) -> float:
    """The factor of muP on the standard deviation: matrices of the blocks shrink like 1 / sqrt(width), all other
    tensors keep the spread that they have at the base width (Yang et al., 2203.03466)."""
    if cfg.mup is None:
        return 1.0
    follows_width = method in ("small_init", "wang_init")  # they shrink like 1 / sqrt(width) without muP
    power = 0.5 * follows_width - 0.5 * (row_of(name).mup == "matrix")
    return cfg.mup.init_scale * cfg.width_multiplier**power
