"""Devices by name: what plans need to know of them. Vendors' figures for dense 16-bit matrices."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from castalia.errors import ConfigError

GiB = 2**30
USABLE = 0.92  # of a device's memory; the rest goes to the driver's context, communication buffers and fragmentation
NODE = 8  # devices that share the fast link


@dataclass(frozen=True)
class Device:
    name: str
    memory_gib: float
    tflops: float  # dense bf16, fp16 on V100 and T4
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s in one direction to the devices of its node
    network: float  # GB/s in one direction to other nodes, its share

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_gib * USABLE * GiB)


DEVICES = {
    device.name.lower(): device
    for device in (
        Device("V100-16", 16, 125, 900, 150, 12.5),
        Device("V100-32", 32, 125, 900, 150, 12.5),
        Device("A100-40", 40, 312, 1555, 300, 25),
        Device("A100-80", 80, 312, 2039, 300, 25),
        Device("H100", 80, 989, 3350, 450, 50),
        Device("H200", 141, 989, 4800, 450, 50),
        Device("B200", 180, 2250, 8000, 900, 50),
        Device("L40S", 48, 362, 864, 32, 12.5),
        Device("4090", 24, 165, 1008, 32, 12.5),
        Device("3090", 24, 71, 936, 32, 12.5),
        Device("T4", 16, 65, 320, 16, 6),
    )
}
_SHORT = {"v100": "v100-32", "a100": "a100-80", "rtx4090": "4090", "rtx3090": "3090"}


def parse_gpus(text: str) -> tuple[int, Device, str | None]:
    """`96x40GB`, `8xH100`, `H200` or `cpu` -> (number, device, what had to be assumed)."""
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(cpu|[\w-]+?)", text.strip().lower())
    number, name = (int(match[1] or 1), match[2]) if match else (0, "")
    name = _SHORT.get(name, name)
    if number and name == "cpu":
        device = this_cpu()
        return number, device, f"cpu: {device.tflops:.1f} TFLOP/s, 0.1 for each core of this machine"
    if number and name in DEVICES:
        return number, DEVICES[name], None
    size = re.fullmatch(r"(\d+)(?:gb|gib|g)", name)
    if not number or not size:
        known = ", ".join(device.name for device in DEVICES.values())
        raise ConfigError(f"--gpus {text}: write NUMBERxDEVICE, as in 96x40GB, 8xH100 or cpu; known devices: {known}")
    memory = int(size[1])
    like = DEVICES["a100-80" if memory > 40 else "a100-40"]
    device = replace(like, name=f"{memory}GB", memory_gib=memory)
    return number, device, f"devices of {memory} GB: the speed of an {like.name}"


def this_cpu() -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GiB
    return Device("cpu", memory, 0.1 * (os.cpu_count() or 1), 20, 1, 1)
