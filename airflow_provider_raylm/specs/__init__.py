"""The values that cross every border: what to deploy, what to run, and what came of it.

All defaults and all validation of the public API live here. Every spec is frozen, refuses unknown fields, and is
plain JSON on the wire, so that the worker, the cluster and a unit test see the same thing.
"""

from airflow_provider_raylm.specs.base import (
    RESERVED_PREFIX,
    SpecT,
    Value,
    build,
    check_unrendered,
    read_json_text,
    with_new_names,
)
from airflow_provider_raylm.specs.batch import BatchSpec, Format, OutputFormat
from airflow_provider_raylm.specs.engine import EngineQuery, EngineRef, EngineSpec, EngineTask, Labels, Lease
from airflow_provider_raylm.specs.media import Media
from airflow_provider_raylm.specs.reports import (
    BatchReport,
    EngineInfo,
    EngineSeconds,
    EngineUsage,
    FailedRow,
    OnBusy,
    Progress,
    SweepReport,
    TeardownReport,
)
from airflow_provider_raylm.specs.runtime_env import RuntimeEnv
from airflow_provider_raylm.specs.step import Step

__all__ = [
    "RESERVED_PREFIX",
    "BatchReport",
    "BatchSpec",
    "EngineInfo",
    "EngineQuery",
    "EngineRef",
    "EngineSeconds",
    "EngineSpec",
    "EngineTask",
    "EngineUsage",
    "FailedRow",
    "Format",
    "Labels",
    "Lease",
    "Media",
    "OnBusy",
    "OutputFormat",
    "Progress",
    "RuntimeEnv",
    "SpecT",
    "Step",
    "SweepReport",
    "TeardownReport",
    "Value",
    "build",
    "check_unrendered",
    "read_json_text",
    "with_new_names",
]
