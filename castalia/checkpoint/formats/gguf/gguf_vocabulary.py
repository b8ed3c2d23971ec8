"""A tokenizer as GGUF's metadata, for llama.cpp's own engines: byte-level BPE ("gpt2"), SentencePiece's BPE ("llama").

How text is cut into words before its pairs are merged has a name there, and a rule in the program's code. The name is
found by the tokenizer's rules. Sources: src/llama-vocab.cpp at ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from castalia.data.tokenizer import ByteTokenizer, RustTokenizer, SentencePieceTokenizer, Tokenizer
from castalia.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
UNREACHED = -1e6  # the score of a token that no merging makes
SPECIAL_KEYS = {"bos_token": "bos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding"}  # sic

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"
# The steps of a pre-tokenizer, and whether words that are tokens are taken whole, without merging -> its name.
PRE_TOKENIZERS: dict[tuple[tuple[tuple[str, ...], ...], bool], str] = {
    ((("bytes", "words"),), False): "gpt-2",
    ((("split", GPT2), ("bytes",)), False): "gpt-2",
    ((("digits",), ("bytes", "words")), False): "smollm",
    ((("split", LLAMA3), ("bytes",)), True): "llama-bpe",
    ((("split", LLAMA3), ("bytes",)), False): "dbrx",
    ((("split", QWEN2), ("bytes",)), False): "qwen2",
}


def vocabulary(tokenizer: Tokenizer, rows: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tokenizer's part of the metadata, and notes on what llama.cpp does otherwise. `rows`: of the embedding.

    Raises CheckpointError for a tokenizer that llama.cpp has no equal of, with the reason.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        values, notes = _sentencepiece(tokenizer)
    elif isinstance(tokenizer, RustTokenizer):
        values, notes = _rust(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer) and tokenizer.kind == "bytes":
        values, notes = _bytes(tokenizer)
    else:
        raise _refused(f"it is {tokenizer.kind}, not a BPE with merges")
    tokens, types = values["tokens"], values["token_type"]
    if len(tokens) > rows:
        left = [text for text, kind in zip(tokens[rows:], types[rows:], strict=True) if kind != UNUSED]
        if left:
            notes.append(f"the embedding has {rows} rows; tokens without one are left out: {', '.join(left[:5])}")
    padding = range(len(tokens), rows)
    filled = {"tokens": [f"[PAD{i}]" for i in padding], "token_type": [UNUSED] * len(padding)}
    filled["scores"] = [UNREACHED] * len(padding)
    values |= {key: values[key][:rows] + more for key, more in filled.items() if key in values}
    if len(set(values["tokens"])) < rows:
        raise _refused("two of its ids have one text")
    values |= _special(tokenizer, rows, notes)
    result = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if tokenizer.folder.template is not None:
        result["tokenizer.chat_template"] = tokenizer.folder.template
    return result, tuple(notes)


def _refused(reason: str) -> CheckpointError:
    return CheckpointError(
        f"llama.cpp has nothing like this tokenizer: {reason}. GGUF holds byte-level BPE with the words of "
        f"{', '.join(dict.fromkeys(PRE_TOKENIZERS.values()))}, and SentencePiece's BPE; --to hf keeps it as it is"
    )


def _special(tokenizer: Tokenizer, rows: int, notes: list[str]) -> dict[str, Any]:
    """Ids of special tokens, and which of them llama.cpp puts around a text."""
    if tokenizer.eod_id is None or tokenizer.eod_id >= rows:
        raise _refused("no token ends a text, where llama.cpp would take one that it assumes")
    bare, framed = tokenizer.encode_batch(["a"], bare=True)[0], tokenizer.encode_batch(["a"])[0]
    begin = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
    frames = {
        (tuple(first), tuple(last)): (bool(first), bool(last))
        for first in ([], [begin])
        for last in ([], [tokenizer.eod_id])
    }
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), None)
    frame = None if at is None else (tuple(framed[:at]), tuple(framed[at + len(bare) :]))
    if frame not in frames:
        raise _refused(f"it puts {framed} for a text that is {bare}, more than one token before and one behind")
    values: dict[str, Any] = dict(zip(("add_bos_token", "add_eos_token"), frames[frame], strict=True))
    values |= {"bos_token_id": begin, "eos_token_id": tokenizer.eod_id}
    others = sorted(tokenizer.end_ids - {tokenizer.eod_id})
    values |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    if others[2:]:
        notes.append(f"GGUF has three tokens that end a text; these end none: {', '.join(map(str, others[2:]))}")
    texts = {text: i for i, text in enumerate(_texts(tokenizer, rows))}
    for name, key in SPECIAL_KEYS.items():
        if (text := tokenizer.folder.special.get(name)) in texts:
            values.setdefault(f"{key}_token_id", texts[text])
    return values


def _texts(tokenizer: Tokenizer, rows: int) -> list[str | None]:
    return [tokenizer.token(i) for i in range(min(tokenizer.vocab_size, rows))]


def _bytes(tokenizer: ByteTokenizer) -> tuple[dict[str, Any], list[str]]:
    """Bytes are a byte-level BPE without merges."""
    shown = _byte_texts()
    tokens = [*shown, *(f"<|{i}|>" for i in range(256, tokenizer.vocab_size))]
    types = [NORMAL] * 256 + [CONTROL] * (tokenizer.vocab_size - 256)
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": []}, []


def _byte_texts() -> list[str]:
    """How byte-level vocabularies write each byte: as itself if it is visible, else as a character from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def _rust(tokenizer: RustTokenizer) -> tuple[dict[str, Any], list[str]]:
    content = json.loads(tokenizer.engine.to_str())
    model, notes = content["model"], []
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"its model has {key}={model[key]!r}")
    size, added = tokenizer.vocab_size, content["added_tokens"]
    texts: dict[int, str] = {index: text for text, index in model["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in added}
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    types = [kinds.get(i, NORMAL if i in texts else UNUSED) for i in range(size)]
    if stripped := [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]:
        notes.append(
            f"llama.cpp finds these tokens inside words and leaves spaces beside them: {', '.join(stripped[:5])}"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    values: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        values |= {"model": "llama", "pre": "default"} | _prefix(content, notes)
        values["scores"] = _scores(tokens, merges, set(kinds))
        values["token_type"] = [BYTE if i in tokenizer.byte_ids else kind for i, kind in enumerate(types)]
        if len(tokenizer.byte_ids) < 256:
            raise _refused("it has no tokens for single bytes, of which llama.cpp makes characters that it lacks")
        return values, notes
    _check_normalizer(content["normalizer"], notes)
    if any(" " in text for merge in merges for text in merge):
        raise _refused("it merges texts with spaces")
    pre = _pre_tokenizer(content["pre_tokenizer"], bool(model.get("ignore_merges")))
    return values | {"model": "gpt2", "pre": pre, "merges": [" ".join(merge) for merge in merges]}, notes


def _check_normalizer(normalizer: Mapping[str, Any] | None, notes: list[str]) -> None:
    steps = _steps(normalizer, "normalizers")
    if any(step["type"] != "NFC" for step in steps):
        raise _refused(f"it changes texts before it cuts them ({', '.join(step['type'] for step in steps)})")
    if steps:
        notes.append("the tokenizer brings texts to Unicode's form NFC, llama.cpp takes them as they are")


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be nested sequences."""
    if part is None:
        return []
    return [step for each in part[name] for step in _steps(each, name)] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(part: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    steps = tuple(_step(step) for step in _steps(part, "pretokenizers"))
    if (steps, ignore_merges) not in PRE_TOKENIZERS:
        shown = " then ".join(" ".join(step) for step in steps) or "not at all"
        whole = ", with words that are tokens taken whole" if ignore_merges else ""
        raise _refused(f"it cuts texts in a way that has no name there: {shown}{whole}")
    return PRE_TOKENIZERS[steps, ignore_merges]


def _step(step: Mapping[str, Any]) -> tuple[str, ...]:
    """A step in short. Settings that no row of `PRE_TOKENIZERS` has become words that none has."""
    kind = step["type"]
    if kind == "ByteLevel":
        odd = ("with a space in front",) if step["add_prefix_space"] else ()
        return ("bytes", *(("words",) if step.get("use_regex", True) else ()), *odd)
    if kind == "Digits":
        return ("digits",) if step["individual_digits"] else ("runs of digits",)
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return ("split", *step["pattern"].values())
    return (kind, *(str(value) for key, value in step.items() if key != "type"))


def _prefix(content: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Whether a space is put in front of a text, of a tokenizer.json that was made from a SentencePiece model."""
    normalizers, before = (
        _steps(content["normalizer"], "normalizers"),
        _steps(content["pre_tokenizer"], "pretokenizers"),
    )
    shown = [tuple(step.items()) for step in normalizers]
    spaces = (("type", "Replace"), ("pattern", {"String": " "}), ("content", "▁"))
    prepend = (("type", "Prepend"), ("prepend", "▁"))
    if not before and shown in ([prepend, spaces], [spaces]):
        return {"add_space_prefix": shown[0] == prepend}
    if not normalizers and len(before) == 1 and before[0]["type"] == "Metaspace" and not before[0].get("split", True):
        scheme = before[0].get("prepend_scheme", "always")
        if before[0].get("replacement") == "▁":
            if scheme == "first":
                notes.append("after a special token in a text llama.cpp puts a space, this tokenizer does not")
            return {"add_space_prefix": scheme != "never"}
    kinds = [step["type"] for step in (*normalizers, *before)]
    raise _refused(f"it prepares texts in a way that SentencePiece models do not ({', '.join(kinds)})")


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]], added: set[int]) -> list[float]:
    """Scores with which SentencePiece merges in the order of `merges`: it takes the pair whose token scores highest.

    Raises CheckpointError where it would merge other pairs, since it knows tokens and no pairs.
    """
    ranks: dict[str, int] = {}
    previous = ""
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token != previous and token in ranks:
            raise _refused("its merges are not in the order of tokens, as a SentencePiece model has them")
        ranks.setdefault(token, rank)
        previous = token
    pairs = {(left, right) for left, right in merges}
    known = {token for i, token in enumerate(tokens) if i not in added}
    for token in known:
        for at in range(1, len(token)):
            if token[:at] in known and token[at:] in known and (token[:at], token[at:]) not in pairs:
                raise _refused(f"it does not merge {token[:at]!r} and {token[at:]!r}, as a SentencePiece model would")
    return [float(-ranks[token]) if token in ranks and i not in added else UNREACHED for i, token in enumerate(tokens)]


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], list[str]]:
    engine, notes = tokenizer.engine, []
    size = engine.vocab_size()
    tokens, scores, types = [], [], []
    for i in range(size):
        tokens.append(engine.id_to_piece(i))
        scores.append(engine.get_score(i))
        kinds = {
            UNKNOWN: engine.is_unknown(i),
            CONTROL: engine.is_control(i),
            UNUSED: engine.is_unused(i),
            BYTE: engine.is_byte(i),
        }
        types.append(next((kind for kind, holds in kinds.items() if holds), NORMAL))
    normal = [score for score, kind in zip(scores, types, strict=True) if kind == NORMAL]
    if any(score != int(score) for score in normal):  # of BPE they are ranks, of a unigram model logarithms
        raise _refused("it is a unigram model of SentencePiece, not BPE")
    if len(tokenizer.byte_ids) < 256:
        raise _refused("it has no tokens for single bytes, of which llama.cpp makes characters that it lacks")
    for i in range(size, tokenizer.vocab_size):
        tokens.append(tokenizer.token(i) or f"[PAD{i}]")
        scores.append(UNREACHED)
        types.append(UNUSED if i not in tokenizer.by_id else CONTROL if tokenizer.by_id[i].special else USER_DEFINED)
    pieces = "".join(engine.encode("ﬁ  a", out_type=str))
    if pieces.lstrip("▁") != "ﬁ▁▁a" and "<0x" not in pieces:
        notes.append("the tokenizer changes texts before it cuts them (Unicode's form, spaces), llama.cpp does not")
    prefix = engine.encode("a", out_type=str)[0].startswith("▁")
    if prefix and not tokenizer.folder.settings.get("legacy") and not tokenizer.neox:
        notes.append("after a special token in a text llama.cpp puts a space, this tokenizer does not")
    return {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": prefix,
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
    }, notes
