"""AdamW with the documented decay groups, the gradient norm, and fp16's loss scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from castalia.config.schema import LossScale, Optimizer
from castalia.errors import TrainingError

NORMS = {"norm", "norm1", "norm2", "qk_norm"}
ROW_PARALLEL_BIASES = (".attn.out.bias", ".mlp.down.bias")


def decays(name: str) -> bool:
    """Whether weight decay applies: to everything but biases and the parameters of norms."""
    *_, module, kind = name.split(".")
    return kind != "bias" and module not in NORMS


def make_optimizer(model: nn.Module, cfg: Optimizer, summed_bias_ranks: int = 1) -> torch.optim.AdamW:
    """AdamW whose state exists from the start, so that memory is taken at once and step 0 can be saved.

    `summed_bias_ranks` multiplies the rate of row-parallel biases: where the original added T copies of such a bias,
    each of them took a full step.
    """
    groups: dict[tuple[float, int], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = summed_bias_ranks if name.endswith(ROW_PARALLEL_BIASES) else 1
            groups[cfg.weight_decay if decays(name) else 0.0, scale].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "lr_scale": scale} for (decay, scale), params in groups.items()],
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all gradients, on their device; not finite if any element is not."""
    return torch.nn.utils.get_total_norm(grads)


class LossScaler:
    """fp16's loss scale: fixed, or one of DeepSpeed's two dynamic rules, step for step.

    `zero` (ZeRO 1 to 3): an overflow first uses up the hysteresis, then halves; `window` good steps after the last
    overflow the scale doubles and the hysteresis is refilled. `stage0`: every overflow halves, and the scale doubles
    after one good step more than the window.
    """

    def __init__(self, cfg: LossScale, rule: str):
        self.cfg = cfg
        self.rule = "static" if cfg.static else rule
        self.scale = cfg.static or cfg.initial
        self.iteration = 0
        self.last_overflow = -1
        self.hysteresis = cfg.hysteresis

    def update(self, overflow: bool) -> None:
        """Takes note of one step. Raises TrainingError if the scale cannot get any smaller under the `zero` rule."""
        if self.rule == "zero":
            self._update_zero(overflow)
        elif self.rule == "stage0":
            self._update_stage0(overflow)
        if overflow:
            self.last_overflow = self.iteration
        self.iteration += 1

    def _update_zero(self, overflow: bool) -> None:
        cfg = self.cfg
        if overflow:
            if cfg.hysteresis > 1 and self.hysteresis > 1:
                self.hysteresis -= 1
                return
            if self.scale <= cfg.minimum:
                raise TrainingError(
                    f"step {self.iteration + 1} overflows at the smallest loss scale ({cfg.minimum:g}); train in bf16 "
                    "(precision.compute=bf16), lower optimizer.lr, or allow a smaller precision.loss_scale.minimum"
                )
            self.scale = max(self.scale / 2, cfg.minimum)
            return
        if cfg.consecutive_hysteresis:
            self.hysteresis = cfg.hysteresis
        if (self.iteration - self.last_overflow) % cfg.window == 0:
            self.hysteresis = cfg.hysteresis
            self.scale *= 2

    def _update_stage0(self, overflow: bool) -> None:
        if overflow:
            self.scale = max(self.scale / 2, self.cfg.minimum)
            return
        good = self.iteration - self.last_overflow - 1
        if good > 0 and good % self.cfg.window == 0:
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """The counters under DeepSpeed's names."""
        return {
            "cur_scale": self.scale,
            "cur_iter": self.iteration,
            "last_overflow_iter": self.last_overflow,
            "cur_hysteresis": self.hysteresis,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        self.scale = float(state["cur_scale"])
        self.iteration = int(state.get("cur_iter", 0))
        self.last_overflow = int(state.get("last_overflow_iter", -1))
        self.hysteresis = int(state.get("cur_hysteresis", self.cfg.hysteresis))
