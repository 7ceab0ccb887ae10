"""A small Qwen2-shaped model with random weights, made here: enough to run the real engine, nothing to download."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CONTEXT_LENGTH = 512
VOCABULARY = 1000
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(
    folder: Path,
    *,
    context_length: int = CONTEXT_LENGTH,
    vocabulary: int = VOCABULARY,
    weights: bool = True,
    further: Sequence[str] = (),
    **shape: int,
) -> Path:
    """Save the model and a byte-level BPE tokenizer to *folder*, unless they are there; return the folder.

    Two layers of width 64, a vocabulary of at most 1,000, float32, a context of 512 tokens; *shape* overrides what
    transformers' Qwen2Config knows of the first two, *further* tokens come to the vocabulary. Without *weights* it is a
    model of any size for vLLM's ``load_format="dummy"``.
    """
    if (folder / "tokenizer_config.json").exists():
        return folder
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(_CHAT_TEMPLATE, *further, vocabulary=vocabulary)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        # A head of 32: vLLM's CPU attention knows no smaller one.
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            **shape,
        },
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        # Larger than usual, so that random logits lie apart and greedy answers depend on the prompt.
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    if weights:
        model = Qwen2ForCausalLM(config).to(torch.float32)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
    else:
        config.architectures = [Qwen2ForCausalLM.__name__]
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(chat_template: str, *further: str, vocabulary: int = VOCABULARY) -> object:
    """Return a byte-level BPE tokenizer with the tokens of a chat and *further* ones."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(vocabulary), eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(further)})
    tokenizer.chat_template = chat_template
    return tokenizer


def _byte_level_bpe(vocabulary: int) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _texts(inspect.__file__, sys.modules["pathlib"].__file__)
    if vocabulary > VOCABULARY:
        # Two modules have no more words than that; the standard library has.
        texts = _texts(*sorted(Path(inspect.__file__).parent.glob("*.py")))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(*files: Path | str) -> Iterator[str]:
    for file in files:
        yield from Path(file).read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    print(make_tiny_model(Path(sys.argv[1])))
