"""What this machine offers: processor, memory, GPUs, fast paths, optional packages. `castalia doctor` prints it."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from castalia.machine import processor_name, total_memory, usable_cores
from castalia.plan.devices import cpu_flags, find_device

if TYPE_CHECKING:
    from castalia.train.fast_paths import FastPath

# As /proc/cpuinfo names them; the last two are ARM's.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "sve", "bf16")
OPTIONAL = {
    "tensorboard": "log.tensorboard",
    "matplotlib": "pictures (--plot, loss.png)",
    "plotext": "curves in the terminal",
    "zstandard": "reading .jsonl.zst",
    "transformers": "comparisons with Hugging Face's models",
    "sentencepiece": "SentencePiece tokenizers",
}


def look_at_machine() -> dict:
    """Versions, CPU, memory and GPUs of this machine, ready for JSON."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpu": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "instructions": [flag for flag in FLAGS if flag in cpu_flags()],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "accelerator": accelerator(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    }


def accelerator() -> str:
    """What this build of torch computes on besides the CPU, and whether such a device is there, for people."""
    import torch

    if torch.version.hip or torch.version.cuda:
        kind = (
            f"ROCm {torch.version.hip}, whose GPUs are called cuda"
            if torch.version.hip
            else f"CUDA {torch.version.cuda}"
        )
        return kind if torch.cuda.is_available() else f"{kind}, but torch sees no device"
    if torch.backends.mps.is_available():
        return "Apple's GPU (mps), for one process"
    return "none: this build of torch is for CPUs"


def fast_paths() -> list[FastPath]:
    """Those of training on the device that `auto` would choose, and that of writing text on a CPU."""
    from castalia.generate.packed_model import has_bf16_kernels
    from castalia.train.fast_paths import FastPath, fast_paths
    from castalia.train.hardware import choose_device

    able = has_bf16_kernels()
    packed = "`castalia generate` on a CPU packs weights; with --dtype int8 it reads a quarter of fp32's bytes"
    lacking = "oneDNN has no bf16 kernels for this processor"
    cost = "`castalia generate --dtype bf16` is slower on the CPU than with fp32 or int8, whose weights are packed"
    return [
        *fast_paths(choose_device("auto")),
        FastPath("packed bf16 weights", able, packed if able else lacking, cost),
    ]


def attention_kernels() -> list[tuple[str, dict[str, str]]]:
    """What attention takes on the device that `auto` would choose."""
    from castalia.model.attention import capability, prefers_cudnn
    from castalia.train import fast_paths
    from castalia.train.hardware import choose_device

    device = choose_device("auto")
    return fast_paths.attention_kernels(capability(device), prefers_cudnn(device))


def installed() -> dict[str, str | None]:
    """The versions of the optional packages; None for those that are missing."""
    return {name: _version(name) for name in OPTIONAL}


def _gpu(index: int) -> dict:
    import torch

    about = torch.cuda.get_device_properties(index)
    known = find_device(about.name)
    return {
        "name": about.name,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "capability": f"{about.major}.{about.minor}",
        # None for a GPU that the planner's table lacks.
        "tflops": known and {name: known.peak_tflops(name) for name in ("bf16", "fp16", "fp32")},
    }


def gpu_text(gpu: dict) -> str:
    """In one line: NVIDIA A100-SXM4-40GB, 39.4 GiB, capability 8.0, bf16 312 fp16 312 fp32 19.5 TFLOP/s."""
    rates = " ".join(f"{name} {rate:g}" for name, rate in (gpu["tflops"] or {}).items())
    peak = f"{rates} TFLOP/s" if rates else "of unknown speed: MFU needs log.peak_tflops"
    return f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}, {peak}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
