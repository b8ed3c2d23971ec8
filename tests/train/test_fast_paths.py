"""Which kernels a build of torch brings for a device."""

from __future__ import annotations

import pytest
import torch

from castalia.train.fast_paths import attention_kernels, runs_on
from castalia.train.machine_facts import accelerator, gpu_text

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built", "able"),
    [
        ((7, 0), CU130, False),  # a V100
        ((7, 5), CU130, True),
        ((8, 9), CU130, True),  # by sm_86
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # by compute_120
        ((13, 0), CU130[:-1], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
    ],
)
def test_a_gpu_runs_what_was_built_for_its_generation(capability, built, able):
    assert runs_on(capability, built) is able


def test_doctor_says_what_a_gpu_can_do():
    gpu = {"name": "NVIDIA A100-SXM4-40GB", "memory_gib": 39.4, "capability": "8.0"}
    rates = {"bf16": 312, "fp16": 312, "fp32": 19.5}
    assert gpu_text(gpu | {"tflops": rates}).endswith("capability 8.0, bf16 312 fp16 312 fp32 19.5 TFLOP/s")
    assert gpu_text(gpu | {"tflops": None}).endswith("of unknown speed: MFU needs log.peak_tflops")


def test_doctor_says_what_this_build_of_torch_computes_on():
    kinds = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda, "Apple": torch.backends.mps.is_available()}
    begins = next((name for name, there in kinds.items() if there), "none: this build of torch is for CPUs")
    text = accelerator()
    assert text.startswith(begins) and (torch.cuda.is_available() or "CPU" in text or "no device" in text)


def test_doctor_names_the_kernel_of_each_case():
    on_hopper = dict(attention_kernels((9, 0), cudnn=True))
    assert on_hopper["training, grouped heads"] == {
        "bf16": "cuDNN",
        "fp16": "cuDNN",
        "fp32": "memory-efficient, keys repeated",
    }
    assert on_hopper["writing"]["bf16"] == "flash"
    assert on_hopper["the same, grouped heads"]["bf16"] == "memory-efficient, a bias, keys repeated"
    on_cpu = dict(attention_kernels(None, cudnn=False))
    assert on_cpu["training"]["fp32"] == "flash" and on_cpu["training with dropout 0.1"]["fp32"] == "plain"
    assert on_cpu["training on context ranks that gather"]["bf16"] == "flash, a bias"
