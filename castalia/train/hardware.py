"""What the machine offers: device, compute type, peak matmul rate, and the C library's allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import time

import torch

from castalia.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Dense 16-bit TFLOP/s of one device, from the makers' data sheets; the first name contained in the device's counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "V100": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device; set train.device=cpu or =auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The type of activations; `auto` is bf16 where the device multiplies it natively, else fp32."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def repeat_bits() -> None:
    """Has the kernels of every device give the same bits each time, or raise RuntimeError where they cannot.

    Called before the first kernel and the first collective, because cuBLAS and NCCL read their variables then. With
    `warn_only` attention would go on adding its gradients in any order, so it is not set. The sums that switches make
    (NVLS) are left out as Megatron-LM's deterministic mode does.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # it finds mistakes, and takes time


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
    name = torch.cuda.get_device_name(device)
    known = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    return None if known is None or dtype == torch.float32 else known * 1e12


def measured_flops(dtype: torch.dtype, size: int = 1024) -> float:
    """Best of a few matrix products, about a tenth of a second in all."""
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    a @ b
    best = float("inf")
    end = time.perf_counter() + 0.1
    while (start := time.perf_counter()) < end:
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
