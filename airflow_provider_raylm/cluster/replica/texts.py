"""Between text and token ids, many or all at a time, where vLLM goes prompt by prompt and token by token.

Both ways end at the ids and the text that vLLM itself would give. Where the library ``fastokens`` is installed, it
encodes: 10 instead of 250 microseconds for a prompt of 400 tokens.
"""

from __future__ import annotations

import asyncio
from typing import Any, Self

from tokenizers import Tokenizer, decoders

# What stands for bytes that are no character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens of an answer that a thread decodes: so many take 0.2 ms (1.5 ms where all are broken), and the way to a thread
# and back 0.1 ms, ten times what an answer of 64 tokens takes.
LONG = 1_000
# Told apart by classes that treat spaces, cases, control tokens or an empty prompt by themselves.
_PROBES = ["", "One", "  Two\tspaces,\n\nÉ e\u0301 \N{IDEOGRAPHIC SPACE}東京 🙂 1234567 ", "<s>[INST]<|end|></s>"]


def _byte_table() -> dict[str, int]:
    """Return the byte that each character of a ByteLevel vocabulary stands for.

    As GPT-2 has it: bytes that print stand for themselves, the others in their order are the characters from 256 on.
    """
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - printing)
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_table()


class Texts:
    """A tokenizer that the library ``tokenizers`` can hold, safe to use from several threads.

    Args:
        tokenizer: writes itself as that library's file (``to_str``), as the library's own class does.

    Attributes:
        decodes: whether a whole answer may be decoded at once. A ByteLevel decoder puts bytes one after the other, so
            that it gives the same text in one step as in many; others look at a token's neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        # A copy: what cuts off or pads is a state of the tokenizer, and vLLM uses its own meanwhile.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._fast = _fast(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self.decodes = isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    @classmethod
    def of(cls, tokenizer: Any | None) -> Self | None:
        """Wrap what a tokenizer of transformers is made of; return None where vLLM had better do all itself.

        That is for an engine without a tokenizer, and for one of another library (mistral's, tiktoken), in Python, that
        cannot be written down, or whose class adds something to what it is made of.
        """
        if tokenizer is None:
            return None
        try:
            # Of the library's own class, or of fastokens' where vLLM is told to encode with that (VLLM_USE_FASTOKENS).
            texts = cls(tokenizer.backend_tokenizer)
            for special in (True, False):
                if texts._encode(_PROBES, special) != tokenizer(_PROBES, add_special_tokens=special).input_ids:
                    raise ValueError("it encodes other than what it is made of")
        except Exception as error:
            # Whatever it is, only speed is lost.
            name = type(tokenizer).__name__
            print(f"raylm: {name} cannot be taken apart, so vLLM encodes and decodes: {error}", flush=True)
            return None
        return texts

    def encode(self, prompts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each prompt."""
        if (fast := self._fast) is not None:
            ids = _ids(fast.encode_batch(prompts, add_special_tokens=add_special_tokens))
            # One of a block both ways: a tokenizer's file that the two libraries read differently shows in any prompt.
            if ids[:1] == self._encode(prompts[:1], add_special_tokens):
                return ids
            print("raylm: fastokens does not encode as tokenizers does: encoding without it", flush=True)
            self._fast = None
        return self._encode(prompts, add_special_tokens)

    def _encode(self, prompts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return _ids(self._tokenizer.encode_batch_fast(prompts, add_special_tokens=add_special_tokens))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return an answer's text, up to the last token that ends a character.

        vLLM holds back what does not end one yet, and so never gives it out.
        """
        text = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if not text.endswith(_REPLACEMENT):
            return text
        whole = ids[: self._whole(ids, skip_special_tokens)]
        return self._tokenizer.decode(whole, skip_special_tokens=skip_special_tokens)

    async def decoded(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return what ``decode`` does, without keeping an event loop from others: of a long answer by a thread."""
        if len(ids) <= LONG:
            return self.decode(ids, skip_special_tokens)
        return await asyncio.to_thread(self.decode, ids, skip_special_tokens)

    def _whole(self, ids: list[int], skip_special_tokens: bool) -> int:
        """Return after how many tokens a character last ended."""
        written = bytearray()
        ends = []
        for token_id in ids:
            token = self._tokenizer.id_to_token(token_id)
            if token is not None and not (skip_special_tokens and token in self._special):
                written += _token_bytes(token)
            ends.append(len(written))
        return next((count for count in range(len(ids), 0, -1) if _ends_character(written, ends[count - 1])), 0)


def _token_bytes(token: str) -> bytes:
    """Return what a ByteLevel decoder puts for a token: as the table says, or as it is where that lacks a character."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def _ends_character(written: bytearray, end: int) -> bool:
    """Say whether a character ends there, other than the one that stands for broken bytes.

    A byte that begins a character never continues one, so the last such byte, four back at most, tells.
    """
    for start in range(end - 1, max(end - 5, -1), -1):
        if written[start] & 0b1100_0000 != 0b1000_0000:
            try:
                return written[start:end].decode() != _REPLACEMENT
            except UnicodeDecodeError:
                return False
    return False


def _fast(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as fastokens has it, or None: not installed, or not of a kind that it knows."""
    try:
        from fastokens import Tokenizer as FastTokenizer

        return FastTokenizer.from_json_str(tokenizer.to_str())
    except (ImportError, ValueError):
        return None


def _ids(encodings: list[Any]) -> list[list[int]]:
    return [encoding.ids for encoding in encodings]
