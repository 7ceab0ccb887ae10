"""What becomes of a run whose Airflow is gone. The last of the system tests: another would have to start one anew."""

import pytest

from tests.chaos import airflow_faults
from tests.system.conftest import SHORT_LEASE

FAULTS = [airflow_faults.airflow_gone]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_job_and_the_lease_end_by_themselves(scene, fault, monkeypatch):
    """As in tests/chaos, at one moment."""
    monkeypatch.setattr(airflow_faults, "ROWS", 1_000)
    monkeypatch.setattr(airflow_faults, "LEASE", SHORT_LEASE)
    accounts = fault(scene)

    assert (accounts.rows_lost, accounts.rows_duplicated) == (0, 0)
    assert not scene.engines()
