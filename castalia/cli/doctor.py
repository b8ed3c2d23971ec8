"""`castalia doctor`: what this machine offers, which fast paths it can take, and what each missing one costs."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from castalia.cli.plan_text import print_table

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "sve", "bf16")
OPTIONAL = {
    "tensorboard": "log.tensorboard",
    "matplotlib": "pictures (--plot, loss.png)",
    "plotext": "curves in the terminal",
    "zstandard": "reading .jsonl.zst",
    "transformers": "comparisons with Hugging Face's models",
    "sentencepiece": "SentencePiece tokenizers",
}


class FastPath(NamedTuple):
    name: str
    available: bool
    detail: str  # what makes it available, or what is missing
    cost: str  # of doing without


def command(as_json: Annotated[bool, typer.Option("--json", help="one object with everything")] = False) -> None:
    """What this machine offers, which fast paths it can take, and what each missing one costs."""
    machine, paths, packages = look_at_machine(), fast_paths(), installed()
    if as_json:
        found = {"machine": machine, "fast_paths": [path._asdict() for path in paths], "packages": packages}
        print(json.dumps(found, indent=1))
        return
    print_table("machine", ["", ""], [[name, _text(value)] for name, value in machine.items()])
    rows = [[path.name, "yes" if path.available else "no", path.detail] for path in paths]
    print_table("fast paths", ["path", "available", "why"], rows)
    for path in paths:
        if not path.available:
            print(f"missing: {path.name}: {path.cost}")
    rows = [[name, found or "not installed", OPTIONAL[name]] for name, found in packages.items()]
    print_table("optional packages", ["package", "version", "used for"], rows)


def look_at_machine() -> dict:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instructions": [flag for flag in FLAGS if flag in cpu_flags()],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    }


def fast_paths() -> list[FastPath]:
    """Each with its reason. The figures are measured ratios of training steps on two AVX-512 cores."""
    import torch

    from castalia.parallel.compile import has_compiler
    from castalia.train.hardware import choose_device, choose_dtype

    device = choose_device("auto")
    native = choose_dtype("auto", device) == torch.bfloat16
    compiles = device.type == "cuda" or has_compiler()
    glibc = platform.libc_ver()[0] == "glibc"
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        FastPath(
            "GPU",
            device.type == "cuda",
            torch.cuda.get_device_name() if device.type == "cuda" else "torch sees no CUDA device",
            "training is hundreds of times slower than on a data-centre GPU; small models remain practical",
        ),
        FastPath(
            "bf16 compute",
            native,
            f"{device.type} multiplies bf16 " + ("natively" if native else "by emulation only, so fp32 is used"),
            "matrix products run in fp32, which AMX and GPUs do at a fifth of bf16's rate or less",
        ),
        _attention_path(device.type),
        FastPath(
            "torch.compile",
            compiles,
            "train.compile=true compiles the blocks"
            if compiles
            else "CPUs need a C++ compiler: g++, or one that CXX names",
            "compiled training steps are 1.1 to 2 times faster",
        ),
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


def _attention_path(device: str) -> FastPath:
    import torch

    if device == "cpu":
        able, detail = True, "PyTorch has the flash kernel for CPUs"
    else:
        able, name = torch.cuda.get_device_capability() >= (8, 0), torch.cuda.get_device_name()
        detail = f"{name} runs the flash kernel" if able else f"{name} is older than the flash kernel's devices (8.0)"
    cost = "attention takes the memory-efficient kernel, which needs more time for long sequences"
    return FastPath("flash attention", able, detail, cost)


def installed() -> dict[str, str | None]:
    return {name: _version(name) for name in OPTIONAL}


def cpu_flags() -> set[str]:
    """Instruction sets of the first core; empty where the system does not list them."""
    lines = _cpuinfo()
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def _cpu_name() -> str:
    named = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _gpu(index: int) -> dict:
    import torch

    about = torch.cuda.get_device_properties(index)
    return {
        "name": about.name,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "capability": f"{about.major}.{about.minor}",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_text(entry) for entry in value) or "none"
    return " ".join(str(entry) for entry in value.values()) if isinstance(value, dict) else str(value)
