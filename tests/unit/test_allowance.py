"""What becomes of a task whose tokens or money are spent before its rows are done."""

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from airflow_provider_raylm.cluster.batch.budget import Allowance, require_allowance
from airflow_provider_raylm.cluster.batch.report import COUNTS, Tally, stopped
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.naming import fingerprint
from airflow_provider_raylm.specs import BatchSpec
from tests.scripted import attempt

# Of a row of the scripted engine.
TOKENS = 5


@pytest.fixture
def fields(tmp_path):
    """A hundred rows in blocks of five."""
    (tmp_path / "in.txt").write_text("".join(f"row {number}\n" for number in range(100)))
    output = str(tmp_path / "out")
    return {"source": str(tmp_path / "in.txt"), "prompt": "${text}", "output": output, "block_rows": 5}


def written(fields):
    parts = sorted(str(path) for path in ds.dataset(fields["output"], exclude_invalid_files=True).files)
    return ds.dataset(parts).to_table().num_rows


def test_it_stops_in_good_order_and_goes_on(fields):
    """What was begun is written; the text says how far it came, and the next attempt does the rest."""
    bounded = BatchSpec(**fields, max_tokens_total=40 * TOKENS)
    with pytest.raises(SpecError, match=r"may spend 200, and has; .* \d+ of 100 rows are done, 0 of them.*clear"):
        attempt(bounded)
    first = written(fields)
    # Two blocks are in flight at a time, of which nothing is known before one has ended.
    assert 40 <= first <= 60
    with pytest.raises(SpecError, match="of 100 rows are done"):
        attempt(bounded)
    report = attempt(BatchSpec(**fields))
    assert report.rows_already_done >= 80
    assert report.rows_in == written(fields) == 100


def test_enough_tokens_change_nothing(fields):
    """Also when they are just spent at the last row."""
    report = attempt(BatchSpec(**fields, max_tokens_total=100 * TOKENS))

    assert (report.rows_written, report.prompt_tokens + report.completion_tokens) == (100, 100 * TOKENS)


def test_it_is_no_part_of_what_an_output_answers(fields):
    """A complete output stays so with another bound."""
    assert fingerprint(BatchSpec(**fields)) == fingerprint(BatchSpec(**fields, max_tokens_total=1))
    attempt(BatchSpec(**fields))
    assert attempt(BatchSpec(**fields, max_tokens_total=1)).rows_already_done == 100


def test_what_is_under_way_counts(fields):
    """By what those that have ended took; a row that failed has its tokens, too."""
    block = ("name", pa.table({"a": range(10)}))
    allowance = Allowance(100)
    blocks = allowance.within(iter([block] * 9))
    for _ in range(3):
        next(blocks)
    allowance.add(10, {"prompt_tokens": 20, "completion_tokens": 9})
    # 29 of 10 rows make 87 of the 30 that are begun.
    next(blocks)
    assert list(blocks) == []
    assert allowance.over == "max_tokens_total"
    assert len(list(Allowance(None).within(iter([block] * 9)))) == 9


def test_a_stage_says_that_it_has_stopped(fields):
    """The driver fails the task then, whether or not the source tells how many rows it has."""
    spec = BatchSpec(**fields, max_tokens_total=10)
    tally = Tally()
    require_allowance(spec, None, tally)
    # As it comes through Ray Data.
    (told,) = pa.Table.from_pylist([stopped("max_tokens_total")], schema=COUNTS).to_pylist()
    tally.add(told)
    with pytest.raises(SpecError, match="0 rows are done"):
        require_allowance(spec, None, tally)


def test_no_tokens_are_no_bound(fields):
    with pytest.raises(SpecError, match="max_tokens_total"):
        BatchSpec(**fields, max_tokens_total=0)


def test_money_is_time_on_the_engines_gpus():
    """At the connection's price, for all replicas; without a price or a GPU it cannot be counted."""
    spec = BatchSpec(source="in", output="out", prompt="x", max_cost=6)

    assert spec.paid_seconds(gpus=4, price=3) == 1800
    assert BatchSpec(source="in", output="out", prompt="x").paid_seconds(4, None) is None
    with pytest.raises(SpecError, match="no price_per_gpu_hour"):
        spec.paid_seconds(4, None)
    with pytest.raises(SpecError, match="no GPU"):
        spec.paid_seconds(0, 3)


def test_no_block_is_begun_when_the_time_is_over():
    """Those that are begun end as they would."""
    now = 0.0
    block = ("name", pa.table({"a": range(10)}))
    allowance = Allowance(None, seconds=60, clock=lambda: now)
    blocks = allowance.within(iter([block] * 9))
    next(blocks)
    now = 59.9
    next(blocks)
    now = 60.0

    assert list(blocks) == []
    assert allowance.over == "max_cost"
