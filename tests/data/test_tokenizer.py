import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import Tokenizer as Config
from castalia.data.tokenizer import PADDING, engine_text, load_tokenizer, train_bpe
from castalia.errors import DataError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Käse und Brot"] * 20


@pytest.fixture(scope="module")
def bpe_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt as GPT-2 has them, the end of text last."""
    folder = tmp_path_factory.mktemp("gpt2")
    vocab_file, merges_file = train_bpe(TEXTS, 280).engine.model.save(str(folder))
    vocab = json.loads(Path(vocab_file).read_text())
    pieces = sorted(vocab, key=vocab.__getitem__)
    Path(vocab_file).write_text(json.dumps({piece: i for i, piece in enumerate([*pieces[1:], pieces[0]])}))
    assert Path(merges_file).name == "merges.txt"
    return folder


def test_hf(fixtures: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Config(kind="hf", path=str(fixtures / "tokenizer" / "20B_tokenizer.json")))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50277, 0)
    ids = tokenizer.encode("In the beginning<|endoftext|>  God")
    assert 0 in ids and tokenizer.decode(ids) == "In the beginning  God"
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(Config(path=str(tmp_path / "saved")))
    assert again.encode("In the beginning<|endoftext|>  God") == ids
    source = fixtures / "tokenizer" / "20B_tokenizer.json"
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == source.read_bytes()


def test_gpt2_files_equal_transformers(bpe_files: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs = transformers.GPT2TokenizerFast(
        vocab=str(bpe_files / "vocab.json"), merges=str(bpe_files / "merges.txt"), add_prefix_space=False
    )
    tokenizer = load_tokenizer(Config(path=str(bpe_files / "vocab.json"), merges=str(bpe_files / "merges.txt")))
    assert tokenizer.vocab_size == 280 and tokenizer.eod_id == 279
    for text in (*TEXTS[:3], "a<|endoftext|>b  \n\n 123's", "日本"):
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    tokenizer.save(tmp_path)
    assert load_tokenizer(Config(path=str(tmp_path))).encode("the cat") == tokenizer.encode("the cat")


def test_hf_gpt2_has_a_padding_token(bpe_files: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Config(kind="hf_gpt2", path=str(bpe_files)))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (281, 279) and tokenizer.encode(PADDING) == [280]
    tokenizer.save(tmp_path)
    for config in (Config(path=str(tmp_path)), Config(kind="hf_gpt2", path=str(tmp_path))):
        assert load_tokenizer(config).vocab_size == 281


def test_char_is_the_originals(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Config(kind="char"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (512, 0)
    assert tokenizer.encode("aä") == [97, 195, 164] and tokenizer.decode([97, 10, 195, 300]) == "a Ã" + chr(300)
    tokenizer.save(tmp_path)
    assert load_tokenizer(Config(path=str(tmp_path))).vocab_size == 512


@given(st.text())
def test_bytes_give_the_text_back(text: str) -> None:
    tokenizer = load_tokenizer(Config(kind="bytes"))
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eod_id or 0]) == text


def test_training_is_repeatable_and_loses_no_text(tmp_path: Path) -> None:
    first, second = (train_bpe(iter(TEXTS), 275) for _ in range(2))
    assert first.engine.to_str() == second.engine.to_str()
    assert first.vocab_size == 275 and first.eod_id == 0
    text = "unseen: 日本 \x00\n é"
    assert first.decode(first.encode(text)) == text and first.encode("a<|endoftext|>")[-1] == 0
    first.save(tmp_path)
    assert load_tokenizer(Config(path=str(tmp_path / "tokenizer.json"))).encode("the cat") == first.encode("the cat")
    with pytest.raises(DataError, match="256 bytes"):
        train_bpe(TEXTS, 100)


def test_merges_are_texts_that_old_readers_know(tmp_path: Path) -> None:
    """Pairs came with tokenizers 0.20, whose own files older versions cannot open."""
    trained = train_bpe(["In the beginning was the word"] * 3, 280)
    trained.save(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    again = load_tokenizer(Config(path=str(tmp_path)))
    assert again.encode("the beginning") == trained.encode("the beginning")
    assert json.loads(engine_text(again.engine)) == json.loads((tmp_path / "tokenizer.json").read_text())


def test_tiktoken_with_an_encoding_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding(
        "own", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "own", encoding)
    tokenizer = load_tokenizer(Config(kind="tiktoken", path="own"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (259, 258)
    assert tokenizer.encode("the th") == [257, 32, 256] and tokenizer.decode([257, 32]) == "the "
    with pytest.raises(DataError, match="tiktoken refuses"):
        tokenizer.encode("a<|endoftext|>")
    tokenizer.save(tmp_path)
    assert load_tokenizer(Config(path=str(tmp_path))).encode("the") == [257]


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "m"), vocab_size=24, minloglevel=2
    )
    tokenizer = load_tokenizer(Config(path=str(tmp_path / "m.model")))
    assert tokenizer.vocab_size == 24 and tokenizer.eod_id == 0  # the unknown piece stands in
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    assert tokenizer.encode_batch(["the", "cat"]) == [tokenizer.encode("the"), tokenizer.encode("cat")]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(Config(path=str(tmp_path / "saved"))).vocab_size == 24


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(), "no tokenizer"),
        (Config(kind="hf"), "needs tokenizer.path"),
        (Config(path="nowhere.json"), "nowhere.json does not exist"),
        (Config(kind="gpt2", path="nowhere"), "does not exist"),
        (Config(kind="hf_gpt2", path="gpt2"), "is no folder"),
    ],
)
def test_files_that_are_not_there(config: Config, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(config)


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer.json"):
        load_tokenizer(Config(path=str(tmp_path)))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("[")
    with pytest.raises(DataError, match="no GPT-2 BPE files"):
        load_tokenizer(Config(kind="gpt2", path=str(tmp_path)))
