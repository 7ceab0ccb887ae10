"""Which failures Airflow tries again: not those that the next attempt meets, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from airflow_provider_raylm.compat import AirflowFailException
from airflow_provider_raylm.errors import EngineGone, SpecError


class UnfixableSpec(SpecError, AirflowFailException):
    """A SpecError as Airflow does not try again: the author has to change something."""


class UnfixableEngine(EngineGone, AirflowFailException):
    """An EngineGone as Airflow does not try again: the deploy task has to be cleared."""


@contextmanager
def no_retries_in_vain(gone: bool = True) -> Iterator[None]:
    """Have Airflow not try again what fails again: an engine may hold a GPU meanwhile.

    Args:
        gone: also when the engine is gone; False where a retry deploys it again.

    Raises:
        UnfixableSpec: the body raised a SpecError.
        UnfixableEngine: it raised an EngineGone.
    """
    try:
        yield
    except SpecError as error:
        raise UnfixableSpec(str(error)) from None
    except EngineGone as error:
        if not gone:
            raise
        raise UnfixableEngine(str(error)) from None
