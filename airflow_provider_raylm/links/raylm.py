"""The buttons of a task: its job and its engine on the Ray dashboard, and where its answers are.

They are there as soon as the task has its job, also while it is deferred.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink
from airflow.sdk.execution_time.xcom import XCom

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator, Context
    from airflow.sdk.types import TaskInstanceKey


class RayLMLink(BaseOperatorLink):
    """A link that the task stores under ``xcom_key`` when it knows where it leads."""

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return what the task stored; empty while it has not.

        A worker asks at a task's end for every link, and an XCom that is not there is an error in the task's log.
        """
        links = getattr(operator, "links", None)
        if links is not None:
            return str(links.get(self.xcom_key, ""))
        return str(XCom.get_value(ti_key=ti_key, key=self.xcom_key) or "")


class RayJobLink(RayLMLink):
    """The task's job on the Ray dashboard."""

    name = "Ray job"


class ServeApplicationLink(RayLMLink):
    """The engine on the Ray dashboard."""

    name = "Serve application"


class OutputLink(RayLMLink):
    """The folder that receives the answers."""

    name = "Output"


def store_links(
    context: Context, dashboard_url: str, job: str, application: str | None, output: str | None
) -> dict[str, str]:
    """Store where the links of a task lead that has its job, and return it by the links' keys."""
    links = {RayJobLink().xcom_key: f"{dashboard_url}/#/jobs/{quote(job)}"}
    if application is not None:
        links[ServeApplicationLink().xcom_key] = f"{dashboard_url}/#/serve/applications/{quote(application)}"
    if output is not None:
        links[OutputLink().xcom_key] = output
    for key, where in links.items():
        context["ti"].xcom_push(key=key, value=where)
    return links
