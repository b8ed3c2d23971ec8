"""The models that a quick start chooses from: one family, Llama's, in sizes from 0.1 to 1,200 million parameters.

Nothing in them is particular to this program, so that what was trained converts to Hugging Face's Llama as it is.
"""

from __future__ import annotations

from typing import Any

from castalia.config.schema import ModelConfig, ParameterGroup
from castalia.quickstart.measured import BASE_WIDTH

SIZES = (  # layers, width
    (2, 64), (3, 96), (4, 128), (4, 192), (6, 256), (6, 320), (6, 384), (8, 512), (10, 640), (12, 768), (16, 1024),
    (20, 1280), (24, 1536), (24, 2048),
)  # fmt: skip


def architecture(layers: int, width: int, vocab_size: int, length: int) -> dict[str, Any]:
    """Llama's: RMS norms, rotary positions, a gated MLP, no biases. Heads have 64 dimensions, in narrow models 32."""
    return {
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": width // (64 if width >= 256 else 32),
        "mlp_size": -(-8 * width // 3 // 64) * 64,
        "vocab_size": vocab_size,
        "max_positions": length,
        "norm": "rmsnorm",
        "activation": "silu",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "init_method": "small_init",
        "output_init_method": "wang_init",
    }


def model_of(layers: int, width: int, vocab_size: int, length: int) -> ModelConfig:
    """The model of the family with this depth, width, vocabulary and sequence length."""
    return ModelConfig(**architecture(layers, width, vocab_size, length))


def rate_groups(width: int) -> list[dict[str, Any]]:
    """muP's rule for Adam: matrices that grow with the width on their inner side learn at 1 / width, all else as is.

    Yang et al. 2022, "Tensor Programs V", table 8. `model.mup` does the same with multipliers inside the model, which
    other programs do not know.
    """
    group = ParameterGroup(match=r"^(blocks\..*(attn|mlp)\..*|head\.)weight$", lr_scale=BASE_WIDTH / width)
    return [group.model_dump(exclude_defaults=True)]
