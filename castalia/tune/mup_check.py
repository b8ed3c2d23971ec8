"""muP's coordinate check (2203.03466): how far activations move in a few steps at several widths.

Under muP they move equally far at every width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from castalia.config.schema import ModelConfig, MuPConfig, OptimizerConfig
from castalia.errors import ConfigError
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.train.optimizer import make_optimizer, set_rate

MAX_SLOPE = 0.25  # steeper is growth: a wrong parametrization gives 0.5 or 1


def at_width(cfg: ModelConfig, width: int, mup: bool) -> ModelConfig:
    """The model at another width: heads keep their size, the MLP its ratio. ConfigError where they do not divide."""
    ratio = width / cfg.hidden_size
    heads, kv_heads, inner = (size * ratio for size in (cfg.num_heads, cfg.kv_heads, cfg.mlp_width))
    if not (heads.is_integer() and kv_heads.is_integer() and inner.is_integer()):
        unit = cfg.hidden_size // math.gcd(cfg.num_heads, cfg.kv_heads, cfg.mlp_width)
        raise ConfigError(f"width {width}: heads of {cfg.head_size} allow multiples of {unit}")
    base = cfg.mup or MuPConfig()
    base = base.with_({"base_width": base.base_width or cfg.hidden_size})
    sizes = {"hidden_size": width, "num_heads": int(heads), "num_kv_heads": int(kv_heads), "mlp_size": int(inner)}
    return cfg.with_({**sizes, "mup": base if mup else None})


def movement(cfg: ModelConfig, optimizer: OptimizerConfig, tokens: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Mean distance of each activation from its initial value, after `steps` on one batch; tokens [b, t + 1]."""
    model = Transformer(cfg)
    initialize(model, cfg, seed)
    parameters = dict(model.named_parameters())
    rule = make_optimizer(parameters, optimizer, width_multiplier=cfg.width_multiplier)
    set_rate(rule, optimizer.lr)
    before = activations(model, tokens[:, :-1])
    for _ in range(steps):
        loss, count = model(tokens[:, :-1], labels=tokens[:, 1:])
        (loss / count).backward()
        rule.step()
        rule.zero_grad()
    after = activations(model, tokens[:, :-1])
    return {name: (after[name] - before[name]).abs().mean().item() for name in before}


@torch.no_grad()
def activations(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """The embedded tokens, the output of each block, and the logits, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output.clone()

        return hook

    places: dict[str, nn.Module] = {"embed": model.embed}
    places |= {f"blocks.{i}": block for i, block in model.blocks.items()}
    handles = [module.register_forward_hook(keep(name)) for name, module in places.items()]
    try:
        logits = model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return {**outputs, "logits": logits[..., : model.cfg.vocab_size]}


def coordinate_check(
    cfg: ModelConfig, optimizer: OptimizerConfig, widths: Sequence[int], *, mup: bool, steps: int = 3, seed: int = 1234
) -> dict[str, list[float]]:
    """The movement of each activation at each width: mean distance from its initial value after `steps` steps."""
    generator = torch.Generator().manual_seed(seed)
    length = min(32, cfg.max_positions or 32)
    tokens = torch.randint(cfg.vocab_size or 256, (4, length + 1), generator=generator)
    rows = [movement(at_width(cfg, width, mup), optimizer, tokens, steps, seed) for width in widths]
    return {name: [row[name] for row in rows] for name in rows[0]}


class MupVerdict(NamedTuple):
    """Whether learning rates carry over from one width to another."""

    carries_over: bool
    words: str


def judge(exponents: Mapping[str, float], has_mup: bool, base_width: int) -> MupVerdict:
    """The verdict on the exponents (`slopes`) of the parametrization that the config has."""
    growing = [f"{name} like width^{slope:.2f}" for name, slope in exponents.items() if slope > MAX_SLOPE]
    if has_mup and growing:
        return MupVerdict(False, f"does not carry over: under muP nothing may grow, but these do: {', '.join(growing)}")
    if has_mup:
        return MupVerdict(True, f"carries over: nothing grows with the width; rates are those of width {base_width:,}")
    if growing:
        return MupVerdict(
            False,
            f"does not carry over: the config has no muP, and without it these grow: {', '.join(growing)}; with "
            f"model.mup.base_width={base_width} the rates of this width hold for others",
        )
    return MupVerdict(True, "nothing grows at these rates and widths, although the config has no muP")


def slopes(widths: Sequence[int], movements: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Exponents of movement over width, by least squares on logarithms: movement like width^0.5 gives 0.5."""
    x = torch.tensor(widths, dtype=torch.float64).log()
    x -= x.mean()  # then the intercept drops out of the regression
    return {
        name: float(x @ torch.tensor(values, dtype=torch.float64).log() / (x @ x)) for name, values in movements.items()
    }
