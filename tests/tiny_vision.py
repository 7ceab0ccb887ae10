"""A small Idefics3-shaped model with random weights, made here: one that is asked about images."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path

from tests.tiny_model import CONTEXT_LENGTH, make_tokenizer

# Pixels of a tile's side and of a patch, and patches of a side of which one token is made: a tile has four tokens. An
# image is its four tiles, and itself in the size of one; vLLM takes none that is not divided.
SIDE, PATCH, SCALE = 32, 8, 2
_TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_TILES]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_vision_model(folder: Path) -> Path:
    """Save a model, its tokenizer and its image processor; return the folder."""
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    tokenizer = make_tokenizer(_CHAT_TEMPLATE, *_TOKENS)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=SCALE,
        vision_config={**shape, "image_size": SIDE, "patch_size": PATCH},
        text_config={
            **shape,
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 1,
            "max_position_embeddings": CONTEXT_LENGTH,
            # Larger than usual, so that answers tell prompts apart.
            "initializer_range": 0.3,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    Idefics3ForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer=tokenizer,
        image_seq_len=(SIDE // PATCH // SCALE) ** 2,
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_image(seed: int) -> bytes:
    """Return a picture of nothing, about as large as the model sees it, as PNG."""
    from PIL import Image

    chance = random.Random(seed)
    width, height = chance.randint(30, 70), chance.randint(30, 70)
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), chance.randbytes(3 * width * height)).save(file, "PNG")
    return file.getvalue()


def inline(image: bytes) -> str:
    """Return a picture as a ``data:`` address."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
