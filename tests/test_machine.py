import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from castalia import machine
from castalia.machine import allowed_memory, close_gaps, free_memory, total_memory, usable_cores


def test_a_process_has_cores_and_memory():
    assert 1 << 20 < free_memory() <= total_memory()
    assert usable_cores() >= 1


def test_of_a_control_group_what_is_left_counts(tmp_path, monkeypatch):
    group = (str(tmp_path), "memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(machine, "GROUPS", [group])
    free = machine._free_in_system()
    for name, text in {"max": "3000000\n", "current": "2500000\n", "stat": "file 9\ninactive_file 100000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory() == 600_000
    assert allowed_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > free / 2
    assert allowed_memory() <= total_memory()


def test_python_looks_for_garbage_again_once_torch_is_imported():
    code = """
import gc, sys
from castalia.machine import importing_torch
try:
    with importing_torch():
        import torch
        assert not gc.isenabled()
        raise ImportError
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 100_000)
with importing_torch():
    print(gc.isenabled())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "True True\nTrue\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have other heaps")
def test_gaps_between_blocks_go_back_to_the_system():
    blocks = [torch.ones(16_000) for _ in range(2_000)]
    del blocks[::2]
    before = _resident()
    close_gaps()
    assert before - _resident() > 0.7 * 64_000 * len(blocks)


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
