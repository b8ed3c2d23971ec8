"""Text to token ids and back: one small class for each engine, all with the same methods.

An id beyond `vocab_size` never comes out, though some below it may name no token. `eod_id` ends a document; it is None
when the vocabulary has no such token.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers

from castalia.config.schema import TokenizerConfig
from castalia.data.tokenizer_folder import (
    VOCABULARY,
    Added,
    TokenizerFolder,
    decoded,
    listed,
    read_tokenizer_folder,
    write_files,
)
from castalia.errors import DataError
from castalia.reading import keys, parse_json, read_json, typed

END_OF_TEXT = "<|endoftext|>"
EOD_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # where no file names the end
PADDING = "<|padding|>"
SETTINGS = "tokenizer_kind.json"  # written by tokenizers whose files do not tell their kind
# Appended to a SentencePiece model, whose parts are then merged: normalizer_spec.add_dummy_prefix = false ...
NO_SPACE_IN_FRONT = b"\x1a\x02\x18\x00"
KEEPS_SPACES = b"\x1a\x04\x18\x00\x20\x00"  # ... and remove_extra_whitespaces = false


class Tokenizer:
    """What all engines have in common."""

    kind: str  # in words, or of `tokenizer.kind`
    vocab_size: int
    eod_id: int | None = None
    end_ids: frozenset[int] = frozenset()  # each of these ends a text, `eod_id` among them
    bos_id: int | None = None  # the token that begins a text, whether `encode` puts it there or not
    byte_ids: frozenset[int] = frozenset()  # tokens of one byte, of which only a run that is whole can be decoded
    words: TokenizerFolder = TokenizerFolder()  # what the folder says beside the vocabulary, and its files
    note: str = ""  # a rule that differs from what other programs do with the same files

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        """`bare`: texts spell out their special tokens, as conversations do, so that nothing is put around them."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError

    def token(self, index: int) -> str | None:
        """How the id is written in the vocabulary."""
        return None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write into `folder` what `load_tokenizer` needs to find the same tokenizer there, and what lies beside it."""
        write_files(Path(folder), self.words.files)

    @property
    def ends(self) -> str:
        """All ends in words, the document's first."""
        first = [] if self.eod_id is None else [self.eod_id]
        return listed([*first, *sorted(self.end_ids - set(first))], self.token)

    def _end(self, named: Sequence[int]) -> None:
        """`named`: ids that end a text, that of a document first."""
        self.eod_id, self.end_ids = (named[0] if named else None), frozenset(named)


class RustTokenizer(Tokenizer):
    """Hugging Face's `tokenizers`: tokenizer.json, GPT-2's vocab.json with merges.txt."""

    def __init__(
        self, engine: tokenizers.Tokenizer, words: TokenizerFolder | None = None, *, drop_special: bool = True
    ):
        self.engine = engine
        self.words = words or TokenizerFolder()  # without a file of the vocabulary the engine writes itself
        self.drop_special = drop_special
        parts = str(engine.pre_tokenizer) + str(engine.decoder)
        model = type(engine.model).__name__  # BPE, Unigram, WordPiece, WordLevel
        self.kind = f"byte-level {model}" if "ByteLevel" in parts else model
        self.vocab_size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = engine.token_to_id(self.words.special.get("bos_token", ""))
        by_name = [i for name in EOD_NAMES if (i := engine.token_to_id(name)) is not None]
        self._end(self.words.ends(engine.token_to_id, self.vocab_size) or by_name[:1])
        if "ByteFallback" in parts:
            self.kind += " with bytes for what it lacks"
            found = (engine.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            self.byte_ids = frozenset(i for i in found if i is not None)

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        return [each.ids for each in self.engine.encode_batch_fast(texts, add_special_tokens=not bare)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=self.drop_special)

    def token(self, index: int) -> str | None:
        return self.engine.id_to_token(index)

    def save(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        super().save(folder)
        if not self.words.files.keys() & {"tokenizer.json", "vocab.json"}:
            write_files(Path(folder), {"tokenizer.json": engine_text(self.engine).encode()})


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids. `char` is NeoX's: 512 entries, 0 ends a document, every id is shown as one code point."""

    def __init__(self, kind: str):
        self.kind = kind
        self.vocab_size = 512 if kind == "char" else 257
        self._end([0 if kind == "char" else 256])

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        if self.kind == "char":
            return "".join(chr(max(int(i), 32)) for i in ids)
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        _save_settings(folder, kind=self.kind)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Control pieces and added tokens that a text spells out become their ids, a text begins
    with the model's own beginning, and its end ends a document: what `transformers` does with such a file.

    `neox`: GPT-NeoX's rule. There, `<s>` is three characters, nothing begins a text, and documents end with the piece
    `<|endoftext|>`, which for most models means the unknown piece.
    """

    kind = "SentencePiece"

    def __init__(self, words: TokenizerFolder, *, neox: bool = False):
        self.words, self.neox = words, neox
        model = words.files["tokenizer.model"]
        processor = _optional("sentencepiece").SentencePieceProcessor
        try:
            self.engine = processor(model_proto=model)
            self.inner = processor(model_proto=model + NO_SPACE_IN_FRONT)  # encodes what is behind a special token
            self.tail = processor(model_proto=model + KEEPS_SPACES)  # decodes what is not the beginning
        except (RuntimeError, ValueError) as error:
            raise DataError(f"this is no SentencePiece model: {error}") from error
        size: int = self.engine.vocab_size()
        self.byte_ids = frozenset(i for i in range(size) if self.engine.is_byte(i))
        self.added: dict[str, tuple[int, Added]] = {}
        self.by_id: dict[int, Added] = {}
        self.vocab_size = size
        if neox:
            self._end([self.engine.piece_to_id(END_OF_TEXT)])  # the unknown id where there is no such piece
            rule = "GPT-NeoX's rule for SentencePiece"
            self.note = f"documents end with id {self.ends} and no token begins them, which is {rule}"
            return
        self._add_tokens(size)
        settings = words.settings
        self.bos_id = self._id(words.special.get("bos_token"), self.engine.bos_id())
        self._end(words.ends(self._id, self.vocab_size) or [i for i in (self.engine.eos_id(),) if i >= 0])
        self.before = [self.bos_id] if self.bos_id is not None and settings.get("add_bos_token", True) else []
        self.after = [self.eod_id] if self.eod_id is not None and settings.get("add_eos_token", False) else []

    def _add_tokens(self, size: int) -> None:
        pieces = {i: Added(self.engine.id_to_piece(i), True) for i in range(size) if self._is_special(i)}
        self.by_id = pieces | dict(self.words.added)
        self.added = {token.content: (i, token) for i, token in self.by_id.items()}
        self.vocab_size = max(size, *(i + 1 for i in self.by_id), 0)
        longest_first = sorted(self.added.values(), key=lambda each: -len(each[1].content))
        self.spelled = [index for index, _ in longest_first]  # by the groups of the pattern
        self.pattern = re.compile("|".join(_pattern(token) for _, token in longest_first) or r"(?!)")

    def _is_special(self, index: int) -> bool:
        return self.engine.is_control(index) or self.engine.is_unknown(index)

    def _id(self, piece: str | None, otherwise: int = -1) -> int | None:
        """The id of a token that is written so."""
        if piece in self.added:
            return self.added[piece][0]
        found = self.engine.piece_to_id(piece) if piece is not None else otherwise
        known = found >= 0 and (piece is None or self.engine.id_to_piece(found) == piece)
        return found if known else None

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        if self.neox:
            return self.engine.encode(list(texts))
        found = map(self._encode, texts)
        return list(found) if bare else [[*self.before, *ids, *self.after] for ids in found]

    def _encode(self, text: str) -> list[int]:
        """Piece by piece between the tokens that the text spells out."""
        ids: list[int] = []
        start, engine = 0, self.engine
        for match in self.pattern.finditer(text):
            ids += engine.encode(text[start : match.start()])
            ids.append(self.spelled[(match.lastindex or 0) - 1])
            start, engine = match.end(), self.engine if self.words.settings.get("legacy") else self.inner
        return ids + (engine.encode(text[start:]) if start < len(text) else [])

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        if not self.words.added or self.neox:
            return self.engine.decode([i for i in ids if i < self.engine.vocab_size()])
        text = ""
        for is_piece, run in groupby(self._shown(ids), key=lambda i: i not in self.by_id):
            found = list(run)
            pieces = (self.tail if text else self.engine).decode(found) if is_piece else None
            text += "".join(self.by_id[i].content for i in found) if pieces is None else pieces
        return text

    def _shown(self, ids: Sequence[int]) -> list[int]:
        """Without special tokens and ids that name nothing."""
        size = self.engine.vocab_size()
        return [i for i in ids if (not self.by_id[i].special if i in self.by_id else i < size)]

    def token(self, index: int) -> str | None:
        if index in self.by_id:
            return self.by_id[index].content
        return self.engine.id_to_piece(index) if index < self.engine.vocab_size() else None

    def save(self, folder: str | os.PathLike[str]) -> None:
        super().save(folder)
        if self.neox:
            _save_settings(folder, kind="neox_sentencepiece")


class TiktokenTokenizer(Tokenizer):
    """An encoding that tiktoken knows by name. Special tokens inside a text raise DataError, unless it is `bare`."""

    def __init__(self, name: str):
        tiktoken = _optional("tiktoken")
        try:
            self.engine = tiktoken.get_encoding(name)
        except (ValueError, OSError) as error:
            raise DataError(f"tokenizer.path={name!r}: tiktoken cannot give this encoding: {error}") from error
        self.kind = f"tiktoken {self.engine.name}"
        self.vocab_size: int = self.engine.n_vocab
        self._end([self.engine.eot_token])

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        try:
            return [self.engine.encode(text, allowed_special="all" if bare else set()) for text in texts]
        except ValueError as error:
            raise DataError(f"tiktoken refuses a text: {error}") from error

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


def load_tokenizer(config: TokenizerConfig, *, neox: bool = False, model: Path | None = None) -> Tokenizer:
    """The tokenizer that the config names; without `kind` the files tell. DataError when there is none.

    `neox`: where GPT-NeoX has a rule of its own for the files, that counts. `model`: the folder of the model, whose
    config.json and generation_config.json count where none lie beside the tokenizer.
    """
    if config.path and (Path(config.path) / SETTINGS).is_file():
        file = Path(config.path) / SETTINGS
        kept = read_json(file, DataError, keys({"kind": str, "path": str}))
        config = typed({"path": config.path, **kept}, str(file), DataError, TokenizerConfig)
    kind = config.kind or _guess_kind(config)
    if kind in ("char", "bytes"):
        return ByteTokenizer(kind)
    if kind == "tiktoken":
        return TiktokenTokenizer(config.path or "gpt2")
    if config.path is None:
        raise DataError(f"tokenizer.kind={kind} needs tokenizer.path: {_FILES[kind]}")
    path = Path(config.path)
    if kind == "hf":
        words = read_tokenizer_folder({"tokenizer.json": _find(path, "tokenizer.json")}, model)
        return RustTokenizer(_read_json(_find(path, "tokenizer.json"), words), words)
    if kind == "gpt2":
        vocab = _find(path, "vocab.json")
        merges = _find(Path(config.merges), "merges.txt") if config.merges else _find(vocab.parent, "merges.txt")
        words = read_tokenizer_folder({"vocab.json": vocab, "merges.txt": merges}, model)
        return RustTokenizer(_read_bpe(vocab, merges, words), words, drop_special=False)
    if kind == "hf_gpt2":
        return _load_hf_gpt2(path, model)
    file = _find(path, "tokenizer.model")
    try:
        return SentencePieceTokenizer(
            read_tokenizer_folder({"tokenizer.model": file}, model), neox=neox or kind == "neox_sentencepiece"
        )
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


_FILES = {
    "hf": "a tokenizer.json",
    "gpt2": "a vocab.json (and tokenizer.merges, a merges.txt)",
    "hf_gpt2": "a folder with tokenizer.json, or vocab.json and merges.txt",
    "sentencepiece": "a .model file",
    "neox_sentencepiece": "a .model file",
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


def _read_json(file: Path, words: TokenizerFolder) -> tokenizers.Tokenizer:
    """Stored truncation and padding are what somebody's last batch needed, no property of the vocabulary: off."""
    text = _with_gaps(decoded(words.files["tokenizer.json"], file), file)
    try:
        engine = tokenizers.Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  the engine raises bare Exception, and what it panics with is none
        raise DataError(f"{file} is no tokenizer.json: {error}") from error
    engine.no_truncation()
    engine.no_padding()
    _complete(engine, {i: token for i, token in words.added.items() if engine.token_to_id(token.content) is None}, file)
    _set_edges(engine, words)
    return engine


def _with_gaps(text: str, file: Path) -> str:
    """The engine numbers added tokens through, whatever ids they have; those that the model knows keep theirs."""
    content = parse_json(text, str(file), DataError, VOCABULARY)
    vocab, added = content.get("model", {}).get("vocab"), content.get("added_tokens") or []
    if not isinstance(vocab, dict):
        return text
    ids = {token["content"]: token["id"] for token in added if token["content"] not in vocab}
    if sorted(ids.values()) == list(range(len(vocab), len(vocab) + len(ids))):
        return text
    vocab |= ids
    return json.dumps(content)


def _set_edges(engine: tokenizers.Tokenizer, words: TokenizerFolder) -> None:
    """What tokenizer_config.json says of a text's first and last token counts, where it says something."""
    asked = [
        (words.special.get(f"{name}_token"), words.settings.get(f"add_{name}_token"), index)
        for name, index in (("bos", 0), ("eos", -1))
    ]
    around = engine.encode("").ids
    has = [bool(around) and engine.token_to_id(token or "") == around[index] for token, _, index in asked]
    wants = [
        here if flag is None or engine.token_to_id(token or "") is None else bool(flag)
        for here, (token, flag, _) in zip(has, asked, strict=True)
    ]
    if wants == has:
        return
    (bos, *_), (eos, *_) = asked
    parts = [str(bos)] * wants[0] + ["$A"] + [str(eos)] * wants[1]
    tokens = [(token, engine.token_to_id(token)) for token in parts if token != "$A"]
    engine.post_processor = tokenizers.processors.TemplateProcessing(single=" ".join(parts), special_tokens=tokens)


def _read_bpe(vocab: Path, merges: Path, words: TokenizerFolder) -> tokenizers.Tokenizer:
    try:
        ids, pairs = tokenizers.models.BPE.read_file(str(vocab), str(merges))
        beside = {token.content: i for i, token in words.added.items() if token.content not in ids}
        engine = tokenizers.Tokenizer(tokenizers.models.BPE(ids | beside, pairs))
    except Exception as error:  # noqa: BLE001  as above
        raise DataError(f"{vocab} and {merges} are no GPT-2 BPE files: {error}") from error
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=bool(words.settings.get("add_prefix_space"))
    )
    engine.decoder = tokenizers.decoders.ByteLevel()
    _complete(engine, words.added, vocab)
    special = dict.fromkeys((END_OF_TEXT, *words.special.values()))
    engine.add_special_tokens([token for token in special if engine.token_to_id(token) is not None])  # in a text: an id
    _set_edges(engine, words)
    return engine


def _complete(engine: tokenizers.Tokenizer, added: Mapping[int, Added], file: Path) -> None:
    """Add tokens that the files beside a vocabulary name. DataError where they do not get the ids that are meant."""
    for index, token in added.items():
        flags = {name: value for name, value in token._asdict().items() if name != "content"}
        engine.add_tokens([tokenizers.AddedToken(token.content, **flags)])
        if (found := engine.token_to_id(token.content)) != index:
            raise DataError(
                f"{file}: the files beside it give {token.content!r} the id {index}, but in this vocabulary it is "
                f"{found}; they belong to another tokenizer, or were edited"
            )


def _load_hf_gpt2(folder: Path, model: Path | None) -> RustTokenizer:
    if not folder.is_dir():
        raise DataError(
            f"tokenizer.path={str(folder)!r} is no folder; tokenizer.kind=hf_gpt2 needs {_FILES['hf_gpt2']}"
        )
    if (folder / "tokenizer.json").is_file():
        words = read_tokenizer_folder({"tokenizer.json": folder / "tokenizer.json"}, model)
        engine = _read_json(folder / "tokenizer.json", words)
    else:
        vocab, merges = _find(folder, "vocab.json"), _find(folder, "merges.txt")
        words = read_tokenizer_folder({"vocab.json": vocab, "merges.txt": merges}, model)
        engine = _read_bpe(vocab, merges, words)
    engine.add_special_tokens([PADDING])
    return RustTokenizer(engine, words.without_vocabulary(), drop_special=False)


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Give texts ids of their own, behind all others. Those that have one keep it."""
    if not isinstance(tokenizer, RustTokenizer):
        raise DataError(
            f"a {tokenizer.kind} vocabulary takes no further tokens ({', '.join(tokens)}); only tokenizer.json and BPE "
            "files do"
        )
    engine, size = tokenizer.engine, tokenizer.vocab_size
    new = [token for token in tokens if engine.token_to_id(token) is None]
    engine.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
    if inside := [token for token in new if (engine.token_to_id(token) or 0) < size]:
        raise DataError(
            f"{', '.join(inside)} cannot be added behind all others: the ids of this vocabulary have gaps, where the "
            "engine puts new tokens; fill the gaps with unused tokens first"
        )
    tokenizer.vocab_size = max(engine.get_vocab(with_added_tokens=True).values()) + 1
    tokenizer.words = tokenizer.words.without_vocabulary()  # whose files lack the tokens


def _pattern(token: Added) -> str:
    body = f"({re.escape(token.content)})"
    body = rf"\b{body}\b" if token.single_word else body
    return (r"\s*" if token.lstrip else "") + body + (r"\s*" if token.rstrip else "")


def spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of the ids with special tokens, which `decode` may leave out."""
    if isinstance(tokenizer, RustTokenizer):
        return tokenizer.engine.decode([int(i) for i in ids], skip_special_tokens=False)
    return tokenizer.decode(ids)


def account(tokenizer: Tokenizer) -> dict[str, Any]:
    """What is known of its text, JSON-ready; tokens as {id, text}."""
    words, first = tokenizer.words, tokenizer.encode("a")[:1]
    ends = [*([] if tokenizer.eod_id is None else [tokenizer.eod_id]), *sorted(tokenizer.end_ids)]
    bos = tokenizer.bos_id

    def shown(index: int | None, text: str | None = None) -> dict[str, Any]:
        return {"id": index, "text": text or (None if index is None else tokenizer.token(index))}

    special = {name: (text, tokenizer.encode_batch([text], bare=True)[0]) for name, text in words.special.items()}
    return {
        "kind": tokenizer.kind,
        "ids": tokenizer.vocab_size,
        "begins": shown(bos) if bos is not None and first == [bos] else None,
        "ends": [shown(index) for index in dict.fromkeys(ends)],
        "special": {name: shown(ids[0] if len(ids) == 1 else None, text) for name, (text, ids) in special.items()},
        "chat_template": words.template is not None,
        "generation": {name: value for name, value in words.generation.items() if not name.endswith("_token_id")},
        "note": tokenizer.note,
    }


def _save_settings(folder: str | os.PathLike[str], **settings: str) -> None:
    write_files(Path(folder), {SETTINGS: (json.dumps(settings) + "\n").encode()})


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
    return RustTokenizer(engine)
