"""Specs refuse what cannot work, by name, and mean the same on both sides."""

import pytest

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs import (
    BatchReport,
    BatchSpec,
    EngineSpec,
    EngineUsage,
    build,
    check_unrendered,
)

BATCH = {"source": "in/*.parquet", "prompt": "Say ${text}", "output": "out"}


def templated(value):
    return isinstance(value, str) and "{{" in value


@pytest.mark.parametrize(
    ("spec", "value", "named"),
    [
        (EngineSpec, {"name": "e", "model": "m", "modell": "x"}, "EngineSpec.modell: unknown field"),
        (EngineSpec, {"name": "e e", "model": "m"}, "EngineSpec.name"),
        (EngineSpec, {"name": "e"}, "EngineSpec.model"),
        (EngineSpec, {"name": "e", "model": "m", "gpus": -1}, "EngineSpec.gpus"),
        (EngineSpec, {"name": "e", "model": "m", "replicas": 0}, "replicas: at least 1"),
        (EngineSpec, {"name": "e", "model": "m", "replicas": (3, 2)}, "replicas: (min, max)"),
        (EngineSpec, {"name": "e", "model": "m", "gpus": 0, "accelerator_type": "H100"}, "accelerator_type"),
        (EngineSpec, {"name": "e", "model": "m", "env": {"A": "b"}, "secret_env": {"A": "/b"}}, "secret_env.A"),
        (EngineSpec, {"name": "e", "model": "m", "engine_kwargs": {"model": "n"}}, "set EngineSpec.model instead"),
        (EngineSpec, {"name": "e", "model": "m", "lease": {"idle": 3}}, "EngineSpec.lease.idle: unknown field"),
        (BatchSpec, {**BATCH, "max_tokens": 0}, "BatchSpec.max_tokens"),
        (BatchSpec, {**BATCH, "temperature": -1}, "BatchSpec.temperature"),
        (BatchSpec, {**BATCH, "messages": [{"role": "user", "content": "x"}]}, "exactly one of prompt, messages"),
        (BatchSpec, {"source": "a", "output": "b"}, "exactly one of prompt, messages"),
        (BatchSpec, {**BATCH, "source_format": "xml"}, "BatchSpec.source_format"),
        (BatchSpec, {**BATCH, "output_format": "csv"}, "BatchSpec.output_format"),
        (BatchSpec, {**BATCH, "source": []}, "source: at least one"),
        (BatchSpec, {**BATCH, "preprocess": "no_colon"}, "preprocess: expected package.module:function"),
        (BatchSpec, {**BATCH, "output_column": "raylm_x"}, "reserved"),
        (BatchSpec, {**BATCH, "extra_body": {"n": 2}}, "extra_body.n"),
        (BatchSpec, {**BATCH, "error_budget": 1.5}, "BatchSpec.error_budget"),
        (BatchSpec, {**BATCH, "deduplicate": True}, "deduplicate: needs temperature 0"),
        (BatchSpec, {"source": "a", "output": "b", "messages": [{"content": "x"}]}, "role and content"),
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


def test_a_spec_is_a_value():
    """It survives the wire unchanged, and cannot be changed."""
    spec = build(BatchSpec, {**BATCH, "stop": ["x"], "columns": ["text"]})

    assert spec == build(BatchSpec, spec.model_dump(mode="json", exclude_unset=True))
    with pytest.raises(ValueError, match="frozen"):
        spec.output = "elsewhere"


def test_what_airflow_fills_in_later_is_not_checked_yet():
    """A template may stand for any value; the fields beside it are checked all the same."""
    check_unrendered(BatchSpec, {**BATCH, "max_tokens": "{{ params.n }}"}, templated)

    with pytest.raises(SpecError, match="error_budget"):
        check_unrendered(BatchSpec, {**BATCH, "max_tokens": "{{ params.n }}", "error_budget": 7}, templated)
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


def test_usage_sums_over_tasks():
    """Requests are the rows that reached the engine in that task."""
    usage = EngineUsage()
    for _ in range(2):
        usage = usage.plus(
            report(rows_in=5, rows_written=4, rows_quarantined=0, rows_already_done=1, completion_tokens=8)
        )

    assert EngineUsage(tasks=2, requests=8, completion_tokens=16) == usage
