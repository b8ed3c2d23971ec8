"""What the machine offers: device, compute type, free memory, peak matmul rate, and the C library's allocator."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch

from castalia.config.float8_matrices import activation_type, refuse_float8
from castalia.errors import ConfigError
from castalia.machine import allowed_memory, free_memory, usable_cores
from castalia.parallel.rendezvous import world_size
from castalia.plan.devices import auto_precision, find_device, this_cpu
from castalia.units import GiB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """The config's name of a dtype: "fp32", "bf16" or "fp16"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def machine_name(device: torch.device, ranks: int = 1) -> str:
    """What a run computes on, in words: "CPU, 2 cores", "8 x NVIDIA H200"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{ranks} x {name}" if ranks > 1 else name
    if device.type == "mps":
        return "Apple's GPU (mps)"
    processes = f", {ranks} processes" if ranks > 1 else ""
    return f"CPU, {usable_cores()} cores{processes}"


def choose_device(wanted: str) -> torch.device:
    """The device of `train.device`; `auto` is a GPU where there is one, Apple's for a single process alone.

    Raises ConfigError for a missing GPU, and for several processes that are to share Apple's.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device; set train.device=cpu or =auto")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("train.device=mps, but torch sees none of Apple's GPUs; set train.device=cpu or =auto")
    if wanted == "mps" and world_size() > 1:
        raise ConfigError("train.device=mps is for one process: torch.distributed has no mps; set train.device=cpu")
    if wanted == "auto":
        apple = torch.backends.mps.is_available() and world_size() == 1
        wanted = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The type of activations; `auto` is bf16 where the device multiplies it natively, else fp32."""
    if wanted == "auto":
        wanted = auto_precision(has_bf16(device))
    return DTYPES[activation_type(wanted)]


def require_float8(device: torch.device) -> None:
    """Raises ConfigError for a GPU that does not multiply float8. CPUs multiply the same values in bf16."""
    if device.type == "mps":
        raise ConfigError("precision.compute=fp8 is for NVIDIA's GPUs, and Apple's have no float8; set =fp32")
    if device.type == "cuda" and torch.version.hip:
        raise ConfigError(
            "precision.compute=fp8 is for NVIDIA's GPUs, as AMD's have other formats; set precision.compute=bf16"
        )
    if device.type == "cuda":
        refuse_float8(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and this_cpu().bf16  # Apple's GPUs multiply fp32 as fast


def repeat_bits() -> None:
    """Makes kernels deterministic: they give the same bits each time, or raise RuntimeError where they cannot.

    Must be called before the first kernel and the first collective, because cuBLAS and NCCL read their variables then.
    `warn_only` is not set, because attention would then still add up its gradients in any order. In-switch sums
    (NVLS) are disabled, as in Megatron-LM's deterministic mode.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    torch.use_deterministic_algorithms(True)
    # Filling uninitialised memory takes time and only changes values that are read by mistake.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak floating-point operations per second in matrix products: measured on CPUs, None where it is unknown."""
    if device.type == "mps":
        return None
    if device.type == "cpu":
        return None if dtype == torch.float16 else measured_flops(dtype)  # CPUs emulate fp16, a thousand times slower
    known = find_device(torch.cuda.get_device_name(device))
    if known is None or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return None
    return known.peak_tflops(name_of(dtype)) * 1e12


def measured_flops(dtype: torch.dtype, size: int = 1024) -> float | None:
    """Operations per second of the fastest of a few matrix products, in about 0.1 s. None on a busy machine."""
    busy_s, begin = time.process_time(), time.perf_counter()
    rate = present_flops(dtype, size)
    busy_s, seconds = time.process_time() - busy_s, time.perf_counter() - begin
    return rate if had_its_cores(busy_s, seconds, torch.get_num_threads()) else None


def present_flops(dtype: torch.dtype, size: int = 1024) -> float:
    """The same, also on a busy machine, where it is what other programs leave."""
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    a @ b
    best, begin = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) < begin + 0.1:
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def had_its_cores(busy_s: float, seconds: float, threads: int) -> bool:
    """Whether a busy process had a core for each of its threads: CPU seconds close to `seconds` x `threads`."""
    return busy_s > 0.9 * seconds * threads


def usable_memory(device: torch.device, communicators: int) -> int:
    """Bytes that a rank of `communicators` process groups can allocate on its device, counted as plans count them.

    It is the same each time, whatever other programs do. Processes of a machine share its memory.
    """
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    else:  # Apple's GPUs use the same memory
        total = allowed_memory() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    name = "cuda" if device.type == "cuda" else "cpu"
    return replace(this_cpu(), name=name, memory_gib=total / GiB).usable_bytes(communicators)


def device_and_memory() -> tuple[str, int]:
    """What a run would train on, and its free bytes."""
    device = choose_device("auto")
    if device.type == "cuda":
        return "cuda", torch.cuda.mem_get_info(device)[0]
    return device.type, free_memory()  # Apple's GPUs use the same memory
