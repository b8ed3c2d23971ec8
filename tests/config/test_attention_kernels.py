import pytest

from castalia.config.attention_kernels import KernelChoice, choose_kernel, training_choice
from castalia.config.schema import ModelConfig

V100, A100, RTX4090, H100, B200, RTX5090 = (7, 0), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
CPU = None
TABLE = [
    # device, dtype, sight, the rest: kernel, keys and values are repeated
    (CPU, "bf16", "causal", {}, "flash", False),
    (CPU, "fp32", "bias", {"grouped": True}, "flash", False),
    (CPU, "fp32", "causal", {"dropout": 0.1, "training": True}, "plain", False),
    (V100, "fp16", "causal", {}, "memory-efficient", False),
    (V100, "fp16", "causal", {"grouped": True}, "memory-efficient", True),
    (V100, "fp32", "causal", {"head_size": 65}, "memory-efficient", False),
    (V100, "bf16", "causal", {}, "plain", False),
    (A100, "bf16", "causal", {"grouped": True}, "flash", False),
    (A100, "bf16", "causal", {"head_size": 60}, "flash", False),
    (A100, "bf16", "bias", {"grouped": True}, "memory-efficient", True),
    (A100, "bf16", "bias", {"head_size": 60}, "plain", False),
    (A100, "fp32", "causal", {"grouped": True}, "memory-efficient", True),
    (A100, "fp32", "causal", {"head_size": 512}, "memory-efficient", False),
    (A100, "bf16", "causal", {"head_size": 264}, "memory-efficient", False),
    (RTX4090, "bf16", "causal", {"head_size": 224}, "flash", False),
    (RTX4090, "bf16", "causal", {"head_size": 224, "training": True}, "memory-efficient", False),
    (RTX4090, "bf16", "causal", {"head_size": 256, "training": True}, "flash", False),
    (RTX5090, "bf16", "causal", {"head_size": 256, "training": True, "dropout": 0.1}, "memory-efficient", False),
    (H100, "bf16", "causal", {"grouped": True}, "cuDNN", False),
    (B200, "fp16", "causal", {"dropout": 0.125, "training": True}, "cuDNN", False),
    (H100, "bf16", "causal", {"dropout": 0.1, "training": True}, "cuDNN", False),
    (H100, "bf16", "everything", {"dropout": 0.1, "training": True}, "flash", False),
    (H100, "bf16", "causal", {"head_size": 256}, "flash", False),
    (H100, "bf16", "causal", {"cudnn": False}, "flash", False),
    (H100, "bf16", "last causal", {"grouped": True}, "flash", False),
    (H100, "bf16", "everything", {"writing": True}, "flash", False),
    (H100, "bf16", "bias", {}, "memory-efficient", False),
    (H100, "bf16", "bias", {"grouped": True, "writing": True}, "memory-efficient", True),
    (H100, "fp32", "last causal", {"grouped": True}, "memory-efficient", True),
]


@pytest.mark.parametrize(("device", "dtype", "sight", "rest", "kernel", "repeats"), TABLE, ids=str)
def test_each_case_has_its_kernel(device, dtype, sight, rest, kernel, repeats):
    choice = choose_kernel(device, dtype, sight, **({"head_size": 64} | rest))
    assert (choice.kernel, choice.repeats) == (kernel, repeats)
    assert bool(choice.why) == (kernel in ("memory-efficient", "plain"))


def test_flash_of_gpus_knows_the_last_queries_and_other_kernels_take_a_bias():
    for device, dtype in ((CPU, "fp32"), (V100, "fp16"), (V100, "bf16"), (A100, "fp32")):
        assert choose_kernel(device, dtype, "last causal", head_size=64).sight == "bias"
    for device in (A100, H100):
        assert choose_kernel(device, "fp16", "last causal", head_size=64).sight == "last causal"
    for sight in ("everything", "causal", "bias"):
        assert choose_kernel(V100, "fp16", sight, head_size=64).sight == sight


def test_reasons_name_what_is_in_the_way():
    assert choose_kernel(A100, "fp32", "causal", head_size=64).why == "flash needs 16-bit compute"
    assert choose_kernel(A100, "bf16", "bias", head_size=64).why == "flash takes no mask"
    assert choose_kernel(A100, "bf16", "bias", head_size=60) == KernelChoice(
        "plain", "bias", "flash takes no mask, and for the memory-efficient kernel heads of 60 are not a multiple of 8"
    )


def test_capped_scores_and_windows_that_no_block_has():
    capped = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, attention_softcap=50.0)
    choice = training_choice(capped, (9, 0), "bf16", 512)
    assert (choice.kernel, choice.sight, choice.repeats) == ("plain", "causal", False)
    unused = capped.with_({"attention_softcap": None, "sliding_window": 16, "window_pattern": (False,)})
    assert training_choice(unused, None, "fp32", 512).sight == "causal"
    assert training_choice(unused.with_({"window_pattern": (True, False)}), None, "fp32", 512).sight == "bias"
