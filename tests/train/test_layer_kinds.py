"""Other layer kinds against GPT-NeoX's own runs: losses from the start, and from each genuine checkpoint."""

import pytest

from castalia.cli.train import read_config, train
from tests.train.test_neox_quirks import losses, original, straight  # noqa: F401 - a fixture

KINDS = ["moe-sinkhorn1-fp32", "moe-topk2-fp32"]


@pytest.mark.parametrize("variant", KINDS)
def test_from_nothing_but_config_and_data_the_originals_losses_come_out(fixtures, original, tmp_path, variant):  # noqa: F811
    train(original(variant, collection="neox-kinds"))
    assert losses(tmp_path / "run") == pytest.approx(straight(fixtures, variant, "neox-kinds"), abs=2e-6)


@pytest.mark.parametrize("variant", KINDS)
def test_resumed_from_the_originals_checkpoint_its_losses_come_out(fixtures, original, tmp_path, variant):  # noqa: F811
    """Stopped once more on the way, so that our own checkpoints are shown to hold everything."""
    checkpoint = fixtures / "neox-kinds" / variant / "checkpoint"
    overrides = [f"checkpoint.resume={checkpoint}", "train.exit_interval=7"]
    train(original(variant, *overrides, collection="neox-kinds"))
    train(read_config([str(tmp_path / "run"), "train.exit_interval=null"]))
    assert losses(tmp_path / "run") == pytest.approx(straight(fixtures, variant, "neox-kinds")[5:], abs=2e-6)
