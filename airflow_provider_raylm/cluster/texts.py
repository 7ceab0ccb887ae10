"""Between text and token ids, many or all at a time, where vLLM goes prompt by prompt and token by token.

Both ways end at the ids and the text that vLLM itself would give.
"""

from __future__ import annotations

from typing import Any, Self

from tokenizers import Tokenizer, decoders

# What stands for bytes that are no character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Texts:
    """A tokenizer of the library ``tokenizers``, safe to use from several threads.

    Attributes:
        decodes: whether a whole answer may be decoded at once. A ByteLevel decoder puts bytes one after the other, so
            that it gives the same text in one step as in many; others look at a token's neighbours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A copy: what cuts off or pads is a state of the tokenizer, and vLLM uses its own meanwhile.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.decodes = isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    @classmethod
    def of(cls, tokenizer: Any) -> Self | None:
        """Wrap what a tokenizer of transformers is made of; return None if that is another library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return cls(backend) if isinstance(backend, Tokenizer) else None

    def encode(self, prompts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each prompt."""
        encodings = self._tokenizer.encode_batch_fast(prompts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return an answer's text, up to the last token that ends a character.

        vLLM holds back what does not end one yet, and so never gives it out.
        """
        while (text := self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)).endswith(_REPLACEMENT):
            ids = ids[:-1]
        return text
