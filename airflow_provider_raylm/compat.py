"""What older Airflows have in other places than those that came later, or not at all."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING or find_spec("airflow.sdk.lineage"):
    from airflow.sdk import conf
    from airflow.sdk.bases.decorator import determine_kwargs
    from airflow.sdk.exceptions import AirflowException, AirflowFailException
    from airflow.sdk.lineage import get_hook_lineage_collector
    from airflow.sdk.observability.stats import Stats
else:
    from airflow.configuration import conf
    from airflow.exceptions import AirflowException, AirflowFailException
    from airflow.lineage.hook import get_hook_lineage_collector
    from airflow.stats import Stats
    from airflow.utils.operator_helpers import determine_kwargs

if TYPE_CHECKING:
    from airflow.sdk.serde import allow_class
else:
    try:
        from airflow.sdk.serde import allow_class
    except ImportError:

        def allow_class(cls: type) -> None:
            """Leave it to ``[core] allowed_deserialization_classes``: Airflow 3.1 and 3.2 look nowhere else."""


__all__ = [
    "AirflowException",
    "AirflowFailException",
    "Stats",
    "allow_class",
    "conf",
    "determine_kwargs",
    "get_hook_lineage_collector",
]
