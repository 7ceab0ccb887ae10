import sys
from types import SimpleNamespace
from unicodedata import normalize

import fastokens
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from airflow_provider_raylm.cluster.texts import Texts
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("model"), weights=False))


@pytest.fixture(scope="module")
def texts(tokenizer):
    return Texts.of(tokenizer)


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
def test_decodes_at_once_what_vllm_decodes_token_by_token(texts, token_by_token, ids, skip_special_tokens):
    assert texts.decodes
    assert texts.decode(ids, skip_special_tokens) == token_by_token(ids, skip_special_tokens)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_decodes_text_of_any_script(tokenizer, texts, text):
    # This tokenizer composes characters before it encodes them.
    wanted = normalize("NFC", text).rstrip("\N{REPLACEMENT CHARACTER}")
    assert texts.decode(tokenizer(text).input_ids, skip_special_tokens=False) == wanted


@settings(max_examples=2_000, deadline=None)
@given(prompts=st.lists(st.text(), min_size=1), add_special_tokens=st.booleans())
def test_encodes_as_transformers_does(tokenizer, texts, prompts, add_special_tokens):
    wanted = tokenizer(prompts, add_special_tokens=add_special_tokens).input_ids
    assert texts.encode(prompts, add_special_tokens) == wanted


@pytest.mark.parametrize("module", ["fastokens", None])
def test_encodes_without_fastokens_if_that_differs_or_is_not_there(tokenizer, monkeypatch, capsys, module):
    """From the first block on."""
    other = SimpleNamespace(encode_batch=lambda prompts, **_: [SimpleNamespace(ids=[0]) for _ in prompts])
    fastokens = SimpleNamespace(Tokenizer=SimpleNamespace(from_json_str=lambda _: other))
    monkeypatch.setitem(sys.modules, "fastokens", fastokens if module else None)
    without, prompts = Texts.of(tokenizer), ["one", "another"]

    for _ in range(2):
        assert without.encode(prompts, add_special_tokens=True) == tokenizer(prompts).input_ids
    assert capsys.readouterr().out.count("fastokens does not encode as tokenizers does") == bool(module)


def test_vllm_may_encode_with_fastokens_too(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    fastokens.patch_transformers()
    try:
        patched = AutoTokenizer.from_pretrained(tmp_path)
    finally:
        fastokens.unpatch_transformers()
    assert not isinstance(patched.backend_tokenizer, Tokenizer)
    assert Texts.of(patched).encode(["one"], add_special_tokens=True) == tokenizer(["one"]).input_ids


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
    from tokenizers import decoders, models

    sentence_piece = Tokenizer(models.BPE())
    sentence_piece.decoder = decoders.Metaspace()
    assert not Texts(sentence_piece).decodes
    assert Texts.of(SimpleNamespace(encode=None)) is None
