"""Devices by name: the facts that plans, MFU and `castalia doctor` need.

Rates are those of the vendors' data sheets for dense matrices with fp32 accumulation; GeForce cards reach half of
their 16-bit rate with it. Memory is what the driver reports, which is less than the nominal size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from castalia.config.attention_kernels import AMPERE, Capability
from castalia.config.float8_matrices import FIRST_CAPABILITY
from castalia.errors import ConfigError
from castalia.machine import first_core, total_memory, usable_cores
from castalia.units import GiB

CONTEXT_GIB = 1.0  # CUDA context, kernel code and cuBLAS workspace
COMMUNICATOR_GIB = 0.3  # buffers of one NCCL communicator
USABLE = 0.92  # share of the remaining memory; the rest is lost to fragmentation
NODE = 8  # devices of a machine, which share the fast link


@dataclass(frozen=True)
class Device:
    """A device's memory, speed and links."""

    name: str
    memory_gib: float
    tflops: float  # dense bf16 and fp16
    fp32_tflops: float  # without TF32
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s in one direction to other devices of its machine
    network: float  # GB/s in one direction to other machines, per device
    capability: Capability | None  # None: a CPU

    def usable_bytes(self, communicators: int) -> int:
        """Bytes that a rank can allocate if it belongs to `communicators` process groups."""
        reserved = 0.0 if self.name == "cpu" else CONTEXT_GIB + COMMUNICATOR_GIB * communicators
        return max(0, int((self.memory_gib - reserved) * USABLE * GiB))

    def peak_tflops(self, compute: str) -> float:
        """Peak rate of matrix products in "fp32", "bf16" or "fp16"."""
        return self.tflops if compute == "fp16" or (compute == "bf16" and self.bf16) else self.fp32_tflops

    @property
    def bf16(self) -> bool:
        """Whether it multiplies bf16 in hardware; others emulate it in fp32."""
        return bool({"amx_tile", "avx512_bf16"} & cpu_flags()) if self.capability is None else self.capability >= AMPERE

    @property
    def float8(self) -> bool:
        """Whether it multiplies float8, at twice the rate of bf16."""
        return self.capability is not None and self.capability >= FIRST_CAPABILITY

    @property
    def words(self) -> frozenset[str]:
        """The words of its name, for `find_device`."""
        return _words(self.name)


DEVICES = {
    device.name.lower(): device
    for device in (
        Device("V100-16", 15.8, 125, 15.7, 900, 150, 12.5, (7, 0)),
        Device("V100-32", 31.7, 125, 15.7, 900, 150, 12.5, (7, 0)),
        Device("V100-PCIe-16", 15.8, 112, 14, 900, 16, 12.5, (7, 0)),
        Device("V100-PCIe-32", 31.7, 112, 14, 900, 16, 12.5, (7, 0)),
        Device("T4", 14.6, 65, 8.1, 320, 16, 6, (7, 5)),
        Device("A100-40", 39.4, 312, 19.5, 1555, 300, 25, (8, 0)),
        Device("A100-80", 79.1, 312, 19.5, 2039, 300, 25, (8, 0)),
        Device("A30", 23.5, 165, 10.3, 933, 32, 12.5, (8, 0)),
        Device("A40", 44.4, 150, 37.4, 696, 32, 12.5, (8, 6)),
        Device("A10", 22.0, 125, 31.2, 600, 32, 12.5, (8, 6)),
        Device("A10G", 22.0, 70, 35, 600, 32, 12.5, (8, 6)),
        Device("A6000", 47.4, 155, 38.7, 768, 32, 12.5, (8, 6)),
        Device("3090", 23.6, 71, 35.6, 936, 32, 12.5, (8, 6)),
        Device("L4", 22.0, 121, 30.3, 300, 32, 12.5, (8, 9)),
        Device("L40", 44.4, 181, 90.5, 864, 32, 12.5, (8, 9)),
        Device("L40S", 44.4, 362, 91.6, 864, 32, 12.5, (8, 9)),
        Device("6000-Ada", 47.4, 364, 91.1, 960, 32, 12.5, (8, 9)),
        Device("4090", 23.6, 165, 82.6, 1008, 32, 12.5, (8, 9)),
        Device("H20", 95.0, 148, 44, 4000, 450, 50, (9, 0)),
        Device("H100", 79.1, 989, 67, 3350, 450, 50, (9, 0)),
        Device("H100-PCIe", 79.1, 756, 51, 2000, 64, 25, (9, 0)),
        Device("H100-NVL", 93.1, 835, 60, 3938, 64, 25, (9, 0)),
        Device("GH200", 94.5, 989, 67, 4000, 450, 50, (9, 0)),
        Device("H200", 139.8, 989, 67, 4800, 450, 50, (9, 0)),
        Device("H200-NVL", 139.8, 835, 60, 4800, 64, 25, (9, 0)),
        Device("5090", 31.3, 209, 104.8, 1792, 64, 12.5, (12, 0)),
        Device("B200", 178.3, 2250, 75, 8000, 900, 50, (10, 0)),
        Device("GB200", 184.0, 2500, 80, 8000, 900, 50, (10, 0)),
        Device("B300", 267.0, 2250, 75, 8000, 900, 100, (10, 3)),
    )
}
_USUAL = {frozenset({"v100"}): "v100-32", frozenset({"a100"}): "a100-80"}  # where a name does not say how much memory
_OTHERS = re.compile(r"mig|laptop|max|ti|super|d|\d+[abcq]")  # words that name a slice or a variant of a device


def find_device(name: str) -> Device | None:
    """The device of a name, ours or the driver's: "A100-80", "rtx4090", "NVIDIA H100 80GB HBM3". None if unknown.

    Whole words must match, so that an L40 is not taken for an L4; the device with the most matching words is chosen.
    """
    words = _words(name)
    if any(map(_OTHERS.fullmatch, words)):
        return None
    matching = [device for device in DEVICES.values() if device.words <= words]
    usual = next((DEVICES[usual] for key, usual in _USUAL.items() if key <= words), None)
    return max(matching, key=lambda device: len(device.words), default=usual)


def _words(name: str) -> frozenset[str]:
    """The words of a name in lower case; "80GB" becomes 80, "rtx4090" becomes 4090."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return frozenset(re.sub(r"^rtx(?=\d)|(?<=\d)(gb|gib)$", "", word) for word in words) - {""}


def parse_gpus(text: str) -> tuple[int, Device, str | None]:
    """`96x40GB`, `8xH100`, `H200` or `cpu` -> (number, device, what had to be assumed). Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\S.*)", text.strip())
    number, name = (int(match[1] or 1), match[2]) if match else (0, "")
    if number and name.lower() == "cpu":
        device = this_cpu()
        return number, device, f"cpu: {device.tflops:.1f} TFLOP/s, 0.1 for each core of this machine"
    if number and (known := find_device(name)):
        return number, known, None
    size = re.fullmatch(r"(\d+)\s*(?:gb|gib|g)", name.lower())
    if not number or not size:
        names = ", ".join(device.name for device in DEVICES.values())
        raise ConfigError(f"--gpus {text}: write NUMBERxDEVICE, as in 96x40GB, 8xH100 or cpu; known devices: {names}")
    memory = int(size[1])
    like = DEVICES["a100-80" if memory > 40 else "a100-40"]
    device = replace(like, name=f"{memory}GB", memory_gib=memory)
    return number, device, f"devices of {memory} GB: the speed of an {like.name}"


def this_cpu() -> Device:
    """This machine's CPU, at an assumed 0.1 TFLOP/s per core."""
    memory = total_memory() / GiB
    tflops = 0.1 * usable_cores()
    return Device("cpu", memory, tflops, tflops, 20, 1, 1, None)


def cpu_flags() -> set[str]:
    """Instruction sets of the first core; empty if the system does not list them."""
    core = first_core()
    return set((core.get("flags") or core.get("Features") or "").split())


def auto_precision(has_bf16: bool) -> Literal["bf16", "fp32"]:
    """What precision.compute=auto means. Never fp16, because its loss scale can overflow; users must choose it."""
    return "bf16" if has_bf16 else "fp32"
