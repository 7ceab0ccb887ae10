"""What Airflow reads about this package: its classes, its connection type and the form for it."""

from __future__ import annotations

from typing import Any

from airflow_provider_raylm import __version__

_INTEGRATION = "Ray LM"


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, after Airflow's provider_info schema."""
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
        "operators": [{"integration-name": _INTEGRATION, "python-modules": ["airflow_provider_raylm.operators.raylm"]}],
        "sensors": [{"integration-name": _INTEGRATION, "python-modules": ["airflow_provider_raylm.sensors.raylm"]}],
        "hooks": [{"integration-name": _INTEGRATION, "python-modules": ["airflow_provider_raylm.hooks.raylm"]}],
        "triggers": [{"integration-name": _INTEGRATION, "python-modules": ["airflow_provider_raylm.triggers.raylm"]}],
        "task-decorators": [{"name": "raylm", "class-name": "airflow_provider_raylm.decorators.raylm.raylm_task"}],
        "extra-links": [
            f"airflow_provider_raylm.links.raylm.{link}"
            for link in ("RayJobLink", "ServeApplicationLink", "OutputLink")
        ],
        "config": {
            "raylm": {
                "description": "Settings of the Ray LM provider.",
                "options": {
                    "installation": {
                        "description": (
                            "Name of this Airflow installation, unique among those that share a Ray cluster: engines "
                            "of another are never touched. Default: the API server's base_url."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "team-a-production",
                        "default": None,
                    }
                },
            }
        },
        "connection-types": [
            {
                "connection-type": "raylm",
                "hook-class-name": "airflow_provider_raylm.hooks.raylm.RayLMHook",
                "hook-name": "Ray LM",
                "ui-field-behaviour": {
                    "hidden-fields": ["login", "extra"],
                    "relabeling": {"host": "Dashboard host", "schema": "http or https", "password": "Token"},
                    "placeholders": {"host": "ray-head (or: local)", "port": "8265", "schema": "http"},
                },
                "conn-fields": {
                    "verify": {
                        "label": "Check the certificate",
                        "schema": {"type": ["boolean", "null"], "default": True},
                    },
                    "ca_cert": {
                        "label": "CA certificate",
                        "description": "File on the worker with the certificate of the dashboard's CA.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "headers": {
                        "label": "Further HTTP headers",
                        "schema": {"type": ["object", "null"]},
                    },
                    "ship_package": {
                        "label": "Send this package with each job",
                        "description": "Off when the cluster's image has airflow-provider-raylm installed.",
                        "schema": {"type": ["boolean", "null"], "default": True},
                    },
                    "python": {
                        "label": "Interpreter of the cluster's jobs",
                        "schema": {"type": ["string", "null"], "default": "python"},
                    },
                    "namespace": {
                        "label": "Ray namespace",
                        "description": "Of the jobs: where row functions find named actors.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "timeout": {
                        "label": "Seconds per HTTP request",
                        "schema": {"type": ["number", "null"], "default": 30},
                    },
                },
            }
        ],
    }
