"""Small BERT-shaped models and LoRA adapters with random weights, made here: what else an engine may be loaded with."""

from __future__ import annotations

import json
from pathlib import Path

LABEL = "relevant"
LENGTH = 128


def make_encoder(folder: Path, labels: int | None) -> Path:
    """Save a model and its tokenizer; return the folder.

    Args:
        folder: where.
        labels: None for one that embeds, 1 for a reranker.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words(), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    torch.manual_seed(labels or 0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        # Larger than usual, so that answers tell texts apart.
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        **({"num_labels": labels} if labels else {}),
    )
    if labels:
        config.id2label, config.label2id = {0: LABEL}, {LABEL: 0}
    model = BertModel(config) if labels is None else BertForSequenceClassification(config)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _words() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer


def make_adapter(folder: Path, model: Path, seed: int, rank: int = 4) -> Path:
    """Save a LoRA adapter for the tiny model's attention, as PEFT does; return the folder."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    heads = config["hidden_size"] // config["num_attention_heads"]
    sizes = {
        "q_proj": config["hidden_size"],
        "k_proj": heads * config["num_key_value_heads"],
        "v_proj": heads * config["num_key_value_heads"],
    }
    chance = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(rank, config["hidden_size"], generator=chance)
            weights[f"{at}.lora_B.weight"] = torch.randn(size, rank, generator=chance)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder
