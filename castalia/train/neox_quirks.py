"""What `neox_exact` brings back: GPT-NeoX's defects that change numbers, by the release that a run follows.

| | v1 | current |
|---|---|---|
| clipping at 1.0, its default | on | off |
| gradients of micro-batches under the pipeline engine | averaged | summed |
| learning rate | starts at 0, decays over `end` steps counted from the warm-up's end | spike, rising cosine |
| Adam's step where the files lack it | one ahead: it counts an empty first step | stored |
| norm for clipping in fp16 without ZeRO | of the first tensor rank and stage alone | of all ranks |

A mixture of experts loses its attention with a parallel residual (`Block` of model/transformer), and its Sinkhorn
router ends after one iteration in practice (`balanced` of model/experts). RWKV blocks mix over the micro-batch in place
of time (`RWKVBlock` of model/rwkv).

In both, a row-parallel bias that was summed over T tensor ranks takes T full steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from castalia.checkpoint.tensors import Checkpoint
from castalia.config.batch import batch_plan, planned_dp
from castalia.config.neox.clipping import effective_clip_norm
from castalia.config.schema import CompleteConfig


@dataclass(frozen=True)
class NeoXQuirks:
    """The defects that act in a run; the defaults are none."""

    clip_norm: float | None
    release: str | None = None  # "v1" or "head"; None: no defects
    gradient_factor: int = 1
    summed_bias_ranks: int = 1
    adam_steps_ahead: int = 0
    norm_ranks: tuple[int, int] = (1, 1)  # of the first of so many tensor ranks and stages the norm is taken

    def stored(self) -> dict[str, object]:
        """What a checkpoint must remember, because GPT-NeoX's files are not read again."""
        if self.release is None:
            return {}
        return {
            "release": self.release,
            "summed_bias_ranks": self.summed_bias_ranks,
            "summed_micro_batches": self.gradient_factor,
            "norm_ranks": self.norm_ranks,
        }


def quirks_of(config: CompleteConfig, resumed: Checkpoint | None) -> NeoXQuirks:
    """The defects of a run that continues from the checkpoint `resumed`; None: a new run."""
    wanted = config.optimizer.clip_norm
    if not config.neox_exact:
        return NeoXQuirks(wanted)
    release = (resumed.release if resumed else None) or "head"
    ranks = resumed.summed_bias_ranks if resumed else 1
    steps_missing = resumed is not None and resumed.facts.adam_steps_stored is False
    # DeepSpeed's pipeline engine averaged micro-batches in v1, so its moments need no factor.
    if release == "v1":
        assert resumed is not None
        return NeoXQuirks(wanted, "v1", 1, ranks, int(steps_missing), resumed.norm_ranks)
    has_pipeline_engine = config.model.init_passes == 1  # GPT-NeoX uses it for one stage, too, but not without stages
    accumulation = batch_plan(config, planned_dp(config) or 1).accumulation
    return NeoXQuirks(
        clip_norm=effective_clip_norm(wanted, "head"),
        release="head",
        gradient_factor=accumulation if has_pipeline_engine else 1,
        summed_bias_ranks=ranks,
    )
