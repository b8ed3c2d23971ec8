import pytest
import torch

from castalia.generate.sampling import BLOCK, Noise, choose

CPU = torch.device("cpu")
PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


def shares(temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0) -> torch.Tensor:
    """How often each of five tokens is chosen by 20000 rows."""
    noise = Noise(0, [0], CPU)
    noise.block = torch.rand(1, 20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise.used = 0
    chosen = choose(PROBABILITIES.log().expand(20000, -1), noise, temperature, top_k, top_p)
    return chosen.bincount(minlength=5) / 20000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 99}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.7}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"temperature": 0.5}, [x / 0.275 for x in [0.0025, 0.16, 0.01, 0.0625, 0.04]]),
        ({"temperature": 1e-3}, [0, 1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("candidates", [2, 256])
def test_shares_of_the_tokens(options, expected, candidates, monkeypatch):
    monkeypatch.setattr("castalia.generate.sampling.CANDIDATES", candidates)
    torch.testing.assert_close(shares(**options), torch.tensor(expected, dtype=torch.float32), atol=0.012, rtol=0)
    assert (shares(**options)[torch.tensor(expected) == 0] == 0).all()


def test_without_noise_the_likeliest():
    assert choose(torch.tensor([[0.0, 3, 1], [2, 0, 1]]), None, 0.0, 0, 0.0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 5e-324])
def test_as_cold_as_numbers_go_the_likeliest(temperature):
    logits = torch.tensor([[0.0, 3e4, 1], [-2e4, 0, -1]])
    assert choose(logits, Noise(0, [0, 1], CPU), temperature, 0, 0.0).tolist() == [1, 1]


def test_noise_depends_on_seed_and_row_only():
    def numbers(seed, rows, count=BLOCK + 3):
        noise = Noise(seed, rows, CPU)
        return torch.stack([noise.next() for _ in range(count)], dim=1)

    many = numbers(7, [0, 1, 2])
    assert torch.equal(numbers(7, [2])[0], many[2])
    assert torch.equal(numbers(7, [1, 0], count=5), many[[1, 0], :5])
    assert not torch.equal(numbers(8, [0])[0], many[0]) and not torch.equal(many[0], many[1])
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.05


def test_rows_that_are_kept_go_on_with_their_numbers():
    whole, part = Noise(7, [0, 1, 2], CPU), Noise(7, [0, 1, 2], CPU)
    assert torch.equal(whole.next(), part.next())
    part.keep([0, 2])
    for _ in range(BLOCK + 5):
        assert torch.equal(part.next(), whole.next()[[0, 2]])
