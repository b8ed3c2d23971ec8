import pytest
import torch

from castalia.errors import DataError
from castalia.generate.generation import Sampling, generate, stream

PROMPTS = ["In the beginning", "", "And", "the earth was without form"]


def uncached(model, tokenizer, prompt: str, count: int) -> str:
    """Greedy text by whole forward passes."""
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    written = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + written]))[0, -1, :257].argmax())
        if token == tokenizer.eod_id:
            break
        written.append(token)
    return tokenizer.decode(written)


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"position": "learned"},
        {"position": "alibi"},
        {"sliding_window": 7},
        {"sliding_window": 7, "window_pattern": (False, True)},
    ],
    ids=str,
)
@torch.inference_mode()
def test_greedy_batch_equals_uncached(make_model, tokenizer, update):
    model = make_model(**update)
    expected = [uncached(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_tokens=20) == expected
    assert generate(model, tokenizer, PROMPTS, max_tokens=20, batch_size=3) == expected


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20}, {"top_p": 0.9}])
def test_a_sampled_row_does_not_depend_on_its_batch(make_model, tokenizer, sampling):
    model = make_model(init_std=0.15)
    together = generate(model, tokenizer, PROMPTS, temperature=1.0, seed=5, max_tokens=30, **sampling)
    again = generate(model, tokenizer, PROMPTS, temperature=1.0, seed=5, max_tokens=30, batch_size=1, **sampling)
    assert together == again
    assert generate(model, tokenizer, PROMPTS, temperature=1.0, seed=6, max_tokens=30, **sampling) != together
    shorter = generate(model, tokenizer, [*PROMPTS[:2], "other"], temperature=1.0, seed=5, max_tokens=9, **sampling)
    for text, whole in zip(shorter[:2], together, strict=False):
        assert whole.startswith(text.rstrip("\ufffd"))


def test_rows_that_are_done_go_along_until_they_are_half(make_model, tokenizer, monkeypatch):
    """Many letters end a text, so that rows end one by one; each drop of rows copies the cache."""
    model, sizes = make_model(init_std=0.15), []
    hidden = model.hidden

    def spy(tokens, **options):
        sizes.append(len(tokens))
        return hidden(tokens, **options)

    options = {
        "temperature": 1.0,
        "seed": 5,
        "max_tokens": 40,
        "num_samples": 16,
        "stop": tuple(map(chr, range(1, 128, 9))),
    }
    alone = generate(model, tokenizer, ["ab"], batch_size=1, **options)
    monkeypatch.setattr(model, "hidden", spy)
    assert generate(model, tokenizer, ["ab"], batch_size=16, **options) == alone
    steps = sizes[1:]  # the first call reads the prompt
    drops = [(before, after) for before, after in zip(steps, steps[1:], strict=False) if before != after]
    assert steps[0] == 16 and drops and all(2 * after <= before for before, after in drops)


def test_samples_of_one_prompt_differ_and_are_in_order(make_model, tokenizer):
    model = make_model(init_std=0.15)
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    texts = generate(model, tokenizer, ["ab", "cd"], num_samples=3, **options)
    assert len(texts) == 6 and len(set(texts)) == 6
    assert generate(model, tokenizer, ["ab"] * 3, **options) == texts[:3]


@torch.inference_mode()
def test_equal_prompts_are_prefilled_once_and_in_chunks(make_model, tokenizer, monkeypatch):
    """Equal rows go through the model once; a chunk has at most 20 tokens, or one prompt."""
    model, read = make_model(), []
    hidden = model.hidden
    prompts = ["0123456789", "abc", "0123456789", "x" * 30, "defgh"]
    expected = generate(model, tokenizer, prompts, max_tokens=5)

    def spy(tokens, **options):
        read.append(tokens.shape[1])
        return hidden(tokens, **options)

    monkeypatch.setattr(model, "hidden", spy)
    monkeypatch.setattr("castalia.generate.generation.PREFILL_CHUNK_TOKENS", 20)
    assert generate(model, tokenizer, prompts, max_tokens=5) == expected
    assert read[:4] == [13, 30, 5, 1]


@torch.inference_mode()
def test_padded_rows_are_never_chosen(make_model, tokenizer):
    model = make_model()
    model.head.weight[257:] = 100 * model.norm.bias.new_ones(32)
    model.norm.bias.fill_(1.0)
    assert model(torch.tensor([[1, 2, 3]]))[0, -1].argmax() >= 257
    for temperature in (0.0, 1.0):
        pieces = list(stream(model, tokenizer, ["abc"], Sampling(max_tokens=20, temperature=temperature)))
        assert pieces[-1].last


def test_stop_strings_and_end_of_document(scripted, tokenizer):
    text = "Es war einmal: ein König."
    assert generate(scripted(text, 3), tokenizer, ["abc"]) == [text]
    assert generate(scripted(text, 3), tokenizer, ["abc"], stop=["xx", "einmal"]) == ["Es war "]
    assert generate(scripted(text, 3), tokenizer, ["abc"], max_tokens=6) == ["Es war"]
    assert generate(scripted("", 3), tokenizer, ["abc"]) == [""]


def test_the_last_piece_says_why_it_is_the_last(scripted, tokenizer):
    def reason(text, **options):
        return [piece.finish_reason for piece in stream(scripted(text, 3), tokenizer, ["abc"], Sampling(**options))][-1]

    assert reason("one two") == "stop"  # the end of a document
    assert reason("one two", stop=["two"]) == "stop"
    assert reason("one two", max_tokens=7) == "length"
    assert reason("one two", max_tokens=8) == "stop"


def test_pieces_join_to_the_text_and_the_last_is_marked(make_model, tokenizer):
    model = make_model()
    pieces = list(stream(model, tokenizer, PROMPTS, Sampling(max_tokens=10, batch_size=3)))
    texts = ["".join(piece.text for piece in pieces if piece.row == row) for row in range(4)]
    assert texts == generate(model, tokenizer, PROMPTS, max_tokens=10)
    for row in range(4):
        assert [piece.last for piece in pieces if piece.row == row][-1]
        assert sum(piece.last for piece in pieces if piece.row == row) == 1


@pytest.mark.parametrize("position", ["rotary", "learned"])
@torch.inference_mode()
def test_a_text_longer_than_the_positions(make_model, tokenizer, position):
    """When the 64 positions are full the last 32 tokens stay in view. Other rows are not disturbed."""
    model = make_model(position=position)
    model.head.weight[256] = 0  # no end of document
    prompts = ["x" * 60, "short", "y" * 64]
    texts = generate(model, tokenizer, prompts, max_tokens=90)
    for prompt, text in zip(prompts, texts, strict=True):
        ids, start, written = tokenizer.encode(prompt), 0, 0
        while written < 90:
            if len(ids) - start > 64:
                start = len(ids) - 32
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1, :257].argmax()))
            written += 1
        assert tokenizer.decode(ids[len(prompt) :]) == text


def test_prompts_that_the_model_cannot_take(make_model, tokenizer):
    model = make_model()
    with pytest.raises(DataError, match="has 65 tokens; the model takes 64"):
        generate(model, tokenizer, ["x" * 65])
    with pytest.raises(DataError, match="token 400, but the model knows 320"):
        generate(model, tokenizer, [[1, 400]])
    endless = type(tokenizer)()
    endless.eod_id = None
    with pytest.raises(DataError, match="end-of-document"):
        generate(model, endless, [""])


def test_16_bit_generation(make_model, tokenizer):
    model = make_model()
    model.compute_dtype = torch.bfloat16
    texts = generate(model, tokenizer, PROMPTS, max_tokens=10)
    assert texts == generate(model, tokenizer, PROMPTS, max_tokens=10) and all(texts)
