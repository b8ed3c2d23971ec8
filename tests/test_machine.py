from castalia import machine
from castalia.machine import free_memory, total_memory, usable_cores


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
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > free / 2
