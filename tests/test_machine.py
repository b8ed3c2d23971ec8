from castalia.machine import free_memory, total_memory, usable_cores


def test_a_process_has_cores_and_memory():
    assert 1 << 20 < free_memory() <= total_memory()
    assert usable_cores() >= 1
