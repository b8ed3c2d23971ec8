"""Text to token ids and back: one small class for each engine, all with the methods of `Tokenizer`.

Begin with `load_tokenizer`. All ids are below `vocab_size`, though not every id below it names a token. `eod_id` ends
a document; it is None if the vocabulary has no such token.
"""

from __future__ import annotations

import json
import os
import re
import sys
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
    ids_with_texts,
    read_tokenizer_folder,
    write_files,
)
from castalia.errors import DataError
from castalia.reading import keys, parse_json, read_json, typed

END_OF_TEXT = "<|endoftext|>"
EOD_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # tried in this order if no file names the end
PADDING = "<|padding|>"
SETTINGS = "tokenizer_kind.json"  # written by tokenizers whose files do not show their kind
# Appended to the bytes of a SentencePiece model, they override a field of it, as protocol buffers merge their parts:
# normalizer_spec.add_dummy_prefix = false ...
NO_SPACE_IN_FRONT = b"\x1a\x02\x18\x00"
KEEPS_SPACES = b"\x1a\x04\x18\x00\x20\x00"  # ... and remove_extra_whitespaces = false


class Tokenizer:
    """The interface of all tokenizers."""

    kind: str  # for people, or a value of `tokenizer.kind`
    vocab_size: int
    eod_id: int | None = None
    end_ids: frozenset[int] = frozenset()  # all ids that end a text, `eod_id` among them
    bos_id: int | None = None  # the token that begins a text, whether `encode` adds it or not
    byte_ids: frozenset[int] = frozenset()  # tokens of one byte; several of them may make up one character
    special_texts: Mapping[int, str] = {}  # tokens that `decode` leaves out, as a text spells them
    folder: TokenizerFolder = TokenizerFolder()  # the files of its folder, and what they say besides the vocabulary
    note: str = ""  # a rule by which it differs from other programs with the same files

    def encode(self, text: str) -> list[int]:
        """The ids of one text, with the tokens that the tokenizer puts at its beginning and end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        """The ids of each text. `bare` adds nothing at the beginning and end of a text, and takes special tokens that
        a text spells out as such, as rendered conversations do."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Some tokenizers leave out special tokens; see `decode_with_special`."""
        raise NotImplementedError

    def token(self, index: int) -> str | None:
        """How the vocabulary writes the id, or None."""
        return None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which `load_tokenizer` gets the same tokenizer, and the other files of its folder."""
        write_files(Path(folder), self.folder.files)

    @property
    def ends(self) -> str:
        """All ids that end a text, for people, that of a document first."""
        first = [] if self.eod_id is None else [self.eod_id]
        return ids_with_texts([*first, *sorted(self.end_ids - set(first))], self.token)

    def _end(self, named: Sequence[int]) -> None:
        """Set the ids that end a text. The first of `named` ends a document."""
        self.eod_id, self.end_ids = (named[0] if named else None), frozenset(named)


class RustTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's library `tokenizers`: tokenizer.json, or vocab.json and merges.txt of GPT-2."""

    def __init__(
        self, engine: tokenizers.Tokenizer, folder: TokenizerFolder | None = None, *, drop_special: bool = True
    ):
        self.engine = engine
        self.folder = folder or TokenizerFolder()  # if it has no vocabulary file, `save` lets the engine write one
        self.drop_special = drop_special
        parts = str(engine.pre_tokenizer) + str(engine.decoder)
        model = type(engine.model).__name__  # BPE, Unigram, WordPiece, WordLevel
        self.kind = f"byte-level {model}" if "ByteLevel" in parts else model
        self.vocab_size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have gaps
        self.bos_id = engine.token_to_id(self.folder.special.get("bos_token", ""))
        if drop_special:
            added = engine.get_added_tokens_decoder().items()
            self.special_texts = {index: token.content for index, token in added if token.special}
        by_name = [i for name in EOD_NAMES if (i := engine.token_to_id(name)) is not None]
        self._end(self.folder.ends(engine.token_to_id, self.vocab_size) or by_name[:1])
        if "ByteFallback" in parts:
            self.kind += " with bytes for what it lacks"
            byte_ids = (engine.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            self.byte_ids = frozenset(i for i in byte_ids if i is not None)

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        """Ids from the engine, which encodes the texts in parallel."""
        return [encoding.ids for encoding in self.engine.encode_batch_fast(texts, add_special_tokens=not bare)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text, without special tokens if the tokenizer was made with `drop_special`."""
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=self.drop_special)

    def token(self, index: int) -> str | None:
        """The token as the vocabulary writes it, with Ġ for a space in byte-level vocabularies."""
        return self.engine.id_to_token(index)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files of its folder, or a tokenizer.json if those lack a vocabulary."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        super().save(folder)
        if not self.folder.files.keys() & {"tokenizer.json", "vocab.json"}:
            write_files(Path(folder), {"tokenizer.json": engine_text(self.engine).encode()})


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as ids.

    `bytes` has 257 ids, of which 256 ends a document. `char` is GPT-NeoX's CharLevelTokenizer: 512 ids, 0 ends a
    document, and every id is shown as one code point.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.vocab_size = 512 if kind == "char" else 257
        self._end([0 if kind == "char" else 256])

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        """One id for each byte; `bare` changes nothing."""
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text, with U+FFFD for bytes that are not UTF-8."""
        if self.kind == "char":
            return "".join(chr(max(int(i), 32)) for i in ids)  # as in GPT-NeoX, control characters become spaces
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a file that names the kind."""
        _save_settings(folder, kind=self.kind)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, used as the library `transformers` uses it.

    Control pieces and added tokens that a text spells out become their ids. A text begins with the model's beginning
    of sequence, and a document ends with its end of sequence.

    With `neox` the rule is that of GPT-NeoX: `<s>` in a text is three characters, no token begins a text, and documents
    end with the piece `<|endoftext|>`, which in most models means the unknown piece.
    """

    kind = "SentencePiece"

    def __init__(self, folder: TokenizerFolder, *, neox: bool = False):
        self.folder, self.neox = folder, neox
        model = folder.files["tokenizer.model"]
        processor = _optional("sentencepiece").SentencePieceProcessor
        try:
            self.engine = processor(model_proto=model)
            self.inner = processor(model_proto=model + NO_SPACE_IN_FRONT)  # encodes text after a special token
            self.tail = processor(model_proto=model + KEEPS_SPACES)  # decodes all parts of a text but the first
        except (RuntimeError, ValueError) as error:
            raise DataError(f"this is not a SentencePiece model: {error}") from error
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
        settings = folder.settings
        self.bos_id = self._id(folder.special.get("bos_token"), self.engine.bos_id())
        self._end(folder.ends(self._id, self.vocab_size) or [i for i in (self.engine.eos_id(),) if i >= 0])
        self.before = [self.bos_id] if self.bos_id is not None and settings.get("add_bos_token", True) else []
        self.after = [self.eod_id] if self.eod_id is not None and settings.get("add_eos_token", False) else []

    def _add_tokens(self, size: int) -> None:
        pieces = {i: Added(self.engine.id_to_piece(i), True) for i in range(size) if self._is_special(i)}
        self.by_id = pieces | dict(self.folder.added)
        self.added = {token.content: (i, token) for i, token in self.by_id.items()}
        self.vocab_size = max(size, *(i + 1 for i in self.by_id), 0)
        self.special_texts = {i: token.content for i, token in self.by_id.items() if token.special}
        # The longest first, because a token may begin with another one; `(?!)` never matches.
        longest_first = sorted(self.added.values(), key=lambda entry: -len(entry[1].content))
        self.spelled = [index for index, _ in longest_first]  # the ids of the pattern's groups
        self.pattern = re.compile("|".join(_pattern(token) for _, token in longest_first) or r"(?!)")

    def _is_special(self, index: int) -> bool:
        return self.engine.is_control(index) or self.engine.is_unknown(index)

    def _id(self, piece: str | None, otherwise: int = -1) -> int | None:
        """The id of a token by its text, or `otherwise` if `piece` is None; None if the vocabulary lacks it."""
        if piece in self.added:
            return self.added[piece][0]
        index = self.engine.piece_to_id(piece) if piece is not None else otherwise
        known = index >= 0 and (piece is None or self.engine.id_to_piece(index) == piece)  # unknown ones get unk's id
        return index if known else None

    def encode_batch(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        """Ids with the tokens that begin and end a text, unless `bare`."""
        if self.neox:
            return self.engine.encode(list(texts))
        encoded = map(self._encode, texts)
        return list(encoded) if bare else [[*self.before, *ids, *self.after] for ids in encoded]

    def _encode(self, text: str) -> list[int]:
        """Encode the parts of a text between the special tokens that it spells out."""
        ids: list[int] = []
        start, engine = 0, self.engine
        for match in self.pattern.finditer(text):
            ids += engine.encode(text[start : match.start()])
            ids.append(self.spelled[(match.lastindex or 0) - 1])
            # `legacy`: as old versions of transformers, which put a space in front after a special token, too.
            start, engine = match.end(), self.engine if self.folder.settings.get("legacy") else self.inner
        return ids + (engine.encode(text[start:]) if start < len(text) else [])

    def decode(self, ids: Iterable[int]) -> str:
        """Text without control pieces and special added tokens."""
        ids = [int(i) for i in ids]
        if not self.folder.added or self.neox:
            return self.engine.decode([i for i in ids if i < self.engine.vocab_size()])
        text = ""
        for is_piece, group in groupby(self._shown(ids), key=lambda i: i not in self.by_id):
            run = list(group)
            pieces = (self.tail if text else self.engine).decode(run) if is_piece else None
            text += "".join(self.by_id[i].content for i in run) if pieces is None else pieces
        return text

    def _shown(self, ids: Sequence[int]) -> list[int]:
        """The ids without special tokens and without ids that name no token."""
        size = self.engine.vocab_size()
        return [i for i in ids if (not self.by_id[i].special if i in self.by_id else i < size)]

    def token(self, index: int) -> str | None:
        """The piece, with ▁ for a space, or the text of an added token."""
        if index in self.by_id:
            return self.by_id[index].content
        return self.engine.id_to_piece(index) if index < self.engine.vocab_size() else None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model and the other files of its folder, and that GPT-NeoX's rule holds if it does."""
        super().save(folder)
        if self.neox:
            _save_settings(folder, kind="neox_sentencepiece")


class TiktokenTokenizer(Tokenizer):
    """An encoding of the library tiktoken, by name."""

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
        """Ids of the texts. Raises DataError for a text that spells out a special token, unless `bare`."""
        try:
            return [self.engine.encode(text, allowed_special="all" if bare else set()) for text in texts]
        except ValueError as error:
            raise DataError(f"tiktoken refuses a text: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text, special tokens included."""
        return self.engine.decode([int(i) for i in ids])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a file that names the encoding."""
        _save_settings(folder, kind="tiktoken", path=self.engine.name)


def engine_text(engine: tokenizers.Tokenizer) -> str:
    """The text of a tokenizer.json. Merges are written as "a b", which `tokenizers` before 0.20 can read, too."""
    content = json.loads(engine.to_str())
    merges = content["model"].get("merges") or []
    if not any(" " in part for merge in merges for part in merge):  # byte-level vocabularies have no space in a token
        content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def load_tokenizer(config: TokenizerConfig, *, neox: bool = False, model: Path | None = None) -> Tokenizer:
    """The tokenizer that the config names. Without `tokenizer.kind`, the files decide the kind.

    With `neox`, files are used by GPT-NeoX's rule if it has one of its own. `model` is the folder of the model, whose
    config.json and generation_config.json are read if the folder of the tokenizer has none. Raises DataError if there
    is not a tokenizer, or if its files are damaged.
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
        folder = read_tokenizer_folder({"tokenizer.json": _find(path, "tokenizer.json")}, model)
        return RustTokenizer(_read_json(_find(path, "tokenizer.json"), folder), folder)
    if kind == "gpt2":
        vocab = _find(path, "vocab.json")
        merges = _find(Path(config.merges), "merges.txt") if config.merges else _find(vocab.parent, "merges.txt")
        folder = read_tokenizer_folder({"vocab.json": vocab, "merges.txt": merges}, model)
        return RustTokenizer(_read_bpe(vocab, merges, folder), folder, drop_special=False)
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
    """The path itself if it is a file, else the file of this name in it. Raises DataError if there is none."""
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"tokenizer file {file} does not exist")
    return file


def _read_json(file: Path, folder: TokenizerFolder) -> tokenizers.Tokenizer:
    """The engine of a tokenizer.json, without truncation and padding, which are settings of somebody's last batch."""
    text = _with_gaps(decoded(folder.files["tokenizer.json"], file), file)
    try:
        engine = tokenizers.Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  it raises bare Exception, and its panics are not Exceptions
        raise DataError(f"{file} is not a tokenizer.json: {error}") from error
    engine.no_truncation()
    engine.no_padding()
    _complete(
        engine, {i: token for i, token in folder.added.items() if engine.token_to_id(token.content) is None}, file
    )
    _set_edges(engine, folder)
    return engine


def _with_gaps(text: str, file: Path) -> str:
    """A tokenizer.json whose added tokens keep their ids even if the numbers have gaps.

    The engine would number added tokens consecutively, whatever ids the file gives them. Those that are in the
    vocabulary of the model as well keep their ids.
    """
    content = parse_json(text, str(file), DataError, VOCABULARY)
    vocab, added = content.get("model", {}).get("vocab"), content.get("added_tokens") or []
    if not isinstance(vocab, dict):
        return text
    ids = {token["content"]: token["id"] for token in added if token["content"] not in vocab}
    if sorted(ids.values()) == list(range(len(vocab), len(vocab) + len(ids))):
        return text
    vocab |= ids
    return json.dumps(content)


def _set_edges(engine: tokenizers.Tokenizer, folder: TokenizerFolder) -> None:
    """Make the engine add the first and last token of a text as tokenizer_config.json says, if it says anything."""
    asked = [
        (folder.special.get(f"{name}_token"), folder.settings.get(f"add_{name}_token"), index)
        for name, index in (("bos", 0), ("eos", -1))
    ]
    added = engine.encode("").ids  # of an empty text: what it puts first and last
    has = [bool(added) and engine.token_to_id(token or "") == added[index] for token, _, index in asked]
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


def _read_bpe(vocab: Path, merges: Path, folder: TokenizerFolder) -> tokenizers.Tokenizer:
    try:
        ids, pairs = tokenizers.models.BPE.read_file(str(vocab), str(merges))
        beside = {token.content: i for i, token in folder.added.items() if token.content not in ids}
        engine = tokenizers.Tokenizer(tokenizers.models.BPE(ids | beside, pairs))
    except Exception as error:  # noqa: BLE001  it raises bare Exception
        raise DataError(f"{vocab} and {merges} are not GPT-2 BPE files: {error}") from error
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=bool(folder.settings.get("add_prefix_space"))
    )
    engine.decoder = tokenizers.decoders.ByteLevel()
    _complete(engine, folder.added, vocab)
    special = dict.fromkeys((END_OF_TEXT, *folder.special.values()))
    engine.add_special_tokens([token for token in special if engine.token_to_id(token) is not None])
    _set_edges(engine, folder)
    return engine


def _complete(engine: tokenizers.Tokenizer, added: Mapping[int, Added], file: Path) -> None:
    """Add the tokens of the files beside a vocabulary. Raises DataError if the engine gives one another id."""
    for index, token in added.items():
        flags = {name: value for name, value in token._asdict().items() if name != "content"}
        engine.add_tokens([tokenizers.AddedToken(token.content, **flags)])
        if (actual := engine.token_to_id(token.content)) != index:
            raise DataError(
                f"{file}: the files beside it give {token.content!r} the id {index}, but in this vocabulary it is "
                f"{actual}; they belong to another tokenizer, or were edited"
            )


def _load_hf_gpt2(path: Path, model: Path | None) -> RustTokenizer:
    if not path.is_dir():
        needed = _FILES["hf_gpt2"]
        raise DataError(f"tokenizer.path={str(path)!r} is not a folder; tokenizer.kind=hf_gpt2 needs {needed}")
    if (path / "tokenizer.json").is_file():
        folder = read_tokenizer_folder({"tokenizer.json": path / "tokenizer.json"}, model)
        engine = _read_json(path / "tokenizer.json", folder)
    else:
        vocab, merges = _find(path, "vocab.json"), _find(path, "merges.txt")
        folder = read_tokenizer_folder({"vocab.json": vocab, "merges.txt": merges}, model)
        engine = _read_bpe(vocab, merges, folder)
    engine.add_special_tokens([PADDING])  # as GPT-NeoX does for this kind
    return RustTokenizer(engine, folder.without_vocabulary(), drop_special=False)


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Add tokens to the vocabulary, with ids after all others. Tokens that it has already keep their ids.

    Raises DataError if the kind of tokenizer takes no further tokens, or if its ids have gaps.
    """
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
    tokenizer.folder = tokenizer.folder.without_vocabulary()  # as its files lack the new tokens


def _pattern(token: Added) -> str:
    body = f"({re.escape(token.content)})"
    body = rf"\b{body}\b" if token.single_word else body
    return (r"\s*" if token.lstrip else "") + body + (r"\s*" if token.rstrip else "")


def decode_with_special(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of the ids, with the special tokens that `decode` may leave out."""
    if isinstance(tokenizer, RustTokenizer):
        return tokenizer.engine.decode([int(i) for i in ids], skip_special_tokens=False)
    return tokenizer.decode(ids)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """A summary of a tokenizer for reports, JSON-ready. Tokens are {id, text}."""
    folder, first = tokenizer.folder, tokenizer.encode("a")[:1]
    ends = [*([] if tokenizer.eod_id is None else [tokenizer.eod_id]), *sorted(tokenizer.end_ids)]
    bos = tokenizer.bos_id

    def shown(index: int | None, text: str | None = None) -> dict[str, Any]:
        return {"id": index, "text": text or (None if index is None else tokenizer.token(index))}

    special = {name: (text, tokenizer.encode_batch([text], bare=True)[0]) for name, text in folder.special.items()}
    return {
        "kind": tokenizer.kind,
        "ids": tokenizer.vocab_size,
        "begins": shown(bos) if bos is not None and first == [bos] else None,
        "ends": [shown(index) for index in dict.fromkeys(ends)],
        "special": {name: shown(ids[0] if len(ids) == 1 else None, text) for name, (text, ids) in special.items()},
        "chat_template": folder.template is not None,
        "generation": {name: value for name, value in folder.generation.items() if not name.endswith("_token_id")},
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
    """Learn a byte-level BPE of at most `vocab_size` entries, in which `<|endoftext|>` has id 0.

    Equal texts give equal vocabularies. Raises DataError for fewer than 257 entries.
    """
    if vocab_size < 257:
        raise DataError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    engine.train_from_iterator(texts, trainer)
    return RustTokenizer(engine)
