import pytest

from castalia.errors import out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 64 bytes"),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),  # what libstdc++ says then
        RuntimeError("could not create a primitive"),  # and oneDNN
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_memory_that_is_used_up_has_many_names(error):
    message = out_of_memory(error)
    assert message and message.startswith("out of memory") and "castalia plan" in message


def test_other_errors_are_others():
    assert out_of_memory(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None
