import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.evaluate import command, evaluation_view
from castalia.cli.opening import overlaid
from castalia.cli.train import train
from castalia.config.load import load_config
from castalia.config.schema import ModelConfig, TokenizerConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.data.loader import Batch
from castalia.data.split import sources_path, write_sources
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import CastaliaError
from castalia.evaluate.perplexity import bits_per_byte, evaluate, windows
from castalia.language_model import load_model
from castalia.parallel.executor import Executor
from castalia.train.evaluation import EvaluationOptions, evaluate_checkpoint, load_executor, uniform_loss


@given(st.integers(2, 60), st.integers(1, 12), st.data(), st.integers(1, 5))
def test_every_token_is_predicted_once_except_the_first(size, length, data, rows):
    stride = data.draw(st.integers(1, length))
    stream = np.arange(100, 100 + size)
    predicted = []
    for batch in windows(stream, length, stride, rows):
        assert batch.tokens.shape == batch.labels.shape
        assert len(batch.tokens) <= rows
        assert ((batch.labels == batch.tokens + 1) | ~batch.loss_mask).all()
        predicted += batch.labels[batch.loss_mask].tolist()
    assert predicted == stream[1:].tolist()


@given(st.lists(st.integers(1, 9), min_size=2, max_size=9), st.integers(1, 12), st.integers(1, 5))
def test_masked_documents_are_numbered_and_their_first_tokens_not_predicted(sizes, length, rows):
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    stream = np.arange(len(numbers))  # each token is its place
    predicted = []
    for batch in windows(stream, length, length, rows, np.array(sizes)):
        seen = batch.tokens[batch.loss_mask]
        assert np.array_equal(batch.documents[batch.loss_mask], numbers[seen])
        predicted += batch.labels[batch.loss_mask].tolist()
    assert predicted == [place for place in stream[1:].tolist() if numbers[place] == numbers[place - 1]]


def test_overlapping_windows_give_at_least_the_context_that_the_stride_leaves():
    for batch in windows(np.arange(50), length=8, stride=3, rows=1):
        first_label = int(batch.loss_mask[0].argmax())
        assert first_label == (0 if batch.tokens[0, 0] == 0 else 5)


def reference(model, tokens, length):
    """Mean loss, one window at a time."""
    losses = []
    for start in range(0, len(tokens) - 1, length):
        window = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_batches_are_weighted_by_their_tokens(run):
    model = load_model(run)
    model.train()
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 257, (6, 16))
    labels[:3, 2:] = -100
    batch = Batch(draw.integers(0, 257, (6, 16)), labels, labels != -100)
    halves = [Batch(*(array[part] for array in batch[:3])) for part in (slice(3), slice(3, 6))]
    with torch.no_grad():
        losses = F.cross_entropy(
            model.eval()(torch.from_numpy(batch.tokens)).flatten(0, 1),
            torch.from_numpy(labels).flatten(),
            reduction="sum",
        )
    model.train()
    for batches, rows in (([batch], 8), ([batch], 1), (halves, 2)):
        found = evaluate(Executor(model, rows), batches)
        assert found["loss"] == pytest.approx(losses.item() / (3 * 2 + 3 * 16), rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["tokens"] == 54
    assert model.training


def said(capsys):
    return json.loads(capsys.readouterr().out)


def test_the_command_evaluates_all_validation_documents(run, corpus, capsys):
    command(run, as_json=True)
    found = said(capsys)
    documents = list(open_dataset(corpus))[10:]
    stream = np.concatenate(documents)
    num_bytes = sum(len(document) - 1 for document in documents)  # an end of document is no text
    assert found["tokens"] == len(stream) - 1
    assert found["step"] == 12
    assert found["loss"] == pytest.approx(reference(load_model(run), stream, 16), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * (len(stream) - 1) / math.log(2) / num_bytes)
    assert found["loss"] < found["uniform_loss"] == math.log(257)
    command(run)
    assert f"tokens        {len(stream) - 1:,}" in capsys.readouterr().out


def test_a_run_on_answers_is_judged_by_its_answers(run, tmp_path, capsys):
    draw = np.random.default_rng(3)
    with DatasetWriter(tmp_path / "text", "uint16") as text, DatasetWriter(tmp_path / "labels", "int32") as labels:
        for size in (9, 14, 30, 1):
            document = draw.integers(0, 256, size)
            text.add(document)
            labels.add(np.where(np.arange(size) < 5, -100, document))
    source = json.dumps([{"path": str(tmp_path / "text"), "labels": str(tmp_path / "labels")}])
    answers = [f"data.train={source}", f"data.valid={source}", "data.packing=unpacked"]
    command(run, answers, as_json=True)
    found, model, losses = said(capsys), load_model(run), []
    for tokens, wanted in zip(open_dataset(tmp_path / "text"), open_dataset(tmp_path / "labels"), strict=True):
        if len(tokens) > 1:  # what is longer than data.seq_length is cut there, as in training
            window, label = (torch.from_numpy(part[:17].astype(np.int64)) for part in (tokens, wanted))
            loss = F.cross_entropy(model(window[None, :-1])[0], label[1:], reduction="none")
            losses.append(loss[label[1:] != -100])
    assert found["tokens"] == len(torch.cat(losses)) == 4 + 9 + 12
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert "bits_per_byte" not in found


def test_what_a_run_masks_after_an_end_of_document_is_not_judged(run, corpus, capsys):
    command(run, ["data.mask_after_eod=true"], as_json=True)
    assert said(capsys)["tokens"] == sum(len(document) for document in list(open_dataset(corpus))[10:]) - 10


def test_rows_that_fill_the_vocabulary_up_are_no_guesses():
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=300, vocab_multiple=128)
    assert uniform_loss(model, None) == math.log(300)
    assert uniform_loss(model, load_tokenizer(TokenizerConfig(kind="bytes"))) == math.log(257)


def test_raw_text_gives_what_the_prepared_corpus_gives(run, corpus, tmp_path, capsys):
    documents = [bytes(d[:-1].tolist()).decode() for d in open_dataset(corpus)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    results = []
    for data in (str(corpus), str(tmp_path / "texts.jsonl")):
        command(run, data=data, as_json=True)
        results.append(said(capsys))
    same = ("loss", "perplexity", "tokens", "bits_per_byte", "precision")
    assert [results[0][key] for key in same] == [results[1][key] for key in same]


def test_overrides_and_strides_are_obeyed(run, capsys):
    command(run, ["precision.compute=bf16", "data.seq_length=8"], stride=4, as_json=True)
    found = said(capsys)
    command(run, as_json=True)
    whole = said(capsys)
    assert found["precision"] == "bf16"
    assert found["tokens"] == whole["tokens"]
    assert found["loss"] != whole["loss"]


def test_weights_are_held_in_the_compute_dtype(run, capsys):
    executor, _ = load_executor(open_checkpoint(run), 16, 8, torch.bfloat16, torch.device("cpu"), 1, 1)
    assert {parameter.dtype for parameter in executor.parameters.values()} == {torch.bfloat16}
    model = load_model(run)
    model.compute_dtype = torch.bfloat16  # fp32 weights that are cast where they are used
    rows = [Batch(*np.random.default_rng(0).integers(0, 257, (2, 6, 16)), np.ones((6, 16), bool))]
    assert evaluate(executor, rows) == evaluate(Executor(model), rows)


def test_an_overlay_is_obeyed_and_its_idle_keys_are_told(run, tmp_path, capsys):
    """As the original's evaluation takes its overlays: flat keys over the checkpoint's own config."""
    overlay = tmp_path / "evaluation.yml"
    overlay.write_text('{"seq_length": 8, "char_level_ppl": true}')
    command(run, [str(overlay)], as_json=True)
    captured = capsys.readouterr()
    command(run, ["data.seq_length=8"], as_json=True)
    assert json.loads(captured.out) == said(capsys)
    assert f"{overlay}:1: char_level_ppl: True has no effect here" in " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "missing.txt"}, "missing.txt: neither a text file nor the prefix of a corpus"),
        ({"stride": 17}, "--stride 17 must lie between 1 and the window's 16 tokens"),
        ({"step": 7}, "no checkpoint of step 7"),
        ({"overrides": ["optimizer.lr=0.1"]}, "optimizer.lr has no effect on an evaluation"),
        ({"overrides": ["model.num_heads=4"]}, "model.num_heads: 2 in the checkpoint, 4 in the config"),
    ],
)
def test_bad_input_is_one_clear_error(run, options, message):
    with pytest.raises(CastaliaError, match=message):
        command(run, **options)


def test_tokens_beyond_the_vocabulary_are_refused(run, tmp_path):
    from castalia.data.dataset_writer import DatasetWriter

    with DatasetWriter(tmp_path / "other", "uint16") as writer:
        writer.add([1, 2, 300])
    with pytest.raises(CastaliaError, match="token id 300 lies beyond the model's vocabulary of 257"):
        command(run, data=str(tmp_path / "other"))


def test_one_bit_per_byte_is_ln_2_nats():
    assert bits_per_byte(math.log(2), tokens=30, num_bytes=30) == pytest.approx(1.0)


def test_sources_are_judged_apart_and_are_all_of_the_text(run, corpus):
    sizes = open_dataset(corpus).sizes
    write_sources(corpus, sizes, [("first", 12), ("second", 8)])
    try:
        found = evaluate_checkpoint(open_checkpoint(run), EvaluationOptions(by_source=True))
    finally:
        sources_path(corpus).unlink()
    parts = found["sources"]
    assert [*parts] == ["first", "second"]
    assert parts["first"]["tokens"] == sizes[10:12].sum() - 1
    assert sum(part["tokens"] for part in parts.values()) == found["tokens"] - 1  # the first token of the second
    together = sum(part["loss"] * part["tokens"] for part in parts.values()) / (found["tokens"] - 1)
    assert together == pytest.approx(found["loss"], rel=0.01)


def test_it_is_told_when_other_documents_are_held_out(tmp_path, capsys):
    with DatasetWriter(tmp_path / "a", "uint16") as writer:
        for number in range(20):
            writer.add([number, *b"words of its own", 256])
    write_sources(tmp_path / "a", open_dataset(tmp_path / "a").sizes, [("first", 12), ("second", 8)])
    model = ["model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.vocab_multiple=1"]
    data = [f"data.path={tmp_path}/a", "data.split=50,50,0", "data.seq_length=16", "tokenizer.kind=bytes"]
    run = train(load_config([], [*model, *data, "train.steps=1", "train.batch_size=2", f"checkpoint.dir={tmp_path}/r"]))
    capsys.readouterr()

    def told(**options):
        command(str(run), **options)
        return "not those that the run held out" in " ".join(capsys.readouterr().err.split())

    assert not told()
    sources_path(tmp_path / "a").unlink()
    assert told()
    assert not told(data=str(tmp_path / "a"))


@pytest.mark.parametrize("words", [[], ["data.mask_documents=true", "train.micro_batch_size=2"]])
def test_a_streamed_model_has_the_very_losses(run, words, capsys):
    checkpoint = overlaid(open_checkpoint(run), words)
    whole = evaluate_checkpoint(checkpoint, EvaluationOptions(stride=8))
    streamed = EvaluationOptions(stride=8, memory=10**9)
    assert evaluate_checkpoint(checkpoint, streamed, evaluation_view()) == whole
    assert "stay in memory" in " ".join(capsys.readouterr().err.split())
