"""What the machine offers: device, compute type, peak matmul rate, and the C library's allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import time

import torch

from castalia.errors import ConfigError
from castalia.plan.devices import auto_precision, find_device, this_cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device; set train.device=cpu or =auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The type of activations; `auto` is bf16 where the device multiplies it natively, else fp32."""
    if wanted == "auto":
        wanted = auto_precision(has_bf16(device))
    return DTYPES[wanted]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return this_cpu().bf16


def repeat_bits() -> None:
    """Has the kernels of every device give the same bits each time, or raise RuntimeError where they cannot.

    Called before the first kernel and the first collective, because cuBLAS and NCCL read their variables then. With
    `warn_only` attention would go on adding its gradients in any order, so it is not set. The sums that switches make
    (NVLS) are left out as Megatron-LM's deterministic mode does.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    torch.use_deterministic_algorithms(True)
    # What this fills is read by mistake only, and filling takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Stops glibc from handing the logits' memory back to the system, page by page, in every step."""
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 256 << 20)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that one device can do in matrix products: measured on CPUs, None where nobody knows."""
    if device.type == "cpu":
        return None if dtype == torch.float16 else measured_flops(dtype)  # CPUs emulate fp16, a thousand times slower
    known = find_device(torch.cuda.get_device_name(device))
    if known is None or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return None
    return known.peak_tflops(name_of(dtype)) * 1e12


def measured_flops(dtype: torch.dtype, size: int = 1024) -> float | None:
    """Best of a few matrix products, about a tenth of a second in all. None where other work slowed them down."""
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    a @ b
    best, begin, busy_s = float("inf"), time.perf_counter(), time.process_time()
    while (start := time.perf_counter()) < begin + 0.1:
        a @ b
        best = min(best, time.perf_counter() - start)
    busy_s, seconds = time.process_time() - busy_s, time.perf_counter() - begin
    return 2 * size**3 / best if had_its_cores(busy_s, seconds, torch.get_num_threads()) else None


def had_its_cores(busy_s: float, seconds: float, threads: int) -> bool:
    """Whether a process that was busy all the time had a core for each of its threads."""
    return busy_s > 0.9 * seconds * threads
