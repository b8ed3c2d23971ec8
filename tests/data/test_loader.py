import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.batch import sum_until
from castalia.config.load import load_config
from castalia.config.schema import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    Source,
    TokenizerConfig,
    TrainConfig,
    Warmup,
)
from castalia.data import config_corpora
from castalia.data.config_corpora import batch_at, has_data, open_data
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.loader import SPLITS
from castalia.errors import ConfigError, DataError

MODEL = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=50)


def corpus(prefix: Path, items: list[list[int]]) -> Source:
    with DatasetWriter(prefix, "i4") as writer:
        for item in items:
            writer.add(item)
    return Source(path=str(prefix))


def config(*sources: Source, steps: int | None = 4, batch: int = 2, length: int = 5, **data) -> RunConfig:
    return RunConfig(
        model=MODEL,
        data=DataConfig(train=sources, seq_length=length, **data),
        train=TrainConfig(steps=steps, epochs=None if steps else 3, batch_size=batch),
    )


@pytest.mark.parametrize(
    ("variant", "batch", "file"),
    [
        ("pp0-mp1-z0-fp32-rotary-par", 4, "batches-gbs4.npy"),
        ("pp1-mp1-dp2-z1-fp16-rotary-par", 8, "batches-gbs8-dp2.npy"),
    ],
)
def test_the_batches_that_the_original_trained_on(fixtures: Path, variant: str, batch: int, file: str) -> None:
    neox = fixtures / "neox"
    paths = [f'{split}_data_paths=["{neox}/data/enwik8_text_document"]' for split in SPLITS]
    yml = neox / variant / "checkpoint" / "global_step5" / "configs" / "config.yml"
    run = load_config(yml, [*paths, f"train.batch_size={batch}"])
    expected = np.load(neox / "data" / file).reshape(10, batch, 33)
    for step in reversed(range(10)):
        tokens, labels, loss_mask, *_ = batch_at(run, step + 1)
        assert np.array_equal(tokens, expected[step, :, :-1]) and np.array_equal(labels, expected[step, :, 1:])
        assert loss_mask.all() and tokens.dtype == labels.dtype == np.int64 and loss_mask.dtype == bool


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("split", SPLITS)
def test_samples_of_one_corpus(fixtures: Path, corpora: Path, number: int, split) -> None:
    known = json.loads((fixtures / "data" / "manifest.json").read_text())["sets"][number]
    wanted = known.get("ns", [None] * 3)
    run = RunConfig(
        data=DataConfig(
            path=str(corpora / known["corpus"]), split=known["split"], holdout="contiguous", seq_length=known["seq"]
        ),
        train=TrainConfig(steps=wanted[0], batch_size=1),
        eval=EvalConfig(every=10**6, batches=wanted[SPLITS.index(split)] or 10),
        seed=known["seed"],
    )
    assert has_data(run, split) == (known["datasets"][split] is not None)
    if known["datasets"][split] is None:
        with pytest.raises(DataError, match=f"no {split} data"):
            open_data(run, split)
        return
    samples = open_data(run, split)
    assert len(samples) == known["datasets"][split]["length"]
    name = f"{known['corpus']}_{split}_sl{known['seq']}_s{known['seed']}_first50.npy"
    expected = np.load(fixtures / "data" / "samples" / name)
    assert all(np.array_equal(samples.sample(i)[0], row) for i, row in enumerate(expected))


def test_blended_samples(fixtures: Path, corpora: Path) -> None:
    sources = [
        Source(path=str(corpora / f"{name}_text_document"), weight=w) for name, w in (("genesis", 3), ("proverbs", 7))
    ]
    samples = open_data(config(*sources, steps=400, batch=1, length=96))
    blend = fixtures / "data" / "blend"
    assert samples.blended is not None and [len(part.index) for part in samples.corpora] == [527, 283]
    assert np.array_equal(samples.blended[0], np.load(blend / "dataset_index.npy"))
    assert np.array_equal(samples.blended[1], np.load(blend / "dataset_sample_index.npy"))
    for i, row in enumerate(np.load(blend / "first50_tokens.npy")):
        assert np.array_equal(samples.sample(i)[0], row)


@pytest.mark.parametrize(
    ("packing", "chopped", "seed", "length"),
    [
        ("packed", True, 1234, 84),
        ("pack_until_overflow", True, 1234, 59),
        ("pack_until_overflow", False, 1255, 59),
        ("unpacked", True, 1234, 59),
        ("unpacked", False, 1234, 59),
    ],
)
def test_fine_tuning_samples(fixtures: Path, tmp_path: Path, packing, chopped: bool, seed: int, length: int) -> None:
    sft = fixtures / "data" / "sft"
    source = Source(path=str(sft / "chat_text_document"), labels=str(sft / "chat_label_document"))
    run = config(source, steps=59, batch=1, length=48, packing=packing, allow_chopped=chopped, cache_dir=str(tmp_path))
    samples = open_data(run.model_copy(update={"seed": seed, "model": None}))  # 59 with the surplus of 0.5% are 60
    samples.build_index()
    stem = f"chat_text_document_train_0_indexmap_60ns_48sl_{seed}s_{packing}pi{'_ac' if chopped else ''}"
    for part in ("doc_idx", "sample_idx", "shuffle_idx"):
        assert (tmp_path / f"{stem}_{part}.npy").read_bytes() == (sft / f"{stem}_{part}.npy").read_bytes()
    assert len(samples) == length
    text = np.load(sft / f"{packing}_ac{int(chopped)}_text_first50.npy")
    label = np.load(sft / f"{packing}_ac{int(chopped)}_label_first50.npy")
    for i in range(50):
        assert np.array_equal(samples.sample(i), [text[i], label[i]])
    batch = samples.batch(0)
    assert np.array_equal(batch.labels[0], np.where(label[0, 1:] < 0, -100, label[0, 1:]))
    assert np.array_equal(batch.loss_mask, batch.labels != -100)


def test_passes_drop_the_incomplete_micro_batch_and_start_again(fixtures: Path, tmp_path: Path) -> None:
    known = json.loads((fixtures / "data" / "vectors.json").read_text())["loader"]
    source = corpus(tmp_path / "x", [list(range(20))] * 30)
    run = config(source, steps=None, batch=known["dp"] * known["mb"], length=11)
    samples = open_data(run)
    assert len(samples) > known["n"]
    order = np.arange(known["n"] // 8 * 8)
    per_step = [a + b for a, b in zip(known["rank0"]["batches"], known["rank1"]["batches"], strict=True)]
    assert [samples.positions(step).tolist() for step in range(6)] == per_step == order.reshape(-1, 8).tolist()
    one_pass = samples.steps(epochs=1)
    assert one_pass == len(samples) // 8 and samples.steps(epochs=3) == 3 * one_pass
    assert np.array_equal(samples.positions(one_pass + 2), samples.positions(2))


def test_accumulation_takes_the_same_samples(tmp_path: Path) -> None:
    source = corpus(tmp_path / "x", [list(range(40))] * 9)
    whole = config(source, batch=4)
    parts = whole.model_copy(update={"train": TrainConfig(steps=4, micro_batch_size=1, accumulation=4)})
    assert all(np.array_equal(batch_at(whole, step).tokens, batch_at(parts, step).tokens) for step in range(1, 5))


def test_no_loss_after_the_end_of_a_document(tmp_path: Path) -> None:
    source = corpus(tmp_path / "x", [[7, 8, 9, 0]] * 20)
    run = config(source, mask_after_eod=True).model_copy(update={"tokenizer": TokenizerConfig(kind="char")})
    tokens, labels, loss_mask, documents, *_ = batch_at(run, 1)
    assert documents is None and (
        np.array_equal(loss_mask, tokens != 0)
        and (labels[tokens == 9] == 0).all()
        and (labels[~loss_mask] == -100).all()
    )


def test_padding_is_not_trained_on_unless_the_originals_numbers_are_asked_for(tmp_path: Path) -> None:
    source = corpus(tmp_path / "x", [[7, 8, 9, 7, 8]] * 20)
    run = config(source, length=12, packing="pack_until_overflow")
    padded = batch_at(run, 1).tokens == 0
    assert padded.any() and not batch_at(run, 1).loss_mask[:, -1].any()
    assert batch_at(run.model_copy(update={"neox_exact": True}), 1).loss_mask.all()


@given(
    lengths=st.lists(st.integers(1, 9), min_size=4, max_size=12),
    packing=st.sampled_from(["packed", "pack_until_overflow"]),
    length=st.integers(3, 12),
    seed=st.integers(0, 99),
)
def test_documents_of_a_batch(tmp_path_factory, lengths: list[int], packing: str, length: int, seed: int) -> None:
    """Against the pieces that each row is made of: numbers, labels at borders, and a number of its own for filling."""
    folder = tmp_path_factory.mktemp("x")
    source = corpus(folder / "x", [list(range(1, 1 + n)) for n in lengths])
    run = config(source, length=length, packing=packing, mask_documents=True).model_copy(update={"seed": seed})
    samples = open_data(run)
    for step in range(4):
        batch = samples.batch(step)
        assert batch.documents is not None and batch.documents.dtype == np.int64
        for row, position in enumerate(samples.positions(step).tolist()):
            sizes = [piece.stop - piece.start for piece in samples.pieces(position)]
            numbers = [number for number, size in enumerate(sizes) for _ in range(size)][: length + 1]
            numbers += [len(sizes)] * (length + 1 - len(numbers))
            assert batch.documents[row].tolist() == numbers[:-1]
            text, aligned = samples.sample(position)
            same = np.diff(numbers) == 0
            assert np.array_equal(batch.labels[row], np.where(same, aligned[1:], -100))
            assert np.array_equal(batch.tokens[row], text[:-1])


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow"])
def test_editing_a_document_never_changes_anothers_logits_or_losses(tmp_path: Path, packing: str) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    from castalia.model.init import initialize
    from castalia.model.transformer import Transformer

    shape = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=50, max_positions=24)
    model = Transformer(shape).eval()
    initialize(model, shape, seed=1)
    random = np.random.RandomState(3)
    documents = [random.randint(1, 40, size).tolist() for size in (5, 9, 3, 12, 7, 2, 30, 4)]
    edited = [[49] * len(tokens) if number % 2 else tokens for number, tokens in enumerate(documents)]
    found = []
    for name, content in (("a", documents), ("b", edited)):
        run = config(corpus(tmp_path / name, content), length=24, packing=packing, mask_documents=True)
        samples = open_data(run)
        batch = samples.batch(0)
        tokens, numbers, labels = (torch.from_numpy(a) for a in (batch.tokens, batch.documents, batch.labels))
        with torch.no_grad():
            logits = model(tokens, documents=numbers)
            alone = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
            total, count = model(tokens, labels, documents=numbers)
        assert count == (labels >= 0).sum() and torch.allclose(-alone.sum(), total, atol=1e-3)
        found.append((samples, batch, logits, alone))
    kept = np.zeros(batch.tokens.shape, bool)
    for row, position in enumerate(samples.positions(0).tolist()):
        at = 0
        for piece in samples.pieces(position):
            kept[row, at : at + piece.stop - piece.start] = piece.document % 2 == 0
            at += piece.stop - piece.start
    assert kept.any() and not kept.all()
    (_, _, logits, losses), (_, _, other_logits, other_losses) = found
    assert torch.equal(logits[kept], other_logits[kept]) and torch.equal(losses[kept], other_losses[kept])
    assert not torch.equal(logits[~kept], other_logits[~kept])


def test_training_on_masked_documents_is_training_on_each_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    from castalia.model.transformer import Transformer
    from castalia.parallel.executor import Executor, Rows

    shape = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=50, max_positions=32)
    random = np.random.RandomState(0)
    documents = [random.randint(1, 50, size) for size in (5, 9, 3, 12, 7, 2, 30, 4)]
    source = corpus(tmp_path / "x", [tokens.tolist() for tokens in documents])
    run = config(source, length=32, packing="pack_until_overflow", mask_documents=True)
    run = run.model_copy(update={"model": shape})
    samples, engine = open_data(run), Executor(Transformer(shape))
    engine.initialize(run)
    loss = engine.forward_backward(Rows.of(samples.batch(0)), [1.0], 1.0, [0])
    gradient = engine.model.embed.weight.grad.clone()
    engine.model.zero_grad()
    alone = torch.zeros(())
    for position in samples.positions(0).tolist():
        for piece in samples.pieces(position):
            tokens = torch.from_numpy(documents[piece.document][: piece.stop].astype(np.int64))[None]
            if piece.stop > 1:  # the last piece of these samples is one foreign token
                alone = alone + engine.model(tokens[:, :-1], tokens[:, 1:])[0]
    alone.backward()
    assert torch.allclose(loss, alone, rtol=1e-5)
    assert torch.allclose(engine.model.embed.weight.grad, gradient, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": "unpacked"}, "needs labels"),
        ({"length": 5000}, "one whole sample|do not fill"),
    ],
)
def test_what_cannot_be_sampled(tmp_path: Path, change: dict, message: str) -> None:
    run = config(corpus(tmp_path / "x", [[1, 2, 3]] * 20), steps=None, **change)
    with pytest.raises((ConfigError, DataError), match=message):
        open_data(run).batch(0)


def test_ids_beyond_the_vocabulary_name_the_document(tmp_path: Path) -> None:
    source = corpus(tmp_path / "x", [[1, 2, 3], [4, 50, 6]] * 9)
    with pytest.raises(
        DataError, match=r"step 0: token id 50 lies beyond the vocabulary of 50; it is token 1 of document \d+ of"
    ):
        batch_at(config(source), 1)


def test_labels_must_match(tmp_path: Path) -> None:
    corpus(tmp_path / "labels", [[1, 2]])
    source = corpus(tmp_path / "x", [[1, 2, 3]]).model_copy(update={"labels": str(tmp_path / "labels")})
    with pytest.raises(DataError, match="do not match"):
        open_data(config(source))


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train data"):
        open_data(config())
    with pytest.raises(DataError, match=r"nowhere\.idx does not exist"):
        open_data(config(Source(path=str(tmp_path / "nowhere"))))


def test_fingerprint_tells_of_other_data_and_other_order(tmp_path: Path) -> None:
    run = config(corpus(tmp_path / "x", [[1, 2, 3]] * 30))
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    moved = config(Source(path=f"{tmp_path}-moved/x"))
    other_text = config(corpus(tmp_path / "y", [[1, 2, 3]] * 29 + [[1, 2, 4]]))
    prints = [open_data(c).fingerprint for c in (run, moved, other_text, run.model_copy(update={"seed": 5}))]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_sequences_that_begin_short_are_the_beginnings_of_the_same_samples(tmp_path):
    source = corpus(tmp_path / "c", [[*range(start, start + 9)] for start in range(40)])
    plain, warmup = config(source, steps=6, length=8), {"start": 2, "steps": 4, "multiple": 2}
    short = config(source, steps=6, length=8, seq_length_warmup=warmup, valid=(source,))
    assert [batch_at(short, step).tokens.shape[1] for step in range(1, 7)] == [2, 4, 6, 8, 8, 8]
    for step in range(1, 7):
        whole, cut = batch_at(plain, step), batch_at(short, step)
        length = cut.tokens.shape[1]
        assert np.array_equal(cut.tokens, whole.tokens[:, :length])
        assert np.array_equal(cut.labels, whole.labels[:, :length])
    assert batch_at(short, 1, "valid").tokens.shape[1] == 8
    assert open_data(short).fingerprint != open_data(plain).fingerprint


@given(batch=st.integers(1, 4), start=st.integers(1, 4), steps=st.integers(1, 12), root=st.integers(1, 2))
@settings(max_examples=25)
def test_small_batches_follow_each_other_through_the_same_order(tmp_path_factory, batch, start, steps, root):
    path = tmp_path_factory.getbasetemp() / "order"
    source = Source(path=str(path)) if path.with_suffix(".idx").exists() else corpus(path, [[*range(50)]] * 20)
    unit, whole = start, start * batch
    run = config(source, steps=15, batch=whole)
    train = {"batch_size_warmup": Warmup(start=start, steps=steps, root=root)}
    samples = open_data(run.model_copy(update={"train": run.train.model_copy(update=train)}))
    taken = [samples.positions(step).tolist() for step in range(15)]
    sizes, usable = [len(rows) for rows in taken], len(samples) // unit * unit
    assert [position for rows in taken for position in rows] == [number % usable for number in range(sum(sizes))]
    assert sizes == sorted(sizes) and sizes[0] >= start and set(sizes[steps:]) <= {whole}
    assert all(size % unit == 0 for size in sizes)
    one_pass = samples.steps(1)
    assert sum_until(train["batch_size_warmup"], one_pass, whole) <= usable
    assert sum_until(train["batch_size_warmup"], one_pass + 1, whole) > usable


def test_a_long_index_is_told_before_it_is_built(tmp_path: Path, monkeypatch, caplog) -> None:
    source = corpus(tmp_path / "a", [[1] * 21] * 4)  # 84 tokens
    open_data(config(source, steps=4)).build_index()
    assert not caplog.records
    monkeypatch.setattr(config_corpora, "LONG_INDEX", 168)
    open_data(config(source, steps=84)).build_index()
    assert "the order of 169 samples,\n  10.1 passes over it" in caplog.text
    caplog.clear()
    open_data(config(source, steps=84)).build_index()  # it is there already
    assert not caplog.records


def test_an_index_is_built_when_it_is_needed_and_a_bar_follows(tmp_path: Path) -> None:
    run = config(corpus(tmp_path / "a", [[1] * 21] * 40), steps=60)
    samples, seen = open_data(run), []
    assert not [*tmp_path.glob("*.npy")]
    samples.build_index(lambda done, text="", total=None: seen.append((done, text, total)))
    (total,) = {total for _, text, total in seen if text.startswith("shuffling 40 documents")}
    assert total == sum(done for done, _, _ in seen) == 1 + 2 * len(samples.corpora[0].index.order)
    assert [text for _, text, _ in seen if text][-2].startswith("writing")
    again = open_data(run)
    assert np.array_equal(again.batch(3).tokens, samples.batch(3).tokens)


def test_many_passes_repeat_an_order_of_some(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a", [list(range(number, number + 21)) for number in range(4)])  # 84 tokens, length 5
    all_passes = open_data(config(source, steps=1000, batch=1, shuffled_passes=None))
    some = open_data(config(source, steps=1000, batch=1))
    most = (16 * 84 - 1) // 5
    assert len(all_passes) > 1000 and len(some.corpora[0].index.order) == most
    ordered = open_data(config(source, steps=most - 2, batch=1, shuffled_passes=None))  # also of 16 passes
    for step in (0, 1, most - 3):
        assert np.array_equal(some.batch(step).tokens, ordered.batch(step).tokens)
        assert np.array_equal(some.batch(step + some.pass_length).tokens, some.batch(step).tokens)
    few = [open_data(config(source, steps=200, batch=1, shuffled_passes=passes)) for passes in (16, None)]
    assert all(np.array_equal(*(samples.batch(step).tokens for samples in few)) for step in range(200))
    assert some.epoch(500) > 16  # passes are counted on


def test_a_small_source_repeats_while_a_large_one_goes_on(tmp_path: Path) -> None:
    small = corpus(tmp_path / "small", [list(range(11))] * 2).model_copy(update={"weight": 1.0})  # 4 samples a pass
    large = corpus(tmp_path / "large", [[40] * 1001] * 10).model_copy(update={"weight": 1.0})
    samples = open_data(config(small, large, steps=1000, batch=1))
    assert [len(part.index.order) for part in samples.corpora] == [(16 * 22 - 1) // 5, 2001]
    assert len(samples) == 1000
    places = [samples.pieces(position)[0] for position in range(1000)]
    assert sum(place.prefix == small.path for place in places) == 500
    of_large = [(p.document, p.start) for p in places if p.prefix == large.path]
    assert len(set(of_large)) == len(of_large)  # nothing of it comes twice
    assert samples.batch(999).tokens.shape == (1, 5)


def test_the_whole_pass_has_as_many_batches_as_it_says(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a", [[1] * size for size in (1, 2, 5, 6, 7, 11, 12, 30)])
    for packing in ("packed", "pack_until_overflow"):
        samples = open_data(config(source, steps=9, packing=packing))
        for rows, multiple in ((1, 1), (3, 1), (4, 2), (6, 6)):
            assert samples.whole_pass_batches(rows, multiple) == len([*samples.whole_pass(rows, multiple)])
