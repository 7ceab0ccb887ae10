"""A preview through the shared engine: the answers of vLLM itself, a log without them, and nothing written."""

import json
from contextlib import closing

import pytest

from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.following import Follower
from airflow_provider_raylm.polling import Watch
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.sealing import new_pad, unseal
from tests.integration.conftest import MAX_TOKENS, ROWS


@pytest.fixture
def preview(cluster, engine, source, tmp_path):
    """Run a preview; return its report and all that its job printed."""

    def run(name, rows, *, spread, pad=b"", texts=True):
        batch = {"source": source, "prompt": "Say: ${text}", "temperature": 0, "max_tokens": MAX_TOKENS}
        batch["output"] = str(tmp_path / "out")
        payload = {"engine": engine, "batch": batch, "rows": rows, "spread": spread, "texts": texts}
        request = JobRequest(f"raylm-preview-{name}", "preview", payload, pad=pad)
        with closing(cluster.client()) as jobs:
            assert jobs.submit(request)
            report = Follower(jobs, request.submission_id, lambda line: None, 0.5).wait(Watch())
            return report, jobs.logs(request.submission_id)

    return run


def test_first_rows_equal_offline_vllm_and_stay_out_of_the_log(preview, texts, offline, tmp_path):
    """Only who has the pad reads them."""
    pad = new_pad()
    report, log = preview("first", 8, spread=False, pad=pad)
    rows = json.loads(unseal(report["sealed"], pad))

    assert [row["answer"] for row in rows] == [{"response": answer} for answer in offline["prompts"][:8]]
    assert [row["asked"] for row in rows] == [[f"Say: {text}"] for text in texts[:8]]
    assert all(one["reason"] is None and 0 < one["completion_tokens"] <= MAX_TOKENS for one in report["counts"])
    assert report["capacity"] >= 8
    assert not [text for text in texts[:8] if text in log]
    assert not [answer for answer in offline["prompts"][:8] if len(answer) > 8 and answer in log]
    assert not (tmp_path / "out").exists()


def test_a_sample_counts_the_source_and_shows_no_row(preview):
    """For an estimate."""
    report, _ = preview("sample", 20, spread=True, texts=False)

    assert (report["plan"]["files"], report["plan"]["rows"], len(report["counts"])) == (3, ROWS, 20)
    assert (report["sealed"], report["seconds"] > 0) == ("", True)


def test_rows_are_not_shown_to_who_has_no_pad(preview):
    """They would stand in the log."""
    with pytest.raises(BatchError, match="raylm preview"):
        preview("bare", 2, spread=False)
