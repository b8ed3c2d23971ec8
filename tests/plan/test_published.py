"""What plan predicts of runs whose speed was published."""

from __future__ import annotations

import statistics

from benchmarks.published import everything, predicted
from castalia.plan.devices import DEVICES
from castalia.plan.flops import peak_tokens_per_second
from castalia.plan.step_cost import EFFICIENCY


def test_predictions_are_within_what_the_documentation_says() -> None:
    ratios = [predicted(run, EFFICIENCY) / run.seconds for run in everything()]
    assert min(ratios) > 0.7 and max(ratios) < 1.35
    assert 0.9 < statistics.median(ratios) < 1.1


def test_the_published_share_of_the_peak_comes_out() -> None:
    """Table 5 of 2205.05198 tells seconds and MFU, which holds attention whole where ours holds the causal half."""
    mfu = {}
    for run in everything():
        rate = run.layout.batch * run.length / run.seconds
        peak = peak_tokens_per_second(run.model, run.length, run.layout.gpus, DEVICES[run.device].tflops * 1e12)
        mfu[run.name] = rate / peak
    published = {"22B": 0.415, "175B": 0.514, "530B": 0.560, "1000B": 0.563}
    for name, share in published.items():
        assert 0.97 * share < mfu[f"GPT {name}, recompute selective"] < share
