"""Specs refuse what cannot work, by name, and mean the same on both sides."""

import pytest

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs import (
    BatchReport,
    BatchSpec,
    EngineSpec,
    EngineUsage,
    Step,
    build,
    check_unrendered,
)
from airflow_provider_raylm.specs.per_row import PerRow
from tests.offline import own_of

BATCH = {"source": "in/*.parquet", "prompt": "Say ${text}", "output": "out"}


def templated(value):
    return isinstance(value, str) and "{{" in value


@pytest.mark.parametrize(
    ("spec", "value", "named"),
    [
        (EngineSpec, {"name": "e", "model": "m", "modell": "x"}, "EngineSpec.modell: unknown field"),
        (EngineSpec, {"name": "e e", "model": "m"}, "EngineSpec.name"),
        (EngineSpec, {"name": "e"}, "EngineSpec.model"),
        (EngineSpec, {"name": "e", "model": "m", "gpus_per_worker": -1}, "EngineSpec.gpus_per_worker"),
        (EngineSpec, {"name": "e", "model": "m", "replicas": 0}, "replicas: at least 1"),
        (EngineSpec, {"name": "e", "model": "m", "replicas": (3, 2)}, "replicas: (min, max)"),
        (EngineSpec, {"name": "e", "model": "m", "gpus_per_worker": 0, "accelerator_type": "H100"}, "accelerator_type"),
        (EngineSpec, {"name": "e", "model": "m", "env": {"A": "b"}, "secret_env": {"A": "/b"}}, "secret_env.A"),
        (EngineSpec, {"name": "e", "model": "m", "engine_kwargs": {"model": "n"}}, "set EngineSpec.model instead"),
        (EngineSpec, {"name": "e", "model": "m", "lease": {"idle": 3}}, "EngineSpec.lease.idle: unknown field"),
        (BatchSpec, {**BATCH, "max_tokens": 0}, "BatchSpec.max_tokens"),
        (BatchSpec, {**BATCH, "stop": ("END", "")}, "BatchSpec.stop.1: an empty string ends no answer"),
        (BatchSpec, {**BATCH, "temperature": -1}, "BatchSpec.temperature"),
        (BatchSpec, {**BATCH, "messages": [{"role": "user", "content": "x"}]}, "exactly one of prompt, messages"),
        (BatchSpec, {"source": "a", "output": "b"}, "exactly one of prompt, messages"),
        (BatchSpec, {**BATCH, "source_format": "xml"}, "BatchSpec.source_format"),
        (BatchSpec, {**BATCH, "output_format": "csv"}, "BatchSpec.output_format"),
        (BatchSpec, {**BATCH, "source": []}, "source: at least one"),
        (BatchSpec, {**BATCH, "preprocess": "no_colon"}, "preprocess: expected package.module:function"),
        (BatchSpec, {**BATCH, "output_column": "raylm_x"}, "reserved"),
        (BatchSpec, {**BATCH, "extra_body": {"n": 2}}, "extra_body.n: it is a field of its own"),
        (BatchSpec, {**BATCH, "extra_body": {"stream": True}}, "extra_body.stream: not accepted here"),
        (BatchSpec, {**BATCH, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens: 0 leaves nothing"),
        (BatchSpec, {**BATCH, "truncation_side": "left"}, "truncation_side: nothing is cut without"),
        (BatchSpec, {**BATCH, "max_failed_fraction": 1.5}, "BatchSpec.max_failed_fraction"),
        (BatchSpec, {**BATCH, "deduplicate": True}, "deduplicate: needs temperature 0"),
        (BatchSpec, {"source": "a", "output": "b", "messages": [{"content": "x"}]}, "role and content"),
        (Step, {"messages": []}, "messages: there are none"),
        (Step, {"messages": [{"role": "${r}", "content": "x"}]}, "messages: a role is a word"),
        (Step, {"messages": [{"role": "", "content": "x"}]}, "messages: a role is a word"),
        (Step, {"prompt": "x", "adapter": ""}, "adapter: a name, or"),
        (Step, {"prompt": "x", "adapter": "a ${b}"}, "adapter: a name, or"),
        (
            BatchSpec,
            {"source": "a", "output": "b", "steps": [{"prompt": "1"}, {"prompt": "2"}]},
            "output_column 'response' appears twice",
        ),
    ],
)
def test_a_bad_value_is_named(spec, value, named):
    """The error names the field and says what is wrong with it."""
    with pytest.raises(SpecError) as error:
        build(spec, value)

    assert named in str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"gpus_per_worker": 2},
            "gpus_per_worker: at most 1, got 2; for an engine on several GPUs set tensor_parallel",
        ),
        ({"gpus_per_worker": 0.5, "tensor_parallel_size": 2}, "several of this engine's 2 workers on one GPU"),
        ({"gpus_per_worker": 0.25, "pipeline_parallel_size": 3}, "several of this engine's 3 workers on one GPU"),
        ({"gpus_per_worker": 0.4, "engine_kwargs": {"gpu_memory_utilization": 0.5}}, "but gpus_per_worker is 0.4"),
        ({"engine_kwargs": {"data_parallel_size": 2}}, "engine_kwargs.data_parallel_size: set EngineSpec.replicas"),
        ({"engine_kwargs": {"data_parallel_backend": "ray"}}, "data_parallel_backend: set EngineSpec.replicas"),
        ({"engine_kwargs": {"distributed_executor_backend": "mp"}}, "EngineSpec.gpus_per_worker decides"),
        ({"engine_kwargs": {"prefill_context_parallel_size": 2}}, "set EngineSpec.tensor_parallel_size"),
        ({"engine_kwargs": {"served_model_name": "x"}}, "set EngineSpec.served_model_name instead"),
        ({"engine_kwargs": {"device_ids": [1]}}, "set EngineSpec.accelerator_type"),
        ({"engine_kwargs": {"nnodes": 2}}, "Ray chooses the nodes"),
        ({"engine_kwargs": {"max_num_queued_reqs": 9}}, "set max_num_seqs"),
        ({"engine_kwargs": {"hf_token": "hf_x"}}, "set EngineSpec.secret_env"),
        ({"engine_kwargs": {"skip_tokenizer_init": True}}, "rows are text"),
        ({"engine_kwargs": {"ssl_keyfile": "k"}}, "engine_kwargs.ssl_keyfile: an engine has no HTTP endpoint"),
        ({"engine_kwargs": {"uvicorn_log_level": "debug"}}, "engine_kwargs.uvicorn_log_level: an engine has no HTTP"),
        ({"engine_kwargs": {"disable_log_stats": True}, "log_engine_metrics": True}, "needs these statistics"),
        ({"env": {"VLLM_RAY_PER_WORKER_GPUS": "0.5"}}, "VLLM_RAY_PER_WORKER_GPUS: set EngineSpec.gpus_per_worker"),
        ({"secret_env": {"VLLM_DP_SIZE": "/two"}}, "secret_env.VLLM_DP_SIZE: set EngineSpec.replicas"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "1"}}, "env.CUDA_VISIBLE_DEVICES: Ray chooses the GPUs"),
    ],
)
def test_what_contradicts_an_engines_resources_is_refused(fields, named):
    """Or another field; with the one to set."""
    with pytest.raises(SpecError) as error:
        build(EngineSpec, {"name": "e", "model": "m", **fields})

    assert named in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus_per_worker": 0.25},
        {"gpus_per_worker": 0.6, "tensor_parallel_size": 2},
        {"gpus_per_worker": 0.5, "engine_kwargs": {"gpu_memory_utilization": 0.5}},
        {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "replicas": 3},
        {"engine_kwargs": {"enable_expert_parallel": True, "worker_cls": "auto", "decode_context_parallel_size": 1}},
        {"engine_kwargs": {"disable_log_stats": False}, "log_engine_metrics": True},
        {"gpus_per_worker": 0, "env": {"CUDA_VISIBLE_DEVICES": ""}},
        {"gpus_per_worker": 0, "tensor_parallel_size": 2},
    ],
)
def test_what_an_engine_can_be_given(fields):
    """Fractions for one worker, or for several that cannot meet on a GPU; arguments that ask for no more GPUs."""
    assert build(EngineSpec, {"name": "e", "model": "m", **fields}).name == "e"


def test_a_spec_is_a_value():
    """It survives the wire unchanged, and cannot be changed."""
    spec = build(BatchSpec, {**BATCH, "stop": ["x"], "columns": ["text"]})

    assert spec == build(BatchSpec, spec.model_dump(mode="json", exclude_unset=True))
    with pytest.raises(ValueError, match="frozen"):
        spec.output = "elsewhere"


KEPT = {"keep": ["logprobs", "reasoning"]}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x", "extra_body": {"suffix": "."}}, "extra_body.suffix: has no effect"),
        ({**CHAT, "extra_body": {"user": "me"}}, "extra_body.user: has no effect"),
        ({"embed": "x", "extra_body": {"user": "me"}}, "extra_body.user: has no effect"),
        ({"prompt": "x", "extra_body": {"prompt_embeds": ""}}, "extra_body.prompt_embeds: not accepted here"),
        (
            {**CHAT, "extra_body": {"return_prompt_text": True}},
            "extra_body.return_prompt_text: its result has no column",
        ),
        ({**CHAT, "extra_body": {"include_reasoning": False}}, "extra_body.include_reasoning: reasoning is left out"),
        ({"prompt": "x", "extra_body": {"logprob_token_ids": [5]}}, r"would be dropped; add keep=\['logprobs'\]"),
        ({**CHAT, **KEPT, "extra_body": {"logprobs": 5}}, "extra_body.logprobs: a chat has top_logprobs .*, got 5"),
        ({**CHAT, **KEPT, "extra_body": {"logprobs": False}}, "extra_body.logprobs: a chat has top_logprobs"),
        ({"prompt": "x", "keep": ["logprobs"], "extra_body": {"logprobs": True}}, "of a prompt it is how many"),
        ({"prompt": "x", "keep": ["logprobs"], "extra_body": {"logprobs": None}}, "of a prompt it is how many"),
    ],
)
def test_what_of_extra_body_nobody_heeds_is_refused(fields, words):
    """Also what vLLM takes without a word, and the other API's word for log probabilities."""
    with pytest.raises(SpecError, match=words):
        Step(**fields)


def test_what_airflow_fills_in_later_is_not_checked_yet():
    """A template may stand for any value; the fields beside it are checked all the same."""
    check_unrendered(BatchSpec, {**BATCH, "max_tokens": "{{ params.n }}"}, templated)

    with pytest.raises(SpecError, match="max_failed_fraction"):
        check_unrendered(BatchSpec, {**BATCH, "max_tokens": "{{ params.n }}", "max_failed_fraction": 7}, templated)
    with pytest.raises(SpecError, match="promt: unknown field"):
        check_unrendered(BatchSpec, {"source": "a", "promt": "{{ x }}", "output": "b"}, templated)
    with pytest.raises(SpecError, match="exactly one"):
        check_unrendered(BatchSpec, {"source": "a", "output": "b"}, templated)
    with pytest.raises(SpecError, match="expected a BatchSpec or a dict"):
        check_unrendered(BatchSpec, 7, templated)


def test_an_earlier_tasks_report_stands_for_its_output():
    """So that one task's output can be the next one's source."""
    report = {"rows_in": 1, "output": "s3://a/b"}

    assert build(BatchSpec, {**BATCH, "source": report}).sources == ("s3://a/b",)
    assert build(BatchSpec, {**BATCH, "source": [report, "c"]}).sources == ("s3://a/b", "c")


def report(**counts):
    places = {"output": "o", "quarantine": "q", "application": "a", "model": "m", "fingerprint": "f"}
    return BatchReport(**places, **counts)


def test_a_report_reconciles():
    """Counts that do not add up cannot be reported."""
    report(rows_in=6, rows_written=3, rows_quarantined=2, rows_already_done=1, failures={"timeout": 2})

    with pytest.raises(ValueError, match="6 rows in, but 3 written"):
        report(rows_in=6, rows_written=3, rows_quarantined=2, failures={"timeout": 2})
    with pytest.raises(ValueError, match="2 quarantined rows, but reasons"):
        report(rows_in=2, rows_written=0, rows_quarantined=2, failures={"timeout": 1})


def test_a_sampling_field_is_one_everywhere():
    """What a row may tell is sent to the engine, and the integration tests do so, but for seed."""
    told = {name for name, field in Step.model_fields.items() if any(isinstance(one, PerRow) for one in field.metadata)}

    assert told == {*Step.sampling_fields, "adapter", "messages"}
    assert {*own_of(0), "seed"} == set(Step.sampling_fields)


def test_usage_sums_over_tasks():
    """Requests are the rows that reached the engine in that task."""
    usage = EngineUsage()
    for _ in range(2):
        usage = usage.plus(
            report(rows_in=5, rows_written=4, rows_quarantined=0, rows_already_done=1, completion_tokens=8)
        )

    assert EngineUsage(tasks=2, requests=8, completion_tokens=16) == usage
