"""What `castalia plan` predicts of runs whose speed was published, and how far off it is.

    python benchmarks/published.py [--efficiency 0.4]

Nothing is run: a step's time is arithmetic, and so is this table. Sources:

* N21: Narayanan et al. 2021 (2104.04473), table 1, with the micro-batches and interleaved stages of Megatron-LM's
  examples/sc21/run_table_1.sh: GPT on A100-80, blocks computed twice. Its rates count what is computed twice.
* K22: Korthikanti et al. 2022 (2205.05198), table 5: seconds of a step on A100-80, sequence parallel, of the attention
  computed twice; and the same with all of every block computed twice.
* B22: Black et al. 2022 (2204.06745): GPT-NeoX-20B on 96 A100-40, 117 TFLOP/s each, counted as N21 does.
* OLMo-core: the tokens per second and device of its release 1.2.0 on H100, fully sharded; 64 devices are assumed.
* ours: `benchmarks/gpu.py` on one H200, compiled; see RESULTS.md.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from castalia.config.schema import ModelConfig
from castalia.plan.devices import DEVICES
from castalia.plan.flops import executed_flops, neox_flops, peak_tokens_per_second
from castalia.plan.layout import Layout
from castalia.plan.memory import Compute
from castalia.plan.step_cost import EFFICIENCY, PlanRequest, evaluate_layout


@dataclass(frozen=True)
class Published:
    """A run and its speed."""

    name: str
    source: str
    model: ModelConfig
    length: int
    device: str
    layout: Layout
    seconds: float  # of a step


def gpt(layers: int, hidden: int, heads: int) -> ModelConfig:
    """A GPT as Megatron trains it."""
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, num_heads=heads, vocab_size=51200, max_positions=2048,
        position="learned", tie_embeddings=True,
    )  # fmt: skip


def olmo(layers: int, hidden: int, heads: int, mlp: int) -> ModelConfig:
    """An OLMo."""
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, num_heads=heads, mlp_size=mlp, vocab_size=100278, norm="rmsnorm",
        activation="silu", gated_mlp=True, attention_bias=False, mlp_bias=False,
    )  # fmt: skip


def pythia(layers: int, hidden: int, heads: int, vocabulary: int = 50304) -> ModelConfig:
    """A Pythia, or GPT-NeoX-20B."""
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, num_heads=heads, vocab_size=vocabulary, rotary_pct=0.25,
        parallel_residual=True,
    )  # fmt: skip


def narayanan() -> list[Published]:
    """Table 1: billions of parameters, heads, width, layers, tensor, pipeline, stages of a rank, devices, micro-batch,
    batch, TFLOP/s of a device."""
    rows = [
        (1.7, 24, 2304, 24, 1, 1, 1, 32, 16, 512, 137), (3.6, 32, 3072, 30, 2, 1, 1, 64, 16, 512, 138),
        (7.5, 32, 4096, 36, 4, 1, 1, 128, 16, 512, 142), (18.4, 48, 6144, 40, 8, 1, 1, 256, 8, 1024, 135),
        (39.1, 64, 8192, 48, 8, 2, 1, 512, 4, 1536, 138), (76.1, 80, 10240, 60, 8, 4, 3, 1024, 2, 1792, 140),
        (145.6, 96, 12288, 80, 8, 8, 2, 1536, 2, 2304, 148), (310.1, 128, 16384, 96, 8, 16, 2, 1920, 1, 2160, 155),
        (529.6, 128, 20480, 105, 8, 35, 3, 2520, 1, 2520, 163),
        (1008.0, 160, 25600, 128, 8, 64, 1, 3072, 1, 3072, 163),
    ]  # fmt: skip
    runs = []
    for billions, heads, hidden, layers, tp, pp, chunks, devices, micro, batch, tflops in rows:
        model, dp = gpt(layers, hidden, heads), devices // tp // pp
        layout = Layout(
            tp=tp, pp=pp, dp=dp, micro_batch=micro, accumulation=batch // dp // micro, recompute="full",
            stages_per_rank=chunks, pipeline="interleaved" if chunks > 1 else "1f1b",
        )  # fmt: skip
        seconds = neox_flops(model, 2048, recompute=True) * batch * 2048 / (devices * tflops * 1e12)
        runs.append(Published(f"GPT {billions:g}B", "N21", model, 2048, "a100-80", layout, seconds))
    return runs


def korthikanti() -> list[Published]:
    """Table 5: billions of parameters, heads, width, layers, pipeline, chunks, micro-batch, batch, seconds."""
    rows = [
        (22, 64, 6144, 48, 1, 1, 4, 4, 1.42, 1.10), (175, 96, 12288, 96, 8, 3, 1, 64, 18.13, 13.75),
        (530, 128, 20480, 105, 35, 3, 1, 280, 49.05, 37.83), (1000, 160, 25600, 128, 64, 1, 1, 512, 94.42, 71.49),
    ]  # fmt: skip
    runs = []
    for billions, heads, hidden, layers, pp, chunks, micro, batch, all_again, some_again in rows:
        for recompute, seconds in (("full", all_again), ("selective", some_again)):
            layout = Layout(
                tp=8, pp=pp, micro_batch=micro, accumulation=batch // micro, stages_per_rank=chunks,
                pipeline="interleaved" if chunks > 1 else "1f1b", recompute=recompute,
                sequence_parallel=recompute == "selective",
            )  # fmt: skip
            name = f"GPT {billions}B, recompute {recompute}"
            runs.append(Published(name, "K22", gpt(layers, hidden, heads), 2048, "a100-80", layout, seconds))
    return runs


def others() -> list[Published]:
    """GPT-NeoX-20B, OLMo-core, and our own."""
    neox = pythia(44, 6144, 64, 50432)
    layout = Layout(tp=2, pp=4, dp=12, zero=1, micro_batch=4, accumulation=32, recompute="full")
    seconds = neox_flops(neox, 2048, recompute=True) * layout.batch * 2048 / (96 * 117e12)
    runs = [Published("GPT-NeoX-20B", "B22", neox, 2048, "a100-40", layout, seconds)]
    for name, model, micro, rate in (
        ("1B", olmo(18, 2048, 16, 5632), 4, 46_000),
        ("7B", olmo(32, 4096, 32, 11008), 2, 9_850),
        ("13B", olmo(40, 5120, 40, 13824), 1, 4_500),
    ):
        layout = Layout(dp=64, zero=3, micro_batch=micro, recompute="selective")
        runs.append(Published(f"OLMo {name}", "OLMo-core", model, 4096, "h100", layout, micro * 4096 / rate))
    for name, model, seconds in (("1.4b", pythia(24, 2048, 16), 0.5502), ("410m", pythia(24, 1024, 16), 0.1998)):
        runs.append(Published(f"pythia-{name}", "ours", model, 2048, "h200", Layout(micro_batch=16), seconds))
    return runs


def everything() -> list[Published]:
    """All runs."""
    return [*narayanan(), *korthikanti(), *others()]


def predicted(run: Published, efficiency: float) -> float:
    """Seconds of its step by the plan's cost model."""
    device, compute = DEVICES[run.device], Compute(precision="bf16")
    job = PlanRequest(run.model, run.length, run.layout.batch, run.layout.gpus, device, compute, efficiency)
    return evaluate_layout(job, run.layout).costs.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY)
    efficiency = parser.parse_args().efficiency
    print("| run | source | devices | layout | s a step | MFU | executed | planned s | planned / measured |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios = []
    for run in everything():
        layout, device = run.layout, DEVICES[run.device]
        tokens = layout.batch * run.length
        rate = tokens / run.seconds
        mfu = rate / peak_tokens_per_second(run.model, run.length, layout.gpus, device.tflops * 1e12)
        done = executed_flops(run.model, run.length, layout.recompute) * rate / layout.gpus / device.tflops / 1e12
        ratios.append(predicted(run, efficiency) / run.seconds)
        print(
            f"| {run.name} | {run.source} | {layout.gpus} {device.name} "
            f"| tp {layout.tp}, pp {layout.pp}, dp {layout.dp} "
            f"| {run.seconds:.3g} | {mfu:.1%} | {done:.1%} | {ratios[-1] * run.seconds:.3g} | {ratios[-1]:.2f} |"
        )
    print(f"\nplanned / measured: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
