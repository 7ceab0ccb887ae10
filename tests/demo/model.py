"""A small language model for the demo, trained from scratch on a CPU in about a minute.

Run as ``python -m tests.demo.model OUT_DIR``. The folder then holds a Qwen2 model with its tokenizer, as
vLLM and transformers load them. The model answers the three prompts below, for reviews and docstrings.
"""

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from tests.demo import data

# The prompts, letter for letter as the model is trained on them; `render` fills in the placeholders.
LABEL_PROMPT = "Is this review positive or negative?\n${text}\nAnswer:"
KEYWORDS_PROMPT = "Product and aspect of this review:\n${text}\nAnswer:"
REPLY_MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Answer this ${label} review: ${text}"},
)

# The reply follows the label in its prompt, so that it tells which label reached the row.
REPLIES = {
    "positive": "Thank you! We are glad you like the ${product}.",
    "negative": "We are sorry about the ${product}.",
}
# The answers for a text that is no review, such as a docstring.
NO_LABEL = "neither"
NO_KEYWORDS = "none"
NO_REPLY = "Thank you."

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONTEXT_LENGTH = 1024
MAX_ANSWER_TOKENS = 24
VOCABULARY_SIZE = 1536
SEED = 20
# One thread: the steps are tiny, and two threads that wait for each other on a busy machine are far slower.
THREADS = 1
TRAINING_REVIEWS = 9500
TRAINING_DOCSTRINGS = 600
BATCH_TOKENS = 1024
PEAK_LEARNING_RATE = 2e-3
WARM_UP_SHARE = 0.1
INITIALIZER_RANGE = 0.06
TIME_BUDGET_S = 58.0
PROGRESS_INTERVAL_S = 5.0
EVALUATION_BATCH = 50
FINGERPRINT_FILE = "trained_by.json"


class Task(NamedTuple):
    """A prompt as the engine gets it (a chat is rendered already) and the right answer."""

    prompt: str
    answer: str


class _Example(NamedTuple):
    tokens: list[int]
    answer_start: int


def render(template: str, **values: str) -> str:
    """Replace each `${name}` by its value, in one pass: a placeholder within a value stays as it is."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], template)


def is_trained(directory: Path) -> bool:
    """Tell whether `directory` holds a finished model of this very code."""
    path = directory / FINGERPRINT_FILE
    return path.is_file() and json.loads(path.read_text()) == _fingerprint()


def train(directory: Path) -> None:
    """Train the model into `directory`, unless it is there already."""
    if is_trained(directory):
        print(f"{directory} is up to date")
        return
    started = time.monotonic()
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    rng = random.Random(SEED)
    reviews = list(data.reviews(TRAINING_REVIEWS, data.TRAINING_SEED))
    docstrings = list(islice(data.standard_library_docstrings(), TRAINING_DOCSTRINGS))
    tasks: list[Task] = []
    for number, review in enumerate(reviews):
        label, keywords, reply = review_tasks(review, rng.choice(sorted(REPLIES)))
        # The reply is learned from far fewer examples than the others, so most reviews go without it.
        tasks += [label, keywords, reply] if number % 3 == 0 else [label, keywords]
    tasks += [rng.choice(docstring_tasks(docstring)) for docstring in docstrings]
    tokenizer = _train_tokenizer(tasks)
    model = _untrained_model(tokenizer)
    _fit(model, _batches(_encode(tokenizer, tasks), rng), time.monotonic() + TIME_BUDGET_S)

    directory.mkdir(parents=True, exist_ok=True)
    (directory / FINGERPRINT_FILE).unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    # Last, so that a folder without it is one whose training or saving did not finish.
    (directory / FINGERPRINT_FILE).write_text(json.dumps(_fingerprint()))
    print(f"trained {directory} in {time.monotonic() - started:.0f} s")


def evaluate(directory: Path, review_count: int = 300, docstring_count: int = 100) -> dict[str, float]:
    """Return the share of exact answers per task, by greedy decoding of texts held out from training."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = Qwen2ForCausalLM.from_pretrained(directory)
    reviews = list(data.reviews(review_count, data.HELD_OUT_SEED))
    last_docstring = TRAINING_DOCSTRINGS + docstring_count
    docstrings = islice(data.standard_library_docstrings(), TRAINING_DOCSTRINGS, last_docstring)
    by_kind = {
        "review": [review_tasks(review, review.label) for review in reviews],
        "docstring": [docstring_tasks(docstring) for docstring in docstrings],
    }
    return {
        f"{kind}_{name}": _accuracy(model, tokenizer, tasks)
        for kind, rows in by_kind.items()
        for name, tasks in zip(("label", "keywords", "reply"), zip(*rows, strict=True), strict=True)
    }


def review_tasks(review: data.Review, reply_label: str) -> tuple[Task, Task, Task]:
    """Return the label, keywords and reply task of a review; the reply is to be one for `reply_label`."""
    return (
        Task(render(LABEL_PROMPT, text=review.text), review.label),
        Task(render(KEYWORDS_PROMPT, text=review.text), f"{review.product}, {review.aspect}"),
        Task(_reply_prompt(review.text, reply_label), render(REPLIES[reply_label], product=review.product)),
    )


def docstring_tasks(docstring: data.Docstring) -> tuple[Task, Task, Task]:
    """Return the label, keywords and reply task of a docstring."""
    return (
        Task(render(LABEL_PROMPT, text=docstring.text), NO_LABEL),
        Task(render(KEYWORDS_PROMPT, text=docstring.text), NO_KEYWORDS),
        Task(_reply_prompt(docstring.text, NO_LABEL), NO_REPLY),
    )


def _reply_prompt(text: str, label: str) -> str:
    turns = "".join(
        f"<|im_start|>{message['role']}\n{render(message['content'], text=text, label=label)}{END_OF_TURN}\n"
        for message in REPLY_MESSAGES
    )
    return f"{turns}<|im_start|>assistant\n"


def _train_tokenizer(tasks: Iterable[Task]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Whoever loads a Qwen2 model by `AutoTokenizer`, as vLLM does, gets the way in which Qwen2 splits a text,
    # whatever the saved file says. A tokenizer trained on another split would then give other tokens.
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer = qwen2.normalizer
    tokenizer.pre_tokenizer = qwen2.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PADDING, "<|im_start|>", END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for task in tasks for part in task), trainer)
    # No beginning-of-text token and no post-processor: the engine's `add_special_tokens` must add nothing.
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _untrained_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    # The end of a turn stops the engine by way of this file, in chats and completions alike.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _encode(tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Task]) -> list[_Example]:
    prompts = tokenizer([task.prompt for task in tasks])["input_ids"]
    answers = tokenizer([task.answer + END_OF_TURN for task in tasks])["input_ids"]
    return [
        _Example(prompt + answer, len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(prompt) + len(answer) <= CONTEXT_LENGTH
    ]


def _batches(examples: Iterable[_Example], rng: random.Random) -> list[list[_Example]]:
    """Group examples of similar length, so that little of a batch is padding, in random order."""
    batches: list[list[_Example]] = [[]]
    for example in sorted(examples, key=lambda example: (len(example.tokens), rng.random())):
        if (len(batches[-1]) + 1) * len(example.tokens) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def _fit(model: Qwen2ForCausalLM, batches: Sequence[Sequence[_Example]], deadline: float) -> None:
    """Train for one pass over the batches, or less of it with a shorter schedule if the time runs out."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    mean_size = sum(map(len, batches)) / len(batches)
    started = reported = time.monotonic()
    model.train()
    for step, batch in enumerate(batches):
        now = time.monotonic()
        # The clock counts only from half time on: a machine that is fast enough gets the same model always.
        progress = max(step / len(batches), 2 * (now - started) / (deadline - started) - 1)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _one_cycle(progress)
        # A constant divisor: an answer counts the same in a batch of few long texts and of many short ones.
        loss = _answer_loss(model, batch) / mean_size
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if now - reported >= PROGRESS_INTERVAL_S:
            reported = now
            print(f"step {step}/{len(batches)}, loss {loss.item():.3f}, {now - started:.0f} s", flush=True)


def _one_cycle(progress: float) -> float:
    if progress < WARM_UP_SHARE:
        return (progress + 0.001) / WARM_UP_SHARE
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE))


def _answer_loss(model: Qwen2ForCausalLM, batch: Sequence[_Example]) -> torch.Tensor:
    length = max(len(example.tokens) for example in batch)
    tokens = torch.full((len(batch), length), int(model.config.pad_token_id or 0))
    is_answer = torch.zeros((len(batch), length), dtype=torch.bool)
    for row, example in enumerate(batch):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        is_answer[row, example.answer_start : len(example.tokens)] = True
    # The padding comes last, where causal attention never looks, so no mask is needed. The output layer
    # runs on the answers alone: on all positions it would cost as much as the rest of the model.
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][is_answer[:, 1:]])
    losses = cross_entropy(logits, tokens[is_answer], reduction="none")
    # Each answer weighs the same, or the one word of a label would be lost beside the long replies.
    lengths = is_answer.sum(dim=1)
    return (losses / lengths.repeat_interleave(lengths)).sum()


@torch.inference_mode()
def _accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> float:
    longest = CONTEXT_LENGTH - MAX_ANSWER_TOKENS
    fitting = [task for task in tasks if len(tokenizer(task.prompt)["input_ids"]) <= longest]
    right = 0
    for start in range(0, len(fitting), EVALUATION_BATCH):
        batch = fitting[start : start + EVALUATION_BATCH]
        inputs = tokenizer([task.prompt for task in batch], return_tensors="pt", padding=True)
        output = model.generate(  # type: ignore[misc]  # its annotation of `self` fits no model class
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
        )
        # With the special tokens kept: an answer is right only if the model also ends it.
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        right += sum(
            answer.replace(PADDING, "") == task.answer + END_OF_TURN
            for answer, task in zip(answers, batch, strict=True)
        )
    return right / len(fitting)


def _fingerprint() -> dict[str, str]:
    sources = {"model": Path(__file__), "data": Path(data.__file__)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()}


def main() -> None:
    """Train the model into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, metavar="OUT_DIR")
    parser.add_argument("--evaluate", action="store_true", help="then report the accuracy on held-out texts")
    options = parser.parse_args()
    train(options.directory)
    if options.evaluate:
        for name, share in evaluate(options.directory).items():
            print(f"{name}: {share:.1%}")


if __name__ == "__main__":
    main()
