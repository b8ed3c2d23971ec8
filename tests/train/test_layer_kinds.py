"""Other layer kinds against GPT-NeoX's own runs: losses from the start, and from each genuine checkpoint."""

import pytest

from castalia.cli.train import read_config, train
from tests.train.test_neox_quirks import losses, original, straight  # noqa: F401 - a fixture

KINDS = [
    "moe-sinkhorn1-fp32",
    "moe-topk2-fp32",
    "gmlp-fp32",
    "amlp-fp32",
    "mamba-pp0-fp32",
    "rwkv-fp32",
    "rwkv-fp32-asis",
]
OVER_TIME = {"rwkv-fp32": ["model.rwkv_over=time"]}  # of which the original was mended


@pytest.mark.parametrize("variant", KINDS)
def test_from_nothing_but_config_and_data_the_originals_losses_come_out(fixtures, original, tmp_path, variant):  # noqa: F811
    train(original(variant, *OVER_TIME.get(variant, []), collection="neox-kinds"))
    ours, theirs = losses(tmp_path / "run"), straight(fixtures, variant, "neox-kinds")
    assert ours[0] == pytest.approx(theirs[0], abs=5e-7)  # one step of fp32
    # At first gradients of gMLP's spatial bias cancel to about 1e-7, of which Adam makes whole steps.
    assert ours == pytest.approx(theirs, abs=1e-5 if "mlp" in variant else 2e-6)


@pytest.mark.parametrize("variant", [*KINDS, "mamba-fp16-dp2-z1", "hybrid-fp16-dp2-z1"])
def test_resumed_from_the_originals_checkpoint_its_losses_come_out(fixtures, original, tmp_path, variant):  # noqa: F811
    """Stopped once more on the way, so that our own checkpoints are shown to hold everything."""
    checkpoint = fixtures / "neox-kinds" / variant / "checkpoint"
    overrides = [f"checkpoint.resume={checkpoint}", "train.exit_interval=7", *OVER_TIME.get(variant, [])]
    train(original(variant, *overrides, collection="neox-kinds"))
    train(read_config([str(tmp_path / "run"), "train.exit_interval=null"]))
    near = 2e-4 if "fp16" in variant else 2e-6
    assert losses(tmp_path / "run") == pytest.approx(straight(fixtures, variant, "neox-kinds")[5:], abs=near)
