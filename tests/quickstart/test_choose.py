"""The choice is a pure function; more time, text and speed never make it worse."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.errors import DataError
from castalia.plan.count import count
from castalia.quickstart.choose import LEAST_BYTES, MAX_PASSES, Pace, choose
from castalia.quickstart.family import model_of
from castalia.quickstart.measured import BYTES_PER_TOKEN, expected_bits_per_byte, worth

GIB = 1 << 30
texts = st.integers(LEAST_BYTES, 10**11)
times = st.floats(30, 30 * 86400)
paces = st.builds(Pace, st.floats(0, 1e-4), st.floats(1e9, 1e15))
memories = st.integers(2 * GIB, 80 * GIB)


@settings(max_examples=60, deadline=None)
@given(texts, paces, memories, times)
def test_a_choice_fits_time_text_and_memory(num_bytes, pace, memory, seconds):
    chosen = choose(num_bytes, pace, memory, seconds=seconds)
    assert chosen == choose(num_bytes, pace, memory, seconds=seconds)
    assert chosen.passes <= MAX_PASSES * (1 + 1e-9)
    assert chosen.seconds <= seconds * (1 + 1e-6) + 1 / chosen.tokens_per_second
    assert chosen.batch_size % chosen.micro_batch_size == 0
    assert chosen.parameters == count(model_of(chosen.layers, chosen.width, chosen.vocab_size, chosen.length)).total
    assert 16 * chosen.parameters < memory  # weights, gradients and two moments in fp32 alone


@settings(max_examples=60, deadline=None)
@given(texts, paces, memories, times, st.floats(1.1, 20))
def test_more_time_never_promises_less(num_bytes, pace, memory, seconds, factor):
    less, more = (choose(num_bytes, pace, memory, seconds=each) for each in (seconds, seconds * factor))
    assert more.bits_per_byte <= less.bits_per_byte + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(LEAST_BYTES, 10**9), paces, memories, times)
def test_a_choice_says_what_keeps_it_from_being_longer(num_bytes, pace, memory, seconds):
    chosen = choose(num_bytes, pace, memory, seconds=seconds)
    assert (chosen.limit == "text") == (chosen.passes == pytest.approx(MAX_PASSES))


def test_small_texts_get_small_models_however_long_the_time():
    pace, week = Pace(1e-6, 1e12), 7 * 86400
    sizes = [choose(num_bytes, pace, 16 * GIB, seconds=week).parameters for num_bytes in (10**5, 10**6, 10**7, 10**9)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 300_000
    assert sizes[-1] > 10_000_000


def test_a_size_that_is_asked_for_is_the_nearest_of_the_family():
    chosen = choose(10**9, Pace(1e-6, 1e12), 16 * GIB, size=5e6)
    assert 3e6 < chosen.parameters < 8e6
    assert chosen.limit == "size"


def test_too_little_text_and_too_little_memory_are_refused():
    with pytest.raises(DataError, match="too little"):
        choose(LEAST_BYTES - 1, Pace(0, 1e9), GIB, seconds=60)
    with pytest.raises(DataError, match="memory"):
        choose(10**6, Pace(0, 1e9), 1 << 20, seconds=60)


def test_a_slow_machine_that_makes_no_step_in_the_time_still_gets_a_plan():
    chosen = choose(10**6, Pace(1e-2, 1e6), 4 * GIB, seconds=30)
    assert chosen.steps > 0
    assert dataclasses.asdict(chosen)["tokens"] >= 0


@given(st.floats(0.01, 1000), st.floats(1.01, 3))
def test_reading_again_teaches_less_each_time(passes, factor):
    assert worth(passes) <= passes
    assert worth(passes) <= worth(passes * factor) <= factor * worth(passes) + 1e-9


def test_text_that_xz_finds_easier_is_expected_to_be_easier():
    easy, hard = (expected_bits_per_byte(1e6, 1e7, 1.0, xz) for xz in (1.0, 2.0))
    assert hard == pytest.approx(2 * easy)


def test_every_vocabulary_of_the_table_is_larger_and_its_pieces_longer():
    assert list(BYTES_PER_TOKEN) == sorted(BYTES_PER_TOKEN)
    assert list(BYTES_PER_TOKEN.values()) == sorted(BYTES_PER_TOKEN.values())
