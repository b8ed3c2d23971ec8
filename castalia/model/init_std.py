"""How widely each method of initialisation spreads the values of a matrix. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import row_of


def standard_deviation(cfg: ModelConfig, method: str, shape: Sequence[int]) -> float:
    """Of a matrix [out, in]. Those of the orthogonal methods are exact, the others are expected."""
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
    """muP: hidden matrices shrink like 1 / sqrt(width), the others keep the values that they have at the base width."""
    if cfg.mup is None:
        return 1.0
    follows_width = method in ("small_init", "wang_init")  # on their own
    power = 0.5 * follows_width - 0.5 * (row_of(name).mup == "matrix")
    return cfg.mup.init_scale * cfg.width_multiplier**power
