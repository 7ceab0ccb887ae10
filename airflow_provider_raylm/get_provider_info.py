"""What Airflow reads about this package: its classes, its connection type and the form for it."""

from __future__ import annotations

from typing import Any

from airflow_provider_raylm import __version__

_INTEGRATION = "Ray LM"
_PACKAGE = "airflow_provider_raylm"

_CONFIG = {
    "raylm": {
        "description": "Settings of the Ray LM provider.",
        "options": {
            "installation": {
                "description": (
                    "Name of this Airflow installation, unique among those that share a Ray cluster: engines of "
                    "another are never touched. Default: the API server's base_url."
                ),
                "version_added": "0.1.0",
                "type": "string",
                "example": "team-a-production",
                "default": None,
            }
        },
    }
}

_STANDARD_FIELDS = {
    "hidden-fields": ["login", "extra"],
    "relabeling": {"host": "Dashboard host", "schema": "http or https", "password": "Token"},
    "placeholders": {"host": "ray-head (or: local)", "port": "8265", "schema": "http"},
}


def _field(label: str, kind: str, description: str | None = None, default: object = None) -> dict[str, Any]:
    """Return a field of the connection's extra; one that is left empty is stored as null."""
    schema = {"type": [kind, "null"]} if default is None else {"type": [kind, "null"], "default": default}
    told = {} if description is None else {"description": description}
    return {"label": label, **told, "schema": schema}


_EXTRA_FIELDS = {
    "verify": _field("Check the certificate", "boolean", default=True),
    "ca_cert": _field("CA certificate", "string", "File on the worker with the certificate of the dashboard's CA."),
    "headers": _field("Further HTTP headers", "object"),
    "ship_package": _field(
        "Send this package with each job",
        "boolean",
        "Off when the cluster's image has airflow-provider-raylm installed.",
        default=True,
    ),
    "python": _field("Interpreter of the cluster's jobs", "string", default="python"),
    "namespace": _field("Ray namespace", "string", "Of the jobs: where row functions find named actors."),
    "runtime_env": _field(
        "Runtime environment", "object", "What deploys and inference tasks find on the cluster beside its image."
    ),
    "entrypoint_num_cpus": _field("CPUs of an inference job's own process", "number", default=0),
    "entrypoint_memory": _field(
        "Memory of an inference job's own process",
        "integer",
        "Bytes that it reserves: so many jobs begin at a time as there is room for.",
        default=536870912,
    ),
    "entrypoint_resources": _field(
        "Resources of an inference job's own process",
        "object",
        "By Ray's names, such as those of the nodes that it may run on.",
    ),
    "timeout": _field("Seconds per HTTP request", "number", default=30),
    "browser_url": _field(
        "Dashboard's address for browsers",
        "string",
        "For the links on a task's page, where it is another than the workers'.",
    ),
    "price_per_gpu_hour": _field(
        "Price of a GPU hour", "number", "In your currency, for estimates and the engines page."
    ),
}


def _modules(kind: str) -> list[dict[str, Any]]:
    return [{"integration-name": _INTEGRATION, "python-modules": [f"{_PACKAGE}.{kind}.raylm"]}]


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, after Airflow's provider_info schema."""
    links = ("RayJobLink", "ServeApplicationLink", "OutputLink")
    return {
        "package-name": "airflow-provider-raylm",
        "name": _INTEGRATION,
        "description": "One shared vLLM engine on Ray Serve per DAG run, used by every Ray Data inference task.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": _INTEGRATION,
                "external-doc-url": "https://docs.ray.io/en/latest/serve/llm/index.html",
                "tags": ["service"],
            }
        ],
        **{kind: _modules(kind) for kind in ("operators", "sensors", "hooks", "triggers")},
        "task-decorators": [{"name": "raylm", "class-name": f"{_PACKAGE}.decorators.raylm.raylm_task"}],
        "extra-links": [f"{_PACKAGE}.links.raylm.{link}" for link in links],
        # From Airflow 3.2 on; 3.1 has the console script alone.
        "cli": [f"{_PACKAGE}.cli.commands.airflow_commands"],
        "config": _CONFIG,
        "connection-types": [
            {
                "connection-type": "raylm",
                "hook-class-name": f"{_PACKAGE}.hooks.raylm.RayLMHook",
                "hook-name": _INTEGRATION,
                "ui-field-behaviour": _STANDARD_FIELDS,
                "conn-fields": _EXTRA_FIELDS,
            }
        ],
    }
