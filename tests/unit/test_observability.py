"""What a finished task tells the rest of Airflow."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from airflow.sdk import Asset, AssetAlias
from airflow.sdk.execution_time.context import OutletEventAccessors

from airflow_provider_raylm import observability
from airflow_provider_raylm.observability import announce, collect_lineage, openlineage
from airflow_provider_raylm.specs import BatchReport, Progress
from airflow_provider_raylm.testing import FakeRayJobs
from tests.airflows import HookLineageCollector

REPORT = BatchReport(
    rows_in=10,
    rows_written=7,
    rows_quarantined=1,
    rows_already_done=2,
    failures={"null_value": 1},
    prompt_tokens=70,
    completion_tokens=28,
    source=("s3://in/2026-01-01/*.parquet", "/data/in"),
    output="s3://out/labels",
    quarantine="s3://out/labels/_quarantine",
    application="raylm-e-0",
    model="tiny",
    fingerprint="f",
)
TOLD = {
    "rows_in": 10,
    "rows_written": 7,
    "rows_quarantined": 1,
    "rows_already_done": 2,
    "prompt_tokens": 70,
    "completion_tokens": 28,
    "model": "tiny",
    "fingerprint": "f",
}


@pytest.fixture
def measured(monkeypatch):
    """Names and values of the metrics, by task."""
    found = {}

    def take(name, value, tags):
        found[tags["task_id"], name] = value
        assert set(tags) == {"dag_id", "task_id"}

    # Ours alone: Airflow's own count with the same.
    monkeypatch.setattr(observability, "Stats", SimpleNamespace(incr=take, timing=take))
    return found


def test_a_run_is_measured(measured, dagbag):
    """Every count and every duration, under the task that made it; a count of nothing is not sent."""
    fake = FakeRayJobs()
    fake.report("review", 10, failures={"null_value": 2}, completion_tokens=40, seconds=3.5)
    with fake.installed():
        assert dagbag.dags["raylm_daily_reviews"].test().state == "success"

    assert measured == {
        ("deploy_reviewer", "raylm.engines_deployed"): 1,
        ("deploy_reviewer", "raylm.deploy_duration"): timedelta(0),
        ("review", "raylm.rows_written"): 8,
        ("review", "raylm.rows_quarantined"): 2,
        ("review", "raylm.completion_tokens"): 40,
        ("review", "raylm.inference_duration"): timedelta(seconds=3.5),
        ("teardown_reviewer", "raylm.engine_duration"): timedelta(0),
        ("teardown_reviewer", "raylm.engine_loading"): timedelta(0),
        ("teardown_reviewer", "raylm.engine_idle"): timedelta(0),
    }


def test_a_span_tells_the_same(dagbag, monkeypatch):
    """And which job and which engine it was, so that a slow task leads to both."""
    span = SimpleNamespace(attributes={})
    span.set_attributes = span.attributes.update
    monkeypatch.setattr(observability, "trace", SimpleNamespace(get_current_span=lambda: span))
    fake = FakeRayJobs()
    fake.report("review", 10, failures={"null_value": 2}, seconds=3.5)
    with fake.installed():
        assert dagbag.dags["raylm_daily_reviews"].test().state == "success"

    told = span.attributes
    assert (told["raylm.rows_written"], told["raylm.rows_quarantined"], told["raylm.rows_already_done"]) == (8, 2, 0)
    assert (told["raylm.inference_duration"], told["raylm.engine_idle"]) == (3.5, 0)
    assert told["raylm.submission_id"] == fake.submitted[-1].submission_id
    assert told["raylm.application"] == fake.submitted[-1].payload["application"]
    assert told["raylm.output"] == fake.batches["review"].output


def test_asset_events_have_the_figures():
    """Those of named assets get them; an alias stands for the output. What is no asset is left alone."""
    asset, alias, events = Asset("s3://out/labels"), AssetAlias("labels"), OutletEventAccessors()
    announce({"outlet_events": events}, [asset, alias, "no asset"], REPORT)

    assert events[asset].extra == TOLD
    (event,) = events[alias].asset_alias_events
    assert (event.dest_asset_key.uri, event.extra) == ("s3://out/labels", TOLD)


def test_lineage_is_collected(monkeypatch):
    """A glob is its folder, a path a file's URI; what Airflow refuses is left out."""
    collector = HookLineageCollector()
    monkeypatch.setattr(observability, "get_hook_lineage_collector", lambda: collector)
    collect_lineage(object(), (*REPORT.source, "airflow://in"), REPORT.output)

    collected = collector.collected_assets
    assert [info.asset.uri for info in collected.inputs] == ["s3://in/2026-01-01", "file:///data/in"]
    assert [info.asset.uri for info in collected.outputs] == ["s3://out/labels"]


def test_openlineage_has_datasets_and_figures():
    """After OpenLineage's naming; the output with the rows that are in it."""
    lineage = openlineage(REPORT)

    assert [(one.namespace, one.name) for one in lineage.inputs] == [("s3://in", "2026-01-01"), ("file", "/data/in")]
    ((output,),) = [lineage.outputs]
    assert (output.namespace, output.name) == ("s3://out", "labels")
    assert output.outputFacets["outputStatistics"].rowCount == 9
    facet = lineage.run_facets["raylm"]
    assert {name: getattr(facet, name) for name in TOLD} == TOLD


def test_a_task_at_work_has_gauges(monkeypatch):
    """What is left is not said while nobody knows how much there is."""
    found = {}
    gauge = lambda name, value, tags: found.update({name: value})  # noqa: E731
    monkeypatch.setattr(observability, "Stats", SimpleNamespace(gauge=gauge))
    ti = SimpleNamespace(dag_id="d", task_id="t")
    observability.measure_progress(ti, Progress(seconds=10, rows=20, failures={"timeout": 5}, completion_tokens=40))
    rates = {"raylm.rows_per_s": 2.0, "raylm.tokens_per_s": 4.0}
    assert found == {"raylm.rows_done": 20, "raylm.rows_failed": 5, **rates}

    observability.measure_progress(ti, Progress(seconds=10, rows=20, total=50))
    assert found["raylm.rows_left"] == 30
