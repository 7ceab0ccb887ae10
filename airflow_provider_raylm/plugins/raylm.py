"""What Airflow's UI gets from this package: the Engines page, and the entry in the menu that leads to it.

Every process of Airflow loads its plugins; the page's own code is imported in the API server alone, when it is first
asked for.
"""

from __future__ import annotations

import asyncio
from typing import Any

from airflow.plugins_manager import AirflowPlugin

URL_PREFIX = "/raylm"


class EnginesApp:
    """The page as an ASGI application."""

    def __init__(self) -> None:
        self._app: Any = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        # One for all who come first: they share what it sees.
        async with self._making:
            if self._app is None:
                self._app = await asyncio.to_thread(_make)
        await self._app(scope, receive, send)


def _make() -> Any:
    from airflow_provider_raylm.plugins.api import make_app

    return make_app()


class RayLMPlugin(AirflowPlugin):
    """The Engines page."""

    name = "raylm"
    fastapi_apps = [{"app": EnginesApp(), "url_prefix": URL_PREFIX, "name": "Ray LM engines"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Ray LM engines",
            # Without a slash before it: below the path that Airflow is served at.
            "href": f"{URL_PREFIX.strip('/')}/engines",
            "destination": "nav",
            "category": "browse",
            "url_route": "raylm-engines",
        }
    ]
