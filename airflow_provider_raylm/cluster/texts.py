"""Between text and token ids, many or all at a time, where vLLM goes prompt by prompt and token by token.

Both ways end at the ids and the text that vLLM itself would give. Where the library ``fastokens`` is installed, it
encodes: 10 instead of 250 microseconds for a prompt of 400 tokens.
"""

from __future__ import annotations

from typing import Any, Self

from tokenizers import Tokenizer, decoders

# What stands for bytes that are no character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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
        self.decodes = isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    @classmethod
    def of(cls, tokenizer: Any) -> Self | None:
        """Wrap what a tokenizer of transformers is made of; return None if that is another library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # By method: where vLLM is told to encode with fastokens (VLLM_USE_FASTOKENS), this is a class of that library.
        return cls(backend) if hasattr(backend, "to_str") else None

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
        while (text := self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)).endswith(_REPLACEMENT):
            ids = ids[:-1]
        return text


def _fast(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as fastokens has it, or None: not installed, or not of a kind that it knows."""
    try:
        from fastokens import Tokenizer as FastTokenizer

        return FastTokenizer.from_json_str(tokenizer.to_str())
    except (ImportError, ValueError):
        return None


def _ids(encodings: list[Any]) -> list[list[int]]:
    return [encoding.ids for encoding in encodings]
