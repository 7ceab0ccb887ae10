import asyncio
import sys
import threading
import time
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize

import fastokens
import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, ByT5Tokenizer, MistralCommonBackend
from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool

from airflow_provider_raylm.cluster.replica.texts import LONG, Texts
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


@pytest.fixture(scope="module")
def lone(tokenizer):
    """Tokens of one byte that is no character."""
    return [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "\N{REPLACEMENT CHARACTER}"]


# Parts: broken bytes, control tokens, the replacement character itself, and characters cut anywhere; long, broken ends.
@settings(max_examples=1_000, deadline=None)
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_decodes_broken_ends_as_vllm_does(tokenizer, lone, texts, token_by_token, data, skip_special_tokens):
    whole = st.sampled_from(["\N{REPLACEMENT CHARACTER}", "東", "🙂", "é", "a"]).map(lambda c: tokenizer(c).input_ids)
    part = st.one_of(
        st.lists(st.sampled_from(lone), max_size=40),
        st.lists(st.sampled_from(tokenizer.all_special_ids), max_size=3),
        whole,
        whole.map(lambda ids: ids[:-1]),
    )
    ids = [token for ids in data.draw(st.lists(part, max_size=8)) for token in ids]
    assert texts.decode(ids, skip_special_tokens) == token_by_token(ids, skip_special_tokens)


@pytest.mark.parametrize("start", ["", "Once é"])
def test_decodes_an_answer_of_broken_tokens_in_no_time(tokenizer, lone, texts, start):
    """Token after token, dropped one at a time, it took over a minute."""
    known = tokenizer(start).input_ids
    ids = (known + lone * 30_000)[: len(known) + 30_000]
    before = time.perf_counter()
    decoded = texts.decode(ids, skip_special_tokens=True)
    assert time.perf_counter() - before < 1
    ended = [count for count in range(len(known) + 200) if not _broken(tokenizer, ids[:count])]
    assert decoded == tokenizer.decode(ids[: ended[-1]])


def _broken(tokenizer, ids):
    return tokenizer.decode(ids).endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(("tokens", "elsewhere"), [(LONG, False), (LONG + 1, True)])
def test_a_thread_decodes_long_answers(tokenizer, texts, monkeypatch, tokens, elsewhere):
    """And only those: the way there costs more than a short answer."""
    threads = []
    decode = texts.decode
    monkeypatch.setattr(texts, "decode", lambda *args: (threads.append(threading.get_ident()), decode(*args))[1])
    text = asyncio.run(texts.decoded(tokenizer("a").input_ids * tokens, skip_special_tokens=True))
    assert text == "a" * tokens
    assert (threads != [threading.get_ident()]) is elsewhere


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


def test_decodes_only_what_does_not_look_at_neighbours():
    sentence_piece = Tokenizer(models.BPE())
    sentence_piece.decoder = decoders.Metaspace()
    assert not Texts(sentence_piece).decodes


def unwritable(tokenizer):
    def to_str():
        raise Exception("Custom PreTokenizer cannot be serialized")

    return SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=to_str))


def of_mistral(tokenizer):
    from vllm.tokenizers.mistral import MistralTokenizer

    folder = Path(mistral_common.__file__).parent / "data"
    return MistralTokenizer(MistralCommonBackend(folder / "tekken_240911.json"))


def with_a_way_of_its_own(tokenizer):
    class Lowering(type(tokenizer)):
        def __call__(self, text, **kwargs):
            return super().__call__([one.lower() for one in text], **kwargs)

    own = copy(tokenizer)
    own.__class__ = Lowering
    return own


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: None, ""),
        (lambda _: ByT5Tokenizer(), "ByT5Tokenizer cannot be taken apart"),
        (of_mistral, "MistralTokenizer cannot be taken apart"),
        (unwritable, "Custom PreTokenizer cannot be serialized"),
        (with_a_way_of_its_own, "Lowering cannot be taken apart, so vLLM encodes and decodes: it encodes other than"),
    ],
)
def test_leaves_other_tokenizers_to_vllm(tokenizer, capsys, make, said):
    """Whatever is odd about one, the engine starts; the replica's log says why."""
    assert Texts.of(make(tokenizer)) is None
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("make", [get_cached_tokenizer, maybe_make_thread_pool])
def test_takes_vllms_own_classes_apart(tokenizer, make):
    assert Texts.of(make(copy(tokenizer))).decodes
