"""What the rows of a block share as vLLM has it: its own request and sampling parameters, of an engine that is none."""

from contextlib import suppress
from types import SimpleNamespace

import pytest

from airflow_provider_raylm.cluster.replica.questions.generation import Chat, Completion
from airflow_provider_raylm.specs import Step
from airflow_provider_raylm.specs.extra_body import check_extra_body


def engine(**serving):
    """An engine with room for 100 tokens, as far as a question looks at one before it is asked."""
    models = SimpleNamespace(is_base_model=lambda name: name == "m")
    told = {"models": models, "override_max_tokens": None, "default_sampling_params": {}, "parser_cls": None}
    part = SimpleNamespace(**told | serving)
    return SimpleNamespace(serving=lambda name, question: part, adapters={}, context=100, texts=None)


# What of vLLM's requests takes effect in both ways to ask, and of a chat alone.
HEEDED = {
    *("add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "ec_transfer_params", "kv_transfer_params"),
    *("include_stop_str_in_output", "logit_bias", "min_tokens", "priority", "repetition_detection", "response_format"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "structured_outputs"),
    *("thinking_token_budget", "vllm_xargs"),
}
OF_CHATS = {
    *("add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents"),
    *("include_reasoning", "media_io_kwargs", "mm_processor_kwargs", "parallel_tool_calls", "reasoning_effort"),
    "tool_choice",
}


@pytest.mark.parametrize(
    ("kind", "asks", "heeded"), [(Completion, "prompt", HEEDED), (Chat, "messages", HEEDED | OF_CHATS)]
)
def test_each_field_of_vllm_is_heeded_or_refused(kind, asks, heeded):
    """One that a new vLLM brings has to be looked at: it would be taken, and perhaps make no difference."""
    free = set()
    for name in set(kind._type.model_fields) - {asks}:
        with suppress(ValueError):
            check_extra_body({name: "x"}, [asks], Step._not_in_extra_body, [])
            free.add(name)

    assert free == heeded


@pytest.mark.parametrize("kind", [Completion, Chat])
def test_each_row_may_tell_its_own_max_tokens(kind):
    """Then what all rows share has none, and vLLM's chats have no number of their own."""
    shared = kind(engine(), {"model": "m"}, [])

    assert shared._with('{"max_tokens": 7}')._sampling.max_tokens == 7


def test_the_model_bounds_what_no_row_does():
    """As far as its generation_config does; else there is no more than its context."""
    assert Chat(engine(), {"model": "m"}, [])._sampling.max_tokens == 100
    assert Chat(engine(override_max_tokens=5), {"model": "m"}, [])._sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("kind", "told"), [(Completion, {"logprobs": None}), (Chat, {"logprobs": "false"}), (Chat, {"logprobs": True})]
)
def test_log_probabilities_that_nobody_asks_for_cannot_be_kept(kind, told):
    """In whichever of vLLM's ways that is said; else each row would end in an error of Python's."""
    with pytest.raises(ValueError, match="keep='logprobs': .* asks for none"):
        kind(
            engine(),
            {"model": "m", "top_logprobs": None, **told} if kind is Chat else {"model": "m", **told},
            ["logprobs"],
        )


def test_vllm_names_the_tokens_of_log_probabilities():
    """Also of those that the author names by their ids; any other answer becomes text in one go."""
    texts = SimpleNamespace(decodes=True, decoded=print)

    def detokenizes(told):
        asked = Completion(SimpleNamespace(**vars(engine()) | {"texts": texts}), {"model": "m", **told}, [])
        return asked._sampling.detokenize

    assert [detokenizes(one) for one in ({}, {"logprobs": 0}, {"logprobs": 1, "logprob_token_ids": [5]})] == [
        False,
        True,
        True,
    ]
