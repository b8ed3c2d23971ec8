import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import TokenizerConfig
from castalia.data.tokenizer import PADDING, add_tokens, describe_tokenizer, engine_text, load_tokenizer, train_bpe
from castalia.data.tokenizer_folder import count_ids
from castalia.errors import DataError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Käse und Brot"] * 20


def save_json(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


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
    tokenizer = load_tokenizer(TokenizerConfig(kind="hf", path=str(fixtures / "tokenizer" / "20B_tokenizer.json")))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50277, 0)
    ids = tokenizer.encode("In the beginning<|endoftext|>  God")
    assert 0 in ids and tokenizer.decode(ids) == "In the beginning  God"
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(TokenizerConfig(path=str(tmp_path / "saved")))
    assert again.encode("In the beginning<|endoftext|>  God") == ids
    source = fixtures / "tokenizer" / "20B_tokenizer.json"
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == source.read_bytes()


def test_gpt2_files_equal_transformers(bpe_files: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs = transformers.GPT2TokenizerFast(
        vocab=str(bpe_files / "vocab.json"), merges=str(bpe_files / "merges.txt"), add_prefix_space=False
    )
    tokenizer = load_tokenizer(
        TokenizerConfig(path=str(bpe_files / "vocab.json"), merges=str(bpe_files / "merges.txt"))
    )
    assert tokenizer.vocab_size == 280 and tokenizer.eod_id == 279
    for text in (*TEXTS[:3], "a<|endoftext|>b  \n\n 123's", "日本"):
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    tokenizer.save(tmp_path)
    assert load_tokenizer(TokenizerConfig(path=str(tmp_path))).encode("the cat") == tokenizer.encode("the cat")


def test_hf_gpt2_has_a_padding_token(bpe_files: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(kind="hf_gpt2", path=str(bpe_files)))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (281, 279) and tokenizer.encode(PADDING) == [280]
    tokenizer.save(tmp_path)
    for config in (TokenizerConfig(path=str(tmp_path)), TokenizerConfig(kind="hf_gpt2", path=str(tmp_path))):
        assert load_tokenizer(config).vocab_size == 281


def test_char_is_the_originals(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(kind="char"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (512, 0)
    assert tokenizer.encode("aä") == [97, 195, 164] and tokenizer.decode([97, 10, 195, 300]) == "a Ã" + chr(300)
    tokenizer.save(tmp_path)
    assert load_tokenizer(TokenizerConfig(path=str(tmp_path))).vocab_size == 512


@given(st.text())
def test_bytes_give_the_text_back(text: str) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(kind="bytes"))
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eod_id or 0]) == text


def test_training_is_repeatable_and_loses_no_text(tmp_path: Path) -> None:
    first, second = (train_bpe(iter(TEXTS), 275) for _ in range(2))
    assert first.engine.to_str() == second.engine.to_str()
    assert first.vocab_size == 275 and first.eod_id == 0
    text = "unseen: 日本 \x00\n é"
    assert first.decode(first.encode(text)) == text and first.encode("a<|endoftext|>")[-1] == 0
    first.save(tmp_path)
    assert load_tokenizer(TokenizerConfig(path=str(tmp_path / "tokenizer.json"))).encode("the cat") == first.encode(
        "the cat"
    )
    with pytest.raises(DataError, match="256 bytes"):
        train_bpe(TEXTS, 100)


def test_merges_are_texts_that_old_readers_know(tmp_path: Path) -> None:
    """Pairs came with tokenizers 0.20, whose own files older versions cannot open."""
    trained = train_bpe(["In the beginning was the word"] * 3, 280)
    trained.save(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    again = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    assert again.encode("the beginning") == trained.encode("the beginning")
    assert json.loads(engine_text(again.engine)) == json.loads((tmp_path / "tokenizer.json").read_text())


def test_tiktoken_with_an_encoding_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding(
        "own", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "own", encoding)
    tokenizer = load_tokenizer(TokenizerConfig(kind="tiktoken", path="own"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (259, 258)
    assert tokenizer.encode("the th") == [257, 32, 256] and tokenizer.decode([257, 32]) == "the "
    with pytest.raises(DataError, match="tiktoken refuses"):
        tokenizer.encode("a<|endoftext|>")
    tokenizer.save(tmp_path)
    assert load_tokenizer(TokenizerConfig(path=str(tmp_path))).encode("the") == [257]


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "m"), vocab_size=24, minloglevel=2
    )
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path / "m.model")))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.ends) == (24, 1, "2 (</s>)") and not tokenizer.note
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    pieces = tokenizer.engine.encode
    assert tokenizer.encode("the cat") == [1, *pieces("the cat")]
    spelled = tokenizer.encode_batch(["<s>the cat</s>"], bare=True)[0]
    assert (spelled[0], spelled[-1]) == (1, 2) and tokenizer.decode(spelled) == "the cat"
    assert tokenizer.encode_batch(["the", "cat"]) == [tokenizer.encode("the"), tokenizer.encode("cat")]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(TokenizerConfig(path=str(tmp_path / "saved"))).vocab_size == 24
    exact = load_tokenizer(TokenizerConfig(path=str(tmp_path / "m.model")), neox=True)
    exact.save(tmp_path / "exact")
    for neox in (exact, load_tokenizer(TokenizerConfig(path=str(tmp_path / "exact")))):
        assert neox.ends == "0 (<unk>)" and "GPT-NeoX's rule" in neox.note
        assert neox.encode("</s>the") == pieces("</s>the")
    save_json(tmp_path / "saved", "tokenizer_config.json", {"added_tokens_decoder": {"30": {"content": "<x>"}}})
    more = load_tokenizer(TokenizerConfig(path=str(tmp_path / "saved")))
    ids = more.encode("the<x>cat")
    assert more.vocab_size == 31 and ids.count(30) == 1 and more.decode(ids) == "the<x>cat"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(), "no tokenizer"),
        (TokenizerConfig(kind="hf"), "needs tokenizer.path"),
        (TokenizerConfig(path="nowhere.json"), "nowhere.json does not exist"),
        (TokenizerConfig(kind="gpt2", path="nowhere"), "does not exist"),
        (TokenizerConfig(kind="hf_gpt2", path="gpt2"), "is not a folder"),
    ],
)
def test_files_that_are_not_there(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(config)


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer.json"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("[")
    with pytest.raises(DataError, match="not GPT-2 BPE files"):
        load_tokenizer(TokenizerConfig(kind="gpt2", path=str(tmp_path)))


def test_stored_truncation_and_padding_are_off(tmp_path: Path) -> None:
    engine = train_bpe(TEXTS, 280).engine
    whole = engine.encode("the cat sat on the mat").ids
    engine.enable_truncation(2)
    engine.enable_padding(length=40)
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    assert tokenizer.encode("the cat sat on the mat") == whole
    assert tokenizer.encode_batch(["the cat sat on the mat"]) == [whole]
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<x>": 281, "<y>": 280}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"281": {"content": "<x>"}, "280": {"content": "<y>"}}}),
        ("added_tokens.json", {"<x>": 300, "<y>": 290}),  # with gaps
    ],
)
def test_tokens_beside_the_vocabulary_of_slow_tokenizers(
    bpe_files: Path, tmp_path: Path, name: str, content: dict
) -> None:
    for file in bpe_files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_json(tmp_path, name, content)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    x, y = (300, 290) if content.get("<x>") == 300 else (281, 280)
    assert tokenizer.encode("<y><x>") == [y, x] and tokenizer.vocab_size == x + 1
    assert tokenizer.decode([x]) == "<x>"


def test_ids_may_have_gaps(tmp_path: Path) -> None:
    engine = train_bpe(TEXTS, 270).engine
    content = json.loads(engine.to_str())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 400, "content": "<far>"})
    save_json(tmp_path, "tokenizer.json", content)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    assert tokenizer.encode("the<far>") == [*engine.encode("the").ids, 400]
    assert tokenizer.vocab_size == count_ids(tmp_path / "tokenizer.json") == 401
    add_tokens(tokenizer, ["<new>"])
    assert tokenizer.encode("<new>") == [401] and tokenizer.vocab_size == 402


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, [0]),
        ({"tokenizer_config.json": {"eos_token": "cat"}}, ["cat"]),
        ({"special_tokens_map.json": {"eos_token": {"content": "cat"}}}, ["cat"]),
        ({"config.json": {"eos_token_id": 5}}, [5]),
        ({"config.json": {"eos_token_id": [5, 4]}, "generation_config.json": {"eos_token_id": [7, 5]}}, [5, 4, 7]),
        ({"tokenizer_config.json": {"eos_token": "cat"}, "generation_config.json": {"eos_token_id": 6}}, ["cat", 6]),
        ({"config.json": {"eos_token_id": 50256}}, [0]),  # beyond the vocabulary
        ({"tokenizer_config.json": {"eos_token": None}}, [0]),
    ],
)
def test_all_ends_that_a_folder_names(tmp_path: Path, files: dict[str, dict], ends: list) -> None:
    engine = train_bpe(["cat cat cat"] * 20, 270).engine
    engine.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        save_json(tmp_path, name, content)
    expected = [engine.token_to_id(end) if isinstance(end, str) else end for end in ends]
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(TokenizerConfig(path=str(place)))
        assert (tokenizer.eod_id, tokenizer.end_ids) == (expected[0], set(expected))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(TokenizerConfig(path=str(tmp_path / "saved"))).end_ids == set(expected)


@pytest.mark.parametrize(
    ("settings", "around"),
    [
        ({"bos_token": "<|endoftext|>", "add_bos_token": True}, [0]),
        ({"bos_token": "<|endoftext|>"}, []),
        ({"bos_token": "none", "add_bos_token": True}, []),
    ],
)
def test_whether_a_token_begins_a_text(tmp_path: Path, settings: dict, around: list[int]) -> None:
    first = train_bpe(TEXTS, 270)
    first.save(tmp_path)
    save_json(tmp_path, "tokenizer_config.json", settings)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    assert tokenizer.encode("the") == around + first.encode("the")
    assert tokenizer.encode_batch(["the"], bare=True) == [first.encode("the")]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "added_tokens.json"])
@pytest.mark.parametrize("damage", ["{", "[]", "\udcff"])
def test_damaged_files_beside_a_vocabulary_are_named(tmp_path: Path, name: str, damage: str) -> None:
    train_bpe(TEXTS, 270).save(tmp_path)
    (tmp_path / name).write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=f"{name} is damaged"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))


def test_account_says_what_the_files_say(tmp_path: Path) -> None:
    train_bpe(["a cat"], 270).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "add_bos_token": True, "chat_template": "x"}
        )
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 0], "do_sample": true, "temperature": 0.6}')
    said = describe_tokenizer(load_tokenizer(TokenizerConfig(path=str(tmp_path))))
    end = {"id": 0, "text": "<|endoftext|>"}
    assert (said["kind"], said["begins"], said["chat_template"]) == ("byte-level BPE", end, True)
    assert [each["id"] for each in said["ends"]] == [0, 5]
    assert said["special"] == {"eos_token": end, "bos_token": end}
    assert said["generation"] == {"do_sample": True, "temperature": 0.6}
