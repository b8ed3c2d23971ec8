"""A single token as clients get it: a text, and the bytes that it stands for, which need not be whole characters."""

from __future__ import annotations

from functools import lru_cache

from castalia.data.tokenizer import ByteTokenizer, RustTokenizer, SentencePieceTokenizer, Tokenizer
from castalia.generate.text_stream import BROKEN


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    """The byte for each letter in which byte-level vocabularies write it, by the rule of GPT-2's `bytes_to_unicode`."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token within a text; of a special one, those of its name."""
    if token in tokenizer.special_texts:
        return tokenizer.special_texts[token].encode()
    written = tokenizer.token(token)
    if isinstance(tokenizer, ByteTokenizer) and tokenizer.kind == "bytes":
        return bytes([token]) if token < 256 else b""
    if token in tokenizer.byte_ids and written is not None:  # <0xE2>
        return bytes([int(written[3:5], 16)])
    letters = _bytes_of_letters()
    if isinstance(tokenizer, RustTokenizer) and tokenizer.kind.startswith("byte-level") and written is not None:
        if all(letter in letters for letter in written):
            return bytes(letters[letter] for letter in written)
        return written.encode()  # an added token, which is written as it is
    if written is not None and (isinstance(tokenizer, SentencePieceTokenizer) or "▁" in written):
        return written.replace("▁", " ").encode()
    return tokenizer.decode([token]).encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token by itself, or, as OpenAI writes it, `bytes:\\xe2\\x98` of a part of a character."""
    content = token_bytes(tokenizer, token)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
    return text if BROKEN not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def distinct_texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The texts of tokens as the keys of one object: those that several of them have become `token_id:17`."""
    texts = [token_text(tokenizer, token) for token in tokens]
    return [text if texts.count(text) == 1 else f"token_id:{token}" for token, text in zip(tokens, texts, strict=True)]
