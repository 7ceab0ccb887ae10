"""How `make docs` makes the site: Markdown pages, and an API reference read from the source without importing it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "airflow_provider_raylm"

project = "airflow-provider-raylm"
author = "The airflow-provider-raylm maintainers"
(release,) = re.findall(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())

extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
napoleon_use_ivar = True

# What the author of a DAG imports. The rest is described in how-it-works.md.
autoapi_dirs = [str(PACKAGE)]
autoapi_ignore = [
    *("*/cluster/*", "*/triggers/*", "*/links/*", "*/cli/*", "*/plugins/*"),
    *(f"*/{name}.py" for name in ("following", "get_provider_info", "local", "naming", "observability", "polling")),
    *(f"*/{name}.py" for name in ("fakes", "inventory", "ray_jobs", "sealing", "wire")),
]
autoapi_add_toctree_entry = False
autoapi_root = "api"
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_member_order = "bysource"
# Classes of Airflow and pydantic are not read.
suppress_warnings = ["autoapi.python_import_resolution"]


def setup(app: Any) -> None:
    """Leave out fields named ``type``: Sphinx would take Python's own ``type`` in signatures for one of them."""
    app.connect("autoapi-skip-member", lambda _app, _what, name, _obj, skip, _options: skip or name.endswith(".type"))


html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
