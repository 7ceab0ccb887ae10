from types import SimpleNamespace
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from airflow_provider_raylm.cluster.texts import Texts
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("model"), weights=False))


@pytest.fixture(scope="module")
def token_by_token(tokenizer):
    """vLLM's own way from an answer's token ids to its text."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    def text(ids: list[int], skip_special_tokens: bool) -> str:
        request = SimpleNamespace(
            request_id="0",
            prompt_token_ids=tokenizer("Once upon").input_ids,
            sampling_params=SamplingParams(skip_special_tokens=skip_special_tokens),
        )
        detokenizer = FastIncrementalDetokenizer(tokenizer, request)
        detokenizer.update(ids, stop_terminated=False)
        return detokenizer.get_next_output_text(finished=True, delta=False)

    return text


# Most tokens of this vocabulary are single bytes, so that most of these answers are broken somewhere.
@settings(max_examples=2_000, deadline=None)
@given(ids=st.lists(st.integers(0, 999), max_size=24), skip_special_tokens=st.booleans())
def test_decodes_at_once_what_vllm_decodes_token_by_token(tokenizer, token_by_token, ids, skip_special_tokens):
    texts = Texts.of(tokenizer)
    assert texts.decodes
    assert texts.decode(ids, skip_special_tokens) == token_by_token(ids, skip_special_tokens)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text()))
def test_decodes_text_of_any_script(tokenizer, texts):
    ids = tokenizer(texts).input_ids if texts else []
    # This tokenizer composes characters before it encodes them.
    wanted = [normalize("NFC", text).rstrip("\N{REPLACEMENT CHARACTER}") for text in texts]
    assert [Texts.of(tokenizer).decode(one, skip_special_tokens=False) for one in ids] == wanted


@settings(max_examples=200, deadline=None)
@given(prompts=st.lists(st.text(), min_size=1), add_special_tokens=st.booleans())
def test_encodes_as_transformers_does(tokenizer, prompts, add_special_tokens):
    wanted = tokenizer(prompts, add_special_tokens=add_special_tokens).input_ids
    assert Texts.of(tokenizer).encode(prompts, add_special_tokens) == wanted


def test_neither_cuts_off_nor_pads_what_the_tokenizers_file_would(tokenizer):
    prompts = ["one", "a prompt that is longer than that"]
    wanted = tokenizer(prompts).input_ids
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=4)
    try:
        assert Texts.of(tokenizer).encode(prompts, add_special_tokens=True) == wanted
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_leaves_other_tokenizers_to_vllm(tokenizer):
    from tokenizers import Tokenizer, decoders, models

    sentence_piece = Tokenizer(models.BPE())
    sentence_piece.decoder = decoders.Metaspace()
    assert not Texts(sentence_piece).decodes
    assert Texts.of(SimpleNamespace(encode=None)) is None
