"""What `raylm estimate` says of a task from a sample: that its ranges hold, and where its figures come from."""

import math
import random

import pytest

from airflow_provider_raylm.cli import estimates
from airflow_provider_raylm.cli.main import main
from airflow_provider_raylm.specs.previews import PlanReport, PreviewReport
from tests.unit.test_cli_preview import deploy, fake

__all__ = ["fake"]


def report(seconds, wall, capacity=256, rows=1_000):
    plan = PlanReport(files=1, rows=rows, bytes=1, columns={}, answers={})
    counts = [{"prompt_tokens": 2, "completion_tokens": 1, "seconds": one} for one in seconds]
    return PreviewReport(plan=plan, counts=counts, seconds=wall, capacity=capacity, replicas=1)


def test_the_range_holds_in_nineteen_of_twenty_samples():
    """Of a population whose sum is known, with a fixed seed."""
    chance = random.Random(7)
    rows = [chance.gammavariate(4, 30) for _ in range(2_000)]
    held = 0
    for _ in range(500):
        found = estimates.total(chance.sample(rows, 50), len(rows))
        held += found.low <= sum(rows) <= found.high
    assert 0.92 <= held / 500 <= 0.98


def test_a_range_by_hand():
    """Of 4 rows of 100: 1.96 s / 2, and a factor for a sample that is not put back."""
    found = estimates.total([1, 2, 3, 4], 100)
    half = 1.959964 * math.sqrt(5 / 3) / 2 * math.sqrt(96 / 99)

    assert found.expected == 250
    assert found.low == pytest.approx(100 * (2.5 - half), rel=1e-6)
    assert found.high == pytest.approx(100 * (2.5 + half), rel=1e-6)


def test_what_is_known_has_no_range_and_one_row_tells_none():
    """All rows were asked; or a single one, which is the least that all take."""
    assert estimates.total([3, 5], 2) == estimates.Range(8, 8, 8)
    one = estimates.total([3], 10)
    assert (one.low, one.high, one.expected) == (3, math.inf, 30)


def test_hours_lie_between_a_full_engine_and_the_samples_own_pace():
    """Equal rows leave no other doubt."""
    found = estimates.engine_seconds(report([2.0] * 10, wall=2.0, capacity=100), 1_000)
    assert (found.low, found.high) == (1_000 * 2.0 / 100, 1_000 * 2.0 / 10)
    # An engine that the sample fills, and more.
    found = estimates.engine_seconds(report([2.0] * 10, wall=10.0, capacity=2), 1_000)
    assert found.low == found.high == 1_000
    apart = estimates.engine_seconds(report([1.0, 3.0] * 5, wall=2.0, capacity=100), 1_000)
    assert apart.low < 20
    assert apart.high > 200


def estimated(capsys, *options):
    """Return the exit status and what was printed, by the first words of a line."""
    status = main(["estimate", "d", "label", *options])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_an_estimate_with_a_price(fake, monkeypatch, capsys):
    """Of a sample from all over the source; the connection tells what a GPU costs."""
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", '{"conn_type": "raylm", "extra": {"price_per_gpu_hour": 3600}}')
    deploy(fake)
    status, lines, _ = estimated(capsys, "--sample", "10")

    payload = next(one.payload for one in fake.submitted if one.verb == "preview")
    assert (payload["rows"], payload["spread"], payload["texts"]) == (10, True, False)
    figures = {" ".join(line.split()[:-3]) or line: line.split()[-3:] for line in lines if "tokens" in line}
    assert status == 0
    assert lines[0] == "source: 1 files, 0 bytes, 1,000 rows"
    assert lines[1] == "sample: 10 rows in 0.5 s, 0 failed"
    assert figures["tokens in"] == ["2,000", "2,000", "2,000"]
    assert figures["tokens out"] == ["1,000", "1,000", "1,000"]
    price = next(line.split() for line in lines if line.startswith("price"))
    # 0.5 s a row: 256 at a time, or ten at a time as in the sample, of one GPU at a unit per second.
    assert price == ["price", f"{1_000 * 0.5 / 256:.2f}", f"{1_000 * 0.5 / 10:.2f}"]


def test_the_gpus_are_those_of_the_engine_that_was_asked(fake, tmp_path, monkeypatch, capsys):
    """Of one that the DAG does not deploy itself, or would deploy with fewer GPUs: its pace is that of its own."""
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", "raylm://h")
    deploy(fake, engine="large", dag_id="other", tensor_parallel_size=4)

    def hours(*options):
        status, lines, _ = estimated(capsys, "--engine", "large", "--sample", "10", *options)
        assert status == 0
        return next(line.split()[-1] for line in lines if line.startswith("GPU hours"))

    large = f"{4 * 1_000 * 0.5 / 10 / 3_600:.1g}"
    assert hours() == large
    (tmp_path / "dag.py").write_text(
        "from airflow.sdk import DAG\n"
        "from airflow_provider_raylm.operators.raylm import BatchInferenceOperator\n"
        "with DAG('d', schedule=None):\n"
        "    batch = {'source': '/in', 'prompt': 'p', 'output': '/out'}\n"
        "    BatchInferenceOperator(task_id='label', engine='{{ params.engine }}', batch=batch)\n"
    )
    assert hours() == large


def test_no_price_without_one(fake, monkeypatch, capsys):
    """The field to set is told; an engine without GPUs has none to pay for."""
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", "raylm://h")
    deploy(fake)
    status, lines, err = estimated(capsys)

    assert status == 0
    assert [line.split()[0] for line in lines[4:8]] == ["tokens", "tokens", "engine", "GPU"]
    assert "set price_per_gpu_hour in the extra of the connection raylm_default" in err


def test_the_plan_alone_needs_no_engine(fake, capsys):
    """And asks nothing."""
    status, lines, _ = estimated(capsys, "--no-engine")

    assert (status, lines) == (0, ["source: 1 files, 0 bytes, 1,000 rows"])
    assert [one.verb for one in fake.submitted] == ["plan"]
    assert estimated(capsys, "--no-engine", "--engine", "e")[0] == 1


def test_a_source_without_rows(fake, capsys):
    """Takes nothing."""
    fake.report("label", 0)
    deploy(fake)
    assert estimated(capsys)[:2] == (0, ["source: 1 files, 0 bytes, 0 rows"])


def test_figures_are_for_people():
    from airflow_provider_raylm.cli.estimate import _bytes, _number

    assert [_bytes(one) for one in (0, 999, 12_300, 4_560_000_000)] == ["0 bytes", "999 bytes", "12.3 kB", "4.6 GB"]
    assert [_number(one, 2) for one in (0, 0.00123, 12.345, math.inf)] == ["0.00", "0.001", "12.35", "?"]


def test_a_price_is_no_less_than_nothing(monkeypatch):
    from airflow_provider_raylm.errors import SpecError
    from airflow_provider_raylm.hooks.raylm import RayLMHook

    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", '{"conn_type": "raylm", "extra": {"price_per_gpu_hour": -1}}')
    with pytest.raises(SpecError, match="price_per_gpu_hour"):
        _ = RayLMHook().extra
