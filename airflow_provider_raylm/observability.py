"""What a finished task tells the rest of Airflow: metrics, asset events, lineage."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import Asset, AssetAlias
from airflow.sdk.definitions.asset import AssetRef
from opentelemetry import trace

from airflow_provider_raylm.compat import Stats, get_hook_lineage_collector
from airflow_provider_raylm.specs import BatchReport, Progress

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

log = logging.getLogger(__name__)

# What of a report goes into an asset event and a run facet; both name the output themselves.
_ROWS = ("rows_in", "rows_written", "rows_quarantined", "rows_already_done")
_ANSWERS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "truncated_prompts", "cut_off", "reasked")
_TOLD = (*_ROWS, "prompt_tokens", "completion_tokens", "model", "fingerprint")
_GLOB = re.compile(r"[*?\[]")


def measure(context: Context, counts: Mapping[str, int], seconds: Mapping[str, float]) -> None:
    """Add to counters and timers ``raylm.<name>``, with Airflow's own tags for a task, and tell the task's span."""
    annotate(**counts, **seconds)
    tags = _tags(context["ti"])
    for name, count in counts.items():
        if count:
            Stats.incr(f"raylm.{name}", count, tags=tags)
    for name, value in seconds.items():
        Stats.timing(f"raylm.{name}", timedelta(seconds=value), tags=tags)


def measure_progress(ti: Any, progress: Progress) -> None:
    """Set the gauges ``raylm.<name>`` of a task instance that is at work."""
    gauges = {
        "rows_done": progress.rows,
        "rows_failed": progress.failed,
        "rows_per_s": progress.rows_per_s,
        "tokens_per_s": progress.tokens_per_s,
    }
    if progress.total is not None:
        gauges["rows_left"] = max(progress.total - progress.rows, 0)
    for name, value in gauges.items():
        Stats.gauge(f"raylm.{name}", value, tags=_tags(ti))


def _tags(ti: Any) -> dict[str, Any]:
    # Before 3.3 Airflow has these tags for a task, and does not tell them.
    return dict(getattr(ti, "stats_tags", None) or {"dag_id": ti.dag_id, "task_id": ti.task_id})


def annotate(**attributes: str | float | None) -> None:
    """Give the span that Airflow has opened for the task, if it traces, the attributes ``raylm.<name>``."""
    told = {f"raylm.{name}": value for name, value in attributes.items() if value is not None}
    trace.get_current_span().set_attributes(told)


def measure_batch(context: Context, report: BatchReport) -> None:
    """Measure what an inference task did."""
    counts = {name: getattr(report, name) for name in (*_ROWS[1:], *_ANSWERS)}
    measure(context, counts, {"inference_duration": report.seconds})


def announce(context: Context, outlets: Iterable[object], report: BatchReport) -> None:
    """Put the report's figures into the events of the task's assets; let an alias stand for the output."""
    for outlet in outlets:
        if isinstance(outlet, AssetAlias):
            context["outlet_events"][outlet].add(Asset(uri_of(report.output)), extra=told(report))
        elif isinstance(outlet, Asset | AssetRef):
            context["outlet_events"][outlet].extra.update(told(report))


def collect_lineage(hook: Any, sources: Collection[str], output: str) -> None:
    """Tell Airflow's lineage collector what was read and written by way of *hook*.

    A place that Airflow does not accept as an asset is left out: the rows are written.
    """
    collector = get_hook_lineage_collector()
    places = [(collector.add_input_asset, _folder(uri_of(source))) for source in sources]
    for add, uri in [*places, (collector.add_output_asset, uri_of(output))]:
        try:
            add(hook, uri=uri)
        except ValueError as error:
            log.warning("no lineage for %s: %s", uri, error)


def openlineage(report: BatchReport) -> OperatorLineage[Any, Any]:
    """Return a task's lineage in OpenLineage's terms: datasets, rows written, and the facet ``raylm``."""
    from airflow.providers.openlineage.extractors import OperatorLineage
    from attrs import make_class
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.generated.base import RunFacet
    from openlineage.client.generated.output_statistics_output_dataset import OutputStatisticsOutputDatasetFacet

    facet = make_class("RayLMRunFacet", list(_TOLD), bases=(RunFacet,), kw_only=True)
    written = OutputStatisticsOutputDatasetFacet(rowCount=report.rows_written + report.rows_already_done)
    return OperatorLineage(
        inputs=[InputDataset(*_dataset(source)) for source in report.source],
        outputs=[OutputDataset(*_dataset(report.output), outputFacets={"outputStatistics": written})],
        run_facets={"raylm": facet(**told(report))},
    )


def told(report: BatchReport) -> dict[str, Any]:
    """Return a report's figures: row counts, tokens, model, fingerprint."""
    return report.model_dump(mode="json", include=set(_TOLD))


def uri_of(place: str) -> str:
    """Return a place as a URI: a path is a file's."""
    return place if "://" in place else f"file://{place}"


def _folder(uri: str) -> str:
    """Return a glob's folder: a dataset has one name, whatever is chosen from it."""
    glob = _GLOB.search(uri)
    return uri[: uri.rindex("/", 0, glob.start())] if glob else uri


def _dataset(place: str) -> tuple[str, str]:
    """Return (namespace, name) after OpenLineage's naming: ``s3://bucket`` and the key, ``file`` and the path."""
    uri = urlsplit(_folder(uri_of(place)))
    if uri.scheme == "file":
        return "file", uri.path
    return f"{uri.scheme}://{uri.netloc}", uri.path.strip("/") or "/"
