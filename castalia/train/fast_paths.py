"""The fast paths that training can take on this machine, and what each missing one costs."""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import torch

from castalia.config.attention_kernels import Capability, choose_kernel
from castalia.model.attention import capability, prefers_cudnn
from castalia.parallel.compile import code_folder, missing_compiler
from castalia.train.hardware import has_bf16, machine_name

# What attention is asked for: names with the arguments of `choose_kernel`.
TRAINING: dict[str, Any] = {"sight": "causal", "training": True}
CASES: dict[str, dict[str, Any]] = {
    "training": TRAINING,
    "training, grouped heads": TRAINING | {"grouped": True},
    "training with dropout 0.1": TRAINING | {"dropout": 0.1},
    "training with ALiBi, a window or masked documents": TRAINING | {"sight": "bias"},
    "the same, grouped heads": TRAINING | {"sight": "bias", "grouped": True},
    "training on context ranks that gather": TRAINING | {"sight": "last causal"},
    "writing": {"sight": "everything", "writing": True},
    "writing after prompts of different lengths": {"sight": "bias", "writing": True},
}


class FastPath(NamedTuple):
    """One fast path on this machine."""

    name: str
    available: bool
    detail: str  # what makes it available, or what is missing
    cost: str  # of training without it


def fast_paths(device: torch.device) -> list[FastPath]:
    """All fast paths with the reason for each. Costs are ratios of training steps, measured on two AVX-512 cores."""
    native, lacking = has_bf16(device), lacking_kernels() if device.type == "cuda" else None
    glibc = platform.libc_ver()[0] == "glibc"
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        FastPath(
            "GPU",
            device.type != "cpu" and not lacking,
            lacking or ("torch sees no CUDA device" if device.type == "cpu" else machine_name(device)),
            "training is hundreds of times slower than on a data-centre GPU; small models remain practical",
        ),
        FastPath(
            "bf16 compute",
            native,
            f"{device.type} multiplies bf16 " + ("natively" if native else "no faster than fp32, which is used"),
            "matrix products run in fp32, on GPUs and with AMX at a fifth of the speed of bf16 or less"
            + ("; precision.compute=fp16 is fast on this GPU" if device.type == "cuda" else ""),
        ),
        _attention(device),
        _compiling(device.type),
        FastPath(
            "wide vectors",
            capability.startswith("AVX512"),
            f"torch uses {capability}",
            "CPU kernels take up to twice as long",
        ),
        FastPath(
            "allocator",
            glibc,
            "glibc is told to keep freed memory" if glibc else "this C library cannot be told to keep freed memory",
            "CPU steps take 1.3 to 2 times as long, because memory goes back to the system after each",
        ),
    ]


def lacking_kernels() -> str | None:
    """Why this build of torch does not run on the GPU; None if it does. Builds for CUDA 13 need sm_75 or newer."""
    capability, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if torch.version.hip or runs_on(capability, built):  # AMD's architectures have other names
        return None
    name, sm = torch.cuda.get_device_name(), "sm_{}{}".format(*capability)
    return (
        f"{name} is {sm}, but torch {torch.__version__} has kernels for {', '.join(built)}; install a build of "
        "torch for another CUDA (cu126 has sm_70)"
    )


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a GPU of this compute capability runs code that was built for the architectures in `built`.

    Code for "sm_86" runs on GPUs of generation 8 from 8.6 on, PTX ("compute_86") on every GPU from 8.6 on.

    Source: "Application compatibility" in NVIDIA's CUDA programming guide.
    """
    for architecture in built:
        kind, _, number = architecture.rstrip("af").partition("_")  # sm_90a, sm_100f
        major, minor = int(number[:-1]), int(number[-1])  # 120 is 12.0
        exact = architecture[-1] == "a"  # for one architecture alone
        if (major, minor) == capability or (not exact and major == capability[0] and minor <= capability[1]):
            return True
        if kind == "compute" and not exact and (major, minor) <= capability:
            return True
    return False


def _attention(device: torch.device) -> FastPath:
    dtype = "bf16" if has_bf16(device) else "fp32"
    cudnn = prefers_cudnn(device)
    choice = choose_kernel(capability(device), dtype, "causal", head_size=64, training=True, cudnn=cudnn)
    name = "this CPU" if device.type == "cpu" else machine_name(device)
    detail = f"{name} runs the {choice.kernel} kernel in {dtype}" + (f": {choice.why}" if choice.why else "")
    cost = "attention takes the memory-efficient kernel, which needs more time for long sequences"
    return FastPath("flash attention", choice.kernel in ("flash", "cuDNN"), detail, cost)


def attention_kernels(gpu: Capability | None, cudnn: bool) -> list[tuple[str, dict[str, str]]]:
    """Cases of attention with the kernel that each takes in bf16, fp16 and fp32, for heads of 128."""
    return [
        (name, {dtype: _kernel_in(gpu, dtype, cudnn, case) for dtype in ("bf16", "fp16", "fp32")})
        for name, case in CASES.items()
    ]


def _kernel_in(gpu: Capability | None, dtype: str, cudnn: bool, case: dict[str, Any]) -> str:
    choice = choose_kernel(gpu, dtype, head_size=128, cudnn=cudnn, **case)
    notes = {"a bias": choice.sight == "bias", "keys repeated": choice.repeats}
    return ", ".join([choice.kernel, *(note for note, holds in notes.items() if holds)])


def _compiling(device: str) -> FastPath:
    """Whether this machine can compile; what train.compile=auto decides for a run is in `compiling.py`."""
    missing = missing_compiler(device)
    when = "when train.compile=true" if device == "cpu" else "in runs that repay it"
    detail = f"blocks are compiled {when}; their code is kept in {code_folder()} (TORCHINDUCTOR_CACHE_DIR)"
    cost = "1.01 to 1.07 times as long" if device == "cpu" else "an expected third longer (not measured)"
    return FastPath("torch.compile", not missing, f"needs {missing}" if missing else detail, f"eager steps take {cost}")
