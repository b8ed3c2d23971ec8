"""Text to token ids and back: one small class for each engine, all with the same methods.

An id beyond `vocab_size` never comes out. `eod_id` ends a document; it is None when the vocabulary has no such token.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

import tokenizers

from castalia.config.schema import Tokenizer as TokenizerConfig
from castalia.errors import DataError

END_OF_TEXT = "<|endoftext|>"
EOD_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
PADDING = "<|padding|>"
SETTINGS = "tokenizer_kind.json"  # written by tokenizers that have no files of their own


class Tokenizer(Protocol):
    vocab_size: int
    eod_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write into `folder` what `load_tokenizer` needs to find the same tokenizer there."""


class RustTokenizer:
    """Hugging Face's `tokenizers`: tokenizer.json, GPT-2's vocab.json with merges.txt."""

    def __init__(self, engine: tokenizers.Tokenizer, files: dict[str, Path], *, drop_special: bool):
        self.engine = engine
        self.files = files  # name in a saved folder -> where it lies; empty: the engine writes itself
        self.drop_special = drop_special
        self.vocab_size = engine.get_vocab_size(with_added_tokens=True)
        found = (engine.token_to_id(name) for name in EOD_NAMES)
        self.eod_id: int | None = next((i for i in found if i is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.engine.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=self.drop_special)

    def save(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, source in self.files.items():
            if source.resolve() != (Path(folder) / name).resolve():
                shutil.copyfile(source, Path(folder) / name)
        if not self.files:
            (Path(folder) / "tokenizer.json").write_text(engine_text(self.engine), encoding="utf-8")


class ByteTokenizer:
    """UTF-8 bytes as ids. `char` is NeoX's: 512 entries, 0 ends a document, every id is shown as one code point."""

    def __init__(self, kind: str):
        self.kind = kind
        self.vocab_size = 512 if kind == "char" else 257
        self.eod_id: int | None = 0 if kind == "char" else 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        if self.kind == "char":
            return "".join(chr(max(int(i), 32)) for i in ids)
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save_settings(folder, kind=self.kind)


class SentencePieceTokenizer:
    def __init__(self, path: Path):
        self.path = path
        self.engine = _optional("sentencepiece").SentencePieceProcessor(model_file=str(path))
        self.vocab_size: int = self.engine.vocab_size()
        self.eod_id: int | None = self.engine.piece_to_id(END_OF_TEXT)  # the unknown id where there is no such piece

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.engine.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        return self.engine.decode([int(i) for i in ids])

    def save(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, Path(folder) / "tokenizer.model")


class TiktokenTokenizer:
    """An encoding that tiktoken knows by name. Special tokens inside a text raise DataError."""

    def __init__(self, name: str):
        tiktoken = _optional("tiktoken")
        try:
            self.engine = tiktoken.get_encoding(name)
        except (ValueError, OSError) as error:
            raise DataError(f"tokenizer.path={name!r}: tiktoken cannot give this encoding: {error}") from error
        self.vocab_size: int = self.engine.n_vocab
        self.eod_id: int | None = self.engine.eot_token

    def encode(self, text: str) -> list[int]:
        try:
            return self.engine.encode(text)
        except ValueError as error:
            raise DataError(f"tiktoken refuses a text: {error}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self.engine.decode([int(i) for i in ids])

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save_settings(folder, kind="tiktoken", path=self.engine.name)


def engine_text(engine: tokenizers.Tokenizer) -> str:
    """A tokenizer.json. Merges are written as texts, "a b", which versions of `tokenizers` before 0.20 read, too."""
    content = json.loads(engine.to_str())
    merges = content["model"].get("merges") or []
    if not any(" " in part for merge in merges for part in merge):  # of bytes as characters there is none
        content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the config names; without `kind` the files tell. DataError when there is none."""
    if config.path and (Path(config.path) / SETTINGS).is_file():
        config = TokenizerConfig(**json.loads((Path(config.path) / SETTINGS).read_text()))
    kind = config.kind or _guess_kind(config)
    if kind in ("char", "bytes"):
        return ByteTokenizer(kind)
    if kind == "tiktoken":
        return TiktokenTokenizer(config.path or "gpt2")
    if config.path is None:
        raise DataError(f"tokenizer.kind={kind} needs tokenizer.path: {_FILES[kind]}")
    path = Path(config.path)
    if kind == "hf":
        file = _find(path, "tokenizer.json")
        return RustTokenizer(_read_json(file), {"tokenizer.json": file}, drop_special=True)
    if kind == "gpt2":
        vocab = _find(path, "vocab.json")
        merges = _find(Path(config.merges), "merges.txt") if config.merges else _find(vocab.parent, "merges.txt")
        return RustTokenizer(_read_bpe(vocab, merges), {"vocab.json": vocab, "merges.txt": merges}, drop_special=False)
    if kind == "hf_gpt2":
        return _load_hf_gpt2(path)
    return SentencePieceTokenizer(_find(path, "tokenizer.model"))


_FILES = {
    "hf": "a tokenizer.json",
    "gpt2": "a vocab.json (and tokenizer.merges, a merges.txt)",
    "hf_gpt2": "a folder with tokenizer.json, or vocab.json and merges.txt",
    "sentencepiece": "a .model file",
}


def _guess_kind(config: TokenizerConfig) -> str:
    if config.path is None:
        raise DataError("no tokenizer: give tokenizer.path (tokenizer.json, vocab.json, a .model file or a folder)")
    path = Path(config.path)
    if (
        config.merges
        or path.name == "vocab.json"
        or (path / "vocab.json").is_file()
        and (path / "merges.txt").is_file()
    ):
        return "gpt2" if not (path / "tokenizer.json").is_file() else "hf"
    if path.suffix == ".model" or (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return "sentencepiece"
    return "hf"


def _find(path: Path, name: str) -> Path:
    """The file itself, or the file of this name in a folder."""
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"tokenizer file {file} does not exist")
    return file


def _read_json(file: Path) -> tokenizers.Tokenizer:
    try:
        text = file.read_text(encoding="utf-8")
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  the engine raises bare Exception for files that it cannot read
        raise DataError(f"{file} is no tokenizer.json: {error}") from error


def _read_bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        engine = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # noqa: BLE001  as above
        raise DataError(f"{vocab} and {merges} are no GPT-2 BPE files: {error}") from error
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    if engine.token_to_id(END_OF_TEXT) is not None:
        engine.add_special_tokens([END_OF_TEXT])  # the literal text becomes this one id
    return engine


def _load_hf_gpt2(folder: Path) -> RustTokenizer:
    if not folder.is_dir():
        raise DataError(
            f"tokenizer.path={str(folder)!r} is no folder; tokenizer.kind=hf_gpt2 needs {_FILES['hf_gpt2']}"
        )
    if (folder / "tokenizer.json").is_file():
        engine = _read_json(folder / "tokenizer.json")
    else:
        engine = _read_bpe(_find(folder, "vocab.json"), _find(folder, "merges.txt"))
    engine.add_special_tokens([PADDING])
    return RustTokenizer(engine, {}, drop_special=False)


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Give texts ids of their own, behind all others. Those that have one keep it."""
    if not isinstance(tokenizer, RustTokenizer):
        kind = type(tokenizer).__name__
        raise DataError(f"a {kind} takes no further tokens ({', '.join(tokens)}); only tokenizer.json and BPE files do")
    tokenizer.engine.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
    tokenizer.vocab_size = tokenizer.engine.get_vocab_size(with_added_tokens=True)
    tokenizer.files = {}  # those on disk lack the tokens


def spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of the ids with special tokens, which `decode` may leave out."""
    if isinstance(tokenizer, RustTokenizer):
        return tokenizer.engine.decode([int(i) for i in ids], skip_special_tokens=False)
    return tokenizer.decode(ids)


def _save_settings(folder: str | os.PathLike[str], **settings: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / SETTINGS).write_text(json.dumps(settings) + "\n")


def _optional(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise DataError(f"this tokenizer needs the package {name!r}: pip install {name}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> RustTokenizer:
    """A byte-level BPE of at most `vocab_size` entries, `<|endoftext|>` with id 0. Same texts, same vocabulary."""
    if vocab_size < 257:
        raise DataError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return RustTokenizer(engine, {}, drop_special=True)
