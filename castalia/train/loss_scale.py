"""The loss scale of training in fp16: gradients too small for fp16 are lifted into its range."""

from __future__ import annotations

from collections.abc import Mapping

from castalia.config.schema import LossScaleConfig
from castalia.errors import TrainingError


class LossScaler:
    """fp16's loss scale: fixed, or by one of DeepSpeed's two dynamic rules, step for step.

    `zero` (ZeRO 1 to 3): overflows first use up the hysteresis, then halve the scale; `window` good steps after the
    last overflow the scale doubles and the hysteresis is refilled. `stage0`: every overflow halves the scale, which
    doubles after one good step more than the window.
    """

    def __init__(self, cfg: LossScaleConfig, rule: str):
        self.cfg = cfg
        self.rule = "static" if cfg.static else rule
        self.scale = cfg.static or cfg.initial
        self.iteration = 0
        self.last_overflow = -1
        self.hysteresis = cfg.hysteresis

    def update(self, overflow: bool) -> None:
        """Updates the scale after one step. Raises TrainingError if `zero` cannot make it any smaller."""
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
        if cfg.consecutive_hysteresis:  # only overflows in a row use the hysteresis up
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
        """Scale and counters under DeepSpeed's names, as checkpoints hold them."""
        return {
            "cur_scale": self.scale,
            "cur_iter": self.iteration,
            "last_overflow_iter": self.last_overflow,
            "cur_hysteresis": self.hysteresis,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes up what `state` returned; counters that older checkpoints lack begin anew."""
        self.scale = float(state["cur_scale"])
        self.iteration = int(state.get("cur_iter", 0))
        self.last_overflow = int(state.get("last_overflow_iter", -1))
        self.hysteresis = int(state.get("cur_hysteresis", self.cfg.hysteresis))
