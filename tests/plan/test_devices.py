"""Devices by the names that users and drivers give them."""

from __future__ import annotations

import pytest

from castalia.config.load import load_config
from castalia.errors import ConfigError
from castalia.plan.devices import DEVICES, find_device, parse_gpus
from castalia.plan.layout import Layout
from castalia.plan.memory import Compute
from castalia.plan.run_plan import Hardware, RunFacts, report

# What torch.cuda.get_device_name() says -> dense bf16 TFLOP/s (fp16 before Ampere), of the makers' data sheets.
NAMES = {
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA A30": 165,
    "NVIDIA A40": 150,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA RTX A6000": 155,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA H20": 148,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GeForce RTX 5090": 209,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA B300 SXM6 AC": 2250,
    "Tesla T4": 65,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-32GB": 112,
}
UNKNOWN = [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D",
    "GRID A100-10C",
    "NVIDIA A100X",
    "Quadro RTX 6000",
    "Tesla V100S-PCIE-32GB",
    "NVIDIA L20",
    "AMD Instinct MI300X",
]


@pytest.mark.parametrize("name", NAMES)
def test_drivers_names_find_their_rates(name) -> None:
    device = find_device(name)
    assert device is not None and device.tflops == NAMES[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_only_sounds_like_a_known_device_is_not_taken_for_it(name) -> None:
    assert find_device(name) is None


def test_memory_is_told_from_the_name_where_a_card_comes_in_two_sizes() -> None:
    found = {name: find_device(name).memory_gib for name in NAMES if "V100" in name or "A100" in name}  # type: ignore
    assert {name: size for name, size in found.items() if size > 35} == {
        "NVIDIA A100-PCIE-40GB": 39.4,
        "NVIDIA A100 80GB PCIe": 79.1,
        "NVIDIA A100-SXM4-80GB": 79.1,
    }
    assert found["Tesla V100-SXM2-16GB"] == 15.8 and found["Tesla V100-PCIE-32GB"] == 31.7


def test_every_device_is_found_by_its_own_name() -> None:
    assert all(find_device(device.name) is device for device in DEVICES.values())


def test_rates_by_precision() -> None:
    v100, a100 = DEVICES["v100-32"], DEVICES["a100-80"]
    assert [v100.peak_tflops(name) for name in ("fp16", "bf16", "fp32")] == [125, 15.7, 15.7]  # bf16 is emulated
    assert [a100.peak_tflops(name) for name in ("fp16", "bf16", "fp32")] == [312, 312, 19.5]


def test_a_card_without_bf16_is_planned_in_the_fp32_that_it_trains_in() -> None:
    config = load_config("pythia-160m", ["train.batch_size=64", "train.micro_batch_size=4"])
    plans = {name: report(config, RunFacts(), Hardware(1, DEVICES[name])) for name in ("v100-32", "a100-40")}
    given = report(config.model_copy(update={"precision": fp32(config)}), RunFacts(), Hardware(1, DEVICES["v100-32"]))
    assert plans["v100-32"].sized.memory == given.sized.memory
    assert plans["v100-32"].training.precision.startswith("fp32 compute")
    assert plans["a100-40"].training.precision.startswith("bf16 compute")
    assert plans["v100-32"].assumed == [
        "precision.compute=auto: fp32, because V100-32 has no bf16; fp16 multiplies at 125 TFLOP/s instead of 15.7"
    ]
    slow, fast = (plan.sized.time.costs.compute for plan in plans.values())
    assert slow / fast == pytest.approx(312 / 15.7)


def fp32(config):
    return config.precision.model_copy(update={"compute": "fp32"})


def test_the_context_and_each_communicator_take_their_memory_first() -> None:
    device = DEVICES["a100-40"]
    assert device.usable_bytes(0) == pytest.approx((39.4 - 1.0) * 0.92 * 2**30, abs=1)
    assert device.usable_bytes(0) - device.usable_bytes(3) == pytest.approx(0.9 * 0.92 * 2**30, abs=1)
    assert parse_gpus("1GB")[1].usable_bytes(2) == 0
    cpu = parse_gpus("cpu")[1]
    assert cpu.usable_bytes(8) == pytest.approx(cpu.memory_gib * 0.92 * 2**30, abs=1)


@pytest.mark.parametrize(
    ("layout", "number"),
    [
        (Layout(), 0),
        (Layout(dp=8), 2),  # all ranks; the data ranks
        (Layout(dp=8, zero=3), 2),
        (Layout(dp=8, zero=3, dp_replicate=2), 3),
        (Layout(tp=2, pp=2, dp=2, zero=1), 4),
        (Layout(dp=8, expert=2), 4),  # besides those that share out the experts, and those with the same experts
        (Layout(cp=2), 3),  # all ranks; the context ranks, which shard as well as exchange keys
    ],
)
def test_communicators_of_a_rank(layout, number) -> None:
    assert layout.communicators == number


def test_compute_knows_its_bytes() -> None:
    assert [Compute(name).element_bytes for name in ("fp32", "bf16", "fp16")] == [4, 2, 2]


@pytest.mark.parametrize(
    ("text", "number", "name", "gib"),
    [
        ("8xH100", 8, "H100", 79.1),
        ("a100", 1, "A100-80", 79.1),
        ("2xV100-PCIe-16", 2, "V100-PCIe-16", 15.8),
        ("8 x NVIDIA H100 NVL", 8, "H100-NVL", 93.1),
        ("4xrtx4090", 4, "4090", 23.6),
        ("96x40GB", 96, "40GB", 40),
        ("4 x 24gb", 4, "24GB", 24),
    ],
)
def test_devices_by_name_and_by_memory(text, number, name, gib) -> None:
    found, device, assumed = parse_gpus(text)
    assert (found, device.name, device.memory_gib) == (number, name, gib)
    assert bool(assumed) == ("gb" in text.lower())


def test_the_cpu_is_a_device_too() -> None:
    number, device, assumed = parse_gpus("cpu")
    assert number == 1 and device.name == "cpu" and device.memory_gib > 0 and "core" in (assumed or "")


@pytest.mark.parametrize("text", ["8xQ100", "0xH100", "", "H100x8"])
def test_unknown_devices_are_refused_with_the_known_ones(text) -> None:
    with pytest.raises(ConfigError, match=r"NUMBERxDEVICE.*H100"):
        parse_gpus(text)
