import pytest

from castalia.errors import ConfigError
from castalia.plan.free_memory import free_memory, parse_memory


def test_some_memory_is_free():
    assert free_memory() > 1 << 20


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GB", 4 * 10**9), ("1.5 GiB", 3 << 29), ("800m", 8 * 10**8), ("123", 123), ("2T", 2 * 10**12)],
)
def test_amounts_of_memory_are_read(text, number):
    assert parse_memory(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4 GB please", "0", "4KBB"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ConfigError, match="write an amount"):
        parse_memory(text)
