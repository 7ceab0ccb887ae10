"""Inference through the shared engine: the right answer on every row, and every row accounted for."""

import io
import json
import time

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from airflow_provider_raylm import __version__
from airflow_provider_raylm.errors import BatchError, EngineError
from tests.conftest import REPOSITORY
from tests.integration.conftest import MAX_TOKENS, ROWS
from tests.s3 import BUCKET

GREEDY = {"temperature": 0, "max_tokens": MAX_TOKENS}


@pytest.fixture
def infer(cluster, engine, tmp_path):
    """Run an inference task and return its report."""

    def run(namespace=None, **batch):
        batch = {"prompt": "Say: ${text}", **GREEDY, "output": str(tmp_path / "out"), **batch}
        batch = {name: value for name, value in batch.items() if value is not None}
        return cluster.run("infer", {"engine": engine, "batch": batch}, namespace=namespace)

    return run


def read(folder):
    """Return the rows of an output folder in the order of their ids."""
    return ds.dataset(str(folder), format="parquet").to_table().sort_by("raylm_row_id").to_pylist()


@pytest.mark.parametrize(("block_rows", "in_flight_rows", "by_key"), [(7, 20, True), (1000, 1000, False)])
def test_answers_equal_offline_vllm(infer, source, texts, offline, tmp_path, block_rows, in_flight_rows, by_key):
    """Row by row, whatever the block size and the window."""
    report = infer(
        source=source,
        block_rows=block_rows,
        in_flight_rows=in_flight_rows,
        id_column="key" if by_key else None,
    )
    rows = read(tmp_path / "out")

    assert (report["rows_in"], report["rows_written"], len(rows)) == (ROWS, ROWS, ROWS)
    expected = dict(zip(texts, offline["prompts"], strict=True))
    assert {row["text"]: row["response"] for row in rows} == expected
    assert len(set(expected.values())) > ROWS * 0.9, "the model's answers must tell the rows apart"
    if by_key:
        assert all(texts[int(row["raylm_row_id"].removeprefix("key-"))] == row["text"] for row in rows)
    else:
        assert [row["text"] for row in rows] == texts
    assert report["completion_tokens"] == sum(row["raylm_completion_tokens"] for row in rows)
    assert {row["raylm_finish_reason"] for row in rows} <= {"stop", "length"}


def test_chats_equal_offline_vllm(infer, texts, offline, tmp_path):
    """With the model's own chat template."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "${text}"}]
    infer(source=str(tmp_path / "in.jsonl"), prompt=None, messages=messages)

    assert [row["response"] for row in read(tmp_path / "out")] == offline["chats"]


def test_answers_that_end_early_equal_offline_vllm(infer, source, texts, offline, tmp_path):
    """At a token, whose text is left out or not, and at a string."""
    for number, (stop, expected) in enumerate(offline["stops"]):
        output = tmp_path / str(number)
        extra = {name: value for name, value in stop.items() if name != "stop"}
        infer(source=source, output=str(output), stop=stop.get("stop"), extra_body=extra)
        rows = read(output)

        assert {row["text"]: row["response"] for row in rows} == dict(zip(texts, expected, strict=True)), stop
        assert any(row["raylm_finish_reason"] == "stop" for row in rows)


def test_steps_and_chained_tasks_agree(infer, cluster, engine, tmp_path):
    """Two steps in one task give what two tasks give, the second of which reads what the first wrote."""
    (tmp_path / "in.txt").write_text("".join(f"line {i}\n" for i in range(30)))
    first = {"prompt": "First: ${text}", "output_column": "one", **GREEDY}
    second = {"prompt": "Then: ${one} ${text}", "output_column": "two", **GREEDY}
    both = {"source": str(tmp_path / "in.txt"), "steps": [first, second], "output": str(tmp_path / "both")}
    report = cluster.run("infer", {"engine": engine, "batch": both})
    one = infer(source=str(tmp_path / "in.txt"), output=str(tmp_path / "one"), **first)
    infer(source=one, output=str(tmp_path / "two"), **second)

    columns = ["text", "one", "two", "raylm_row_id"]
    in_one_task, in_two_tasks = (
        [{name: row[name] for name in columns} for row in read(tmp_path / folder)] for folder in ("both", "two")
    )
    assert in_one_task == in_two_tasks
    assert report["rows_written"] == 30


def test_two_tasks_at_a_time(cluster, engine, source, offline, texts, tmp_path):
    """Both on the one engine, each with its own answers."""
    jobs = {}
    for name in ("a", "b"):
        batch = {"source": source, "prompt": "Say: ${text}", "output": str(tmp_path / name), **GREEDY}
        jobs[name] = cluster.start("infer", {"engine": engine, "batch": batch})
    for job in jobs.values():
        assert cluster.finish(job)[0]["rows_written"] == ROWS

    for name in jobs:
        assert [row["response"] for row in read(tmp_path / name)] == offline["prompts"]


def test_several_stages_share_a_task(cluster, engine, source, offline, texts, tmp_path):
    """As for an engine of more than eight replicas: each block is answered by one of them, and in its place."""
    batch = {"source": source, "prompt": "Say: ${text}", "output": str(tmp_path / "out"), "block_rows": 16, **GREEDY}
    job = cluster.start("infer", {"engine": {**engine, "replicas": 9}, "batch": batch})
    assert cluster.finish(job)[0]["rows_written"] == ROWS

    assert [row["response"] for row in read(tmp_path / "out")] == offline["prompts"]


def test_bad_rows_are_quarantined_and_the_others_written(infer, tmp_path):
    """Each with its id, the reason, and the columns it came with."""
    texts = ["fine", None, "", "word " * 600, "fine too", "odd \x00\x07 \u202e", " "]
    pq.write_table(pa.table({"text": texts, "n": range(7)}), tmp_path / "in.parquet")
    report = infer(source=str(tmp_path / "in.parquet"), prompt="${text}", max_failed_fraction=0.6)

    assert [row["text"] for row in read(tmp_path / "out")] == [texts[0], texts[4], texts[5]]
    failed = {row["n"]: row for row in read(tmp_path / "out" / "_quarantine")}
    assert {n: row["raylm_reason"] for n, row in failed.items()} == {
        1: "null_value",
        2: "empty_prompt",
        3: "prompt_too_long",
        6: "empty_prompt",
    }
    assert failed[3]["text"] == texts[3]
    assert failed[3]["raylm_row_id"] == "00000-000000003"
    assert "512" in failed[3]["raylm_message"]
    assert report["failures"] == {"null_value": 1, "empty_prompt": 2, "prompt_too_long": 1}


def test_a_prompt_that_cannot_be_tokenised_is_one_rows_fault(cluster, engine, offline, texts, tmp_path):
    """The others of its block, which are tokenised together with it, are answered."""
    contents = [f"Say: {texts[0]}", "lone \ud800 surrogate", f"Say: {texts[1]}"]
    question = {"kind": "completion", "fields": {"model": "tiny", **GREEDY}, "keep": []}
    (tmp_path / "block.json").write_text(json.dumps({"question": question, "requests": [[one] for one in contents]}))
    script = REPOSITORY / "tests" / "integration" / "ask_block.py"
    cluster.run_script(script, engine["deployment"], engine["application"], tmp_path)

    first, bad, last = json.loads((tmp_path / "outcomes.json").read_text())
    assert [first["value"], last["value"]] == offline["prompts"][:2]
    assert bad["reason"] == "invalid_request"


def test_a_budget_that_cannot_be_met_ends_the_task(infer, source, tmp_path):
    """The error has the commonest reason; what was asked by then is in the quarantine."""
    many = pa.concat_tables([pq.read_table(source)] * 20)
    pq.write_table(many, tmp_path / "many.parquet")
    with pytest.raises(BatchError, match=r"of 6400 rows have failed already, .* allows 32\b.*not asked.*invalid_req"):
        infer(
            source=f"{tmp_path}/many.parquet",
            extra_body={"logprobs": 10_000},
            keep=["logprobs"],
            block_rows=20,
            in_flight_rows=20,
            max_failed_fraction=0.005,
        )

    rows = read(tmp_path / "out" / "_quarantine")
    assert 32 < len(rows) < many.num_rows
    assert "logprobs" in rows[0]["raylm_message"].lower()


def test_what_all_rows_share_is_refused_once(infer, source, tmp_path):
    """One error for the task, with the engine's own words; no row pays for it, whatever the budget."""
    with pytest.raises(BatchError, match="The engine refuses what the spec asks of every row"):
        infer(source=source, max_failed_fraction=1, max_tokens=512)

    assert not list((tmp_path / "out").rglob("part-*"))


def test_an_unreadable_file_is_named(infer, source, tmp_path):
    """Also when it is found only in the middle of the work."""
    good = pq.read_table(source).slice(0, 5)
    pq.write_table(good, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:8] + b"\xff" * 40 + content[48:])

    with pytest.raises(BatchError, match=r"cannot read .*b\.parquet as parquet"):
        infer(source=f"{tmp_path}/*.parquet")


def test_an_empty_source_and_one_that_is_not_there(infer, tmp_path):
    """Nothing to do is success with an output that can be read; a wrong path is an error."""
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "in.parquet")
    report = infer(source=str(tmp_path / "in.parquet"))

    assert report["rows_in"] == 0
    assert read(tmp_path / "out") == []
    with pytest.raises(BatchError, match=r"nothing-\*\.parquet' matches no file"):
        infer(source=f"{tmp_path}/nothing-*.parquet")


def test_a_second_run_redoes_only_what_is_missing(infer, source, texts, offline, tmp_path):
    """Nothing when all is there; the missing block when one is not."""
    first = infer(source=source, block_rows=50)
    again = infer(source=source, block_rows=50)

    assert (first["rows_written"], again["rows_written"], again["rows_already_done"]) == (ROWS, 0, ROWS)
    assert again["fingerprint"] == first["fingerprint"]

    manifest = tmp_path / "out" / "_manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "state": "writing", "report": None}))
    part = sorted((tmp_path / "out").glob("part-*"))[0]
    lost = pq.read_table(part).num_rows
    part.unlink()
    third = infer(source=source, block_rows=50)

    assert (third["rows_written"], third["rows_already_done"], third["rows_in"]) == (lost, ROWS - lost, ROWS)
    assert [row["response"] for row in read(tmp_path / "out")] == offline["prompts"]


def test_a_stage_that_dies_is_gone_on_with_by_a_retry(cluster, engine, infer, tmp_path):
    """What it wrote is not asked again; every row is there once, on an object store, where listings may be old."""
    rows = 4_000
    root = f"s3://{BUCKET}/{tmp_path.name}"
    fs, path = fsspec.url_to_fs(root)
    fs.pipe_file(f"{path}/in.txt", "".join(f"line {i}\n" for i in range(rows)).encode())
    task = {"source": f"{root}/in.txt", "output": f"{root}/out", "max_tokens": 4, "block_rows": 50}

    def parts():
        fs.invalidate_cache()
        return [name for name in fs.find(f"{path}/out") if "/part-" in name]

    job = cluster.start("infer", {"engine": engine, "batch": {"prompt": "Say: ${text}", "temperature": 0, **task}})
    assert wait_for(parts, 120)
    (stage,) = cluster.processes("AnswerAndWrite")
    stage.kill()

    with pytest.raises(EngineError, match="Retry the task"):
        cluster.finish(job)
    written = len(parts()) * 50
    report = infer(**task)
    tables = [pq.read_table(io.BytesIO(fs.cat_file(name))) for name in parts()]
    assert 0 < written < rows
    assert (report["rows_already_done"], report["rows_written"]) == (written, rows - written)
    assert sorted(pa.concat_tables(tables)["text"].to_pylist()) == sorted(f"line {i}" for i in range(rows))
    assert len(tables) == rows // 50


def test_two_attempts_write_one_after_the_other(cluster, engine, source, tmp_path):
    """However they spell the place: the second finds what the first has done."""
    jobs = []
    for output in (f"{tmp_path}/out", f"file://{tmp_path}/./out/"):
        batch = {"source": source, "prompt": "Say: ${text}", "output": output, **GREEDY}
        jobs.append(cluster.start("infer", {"engine": engine, "batch": batch}))
    ended = [cluster.finish(job) for job in jobs]

    assert sorted(report["rows_written"] for report, _ in ended) == [0, ROWS]
    assert sum("another attempt is writing" in line for _, said in ended for line in said) == 1
    assert sum("is complete already" in line for _, said in ended for line in said) == 1


def test_an_engine_of_another_version_is_refused_at_once(cluster, engine, source, tmp_path):
    """Naming both versions; it is no sick engine, which would be waited for."""
    cluster.run_script(REPOSITORY / "tests" / "integration" / "old_engine.py", "raylm-old")
    old = {**engine, "application": "raylm-old", "deployment": "engine", "fingerprint": "old"}
    started = time.monotonic()
    try:
        batch = {"source": source, "prompt": "Say: ${text}", "output": str(tmp_path / "out")}
        with pytest.raises(EngineError, match=rf"deployed by another version.*this task runs {__version__}"):
            cluster.run("infer", {"engine": old, "batch": batch})
        assert time.monotonic() - started < 60
    finally:
        cluster.run("teardown", {"application": "raylm-old"})


def wait_for(condition, timeout):
    end = time.monotonic() + timeout
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_equal_rows_are_asked_once(infer, texts, offline, tmp_path):
    """When the author says so; each row gets the answer all the same."""
    few = texts[:20]
    lines = [few[i % 20] for i in range(400)]
    pq.write_table(pa.table({"text": lines}), tmp_path / "in.parquet")
    report = infer(source=str(tmp_path / "in.parquet"), deduplicate=True, block_rows=32)

    expected = dict(zip(texts, offline["prompts"], strict=True))
    assert [row["response"] for row in read(tmp_path / "out")] == [expected[text] for text in lines]
    assert report["rows_written"] == 400


def test_row_functions_run_in_the_connections_namespace(infer, texts, tmp_path):
    """And what they add stays in the row."""
    pq.write_table(pa.table({"text": texts[:10]}), tmp_path / "in.parquet")
    task = {"source": str(tmp_path / "in.parquet"), "preprocess": "tests.integration.row_functions:with_namespace"}
    infer(namespace="lookups", **task)

    assert [(row["text"], row["namespace"]) for row in read(tmp_path / "out")] == [(t, "lookups") for t in texts[:10]]


def test_progress_is_said_without_noise(cluster, engine, source, tmp_path):
    """The lines of a task are few, and none is Ray's."""
    batch = {"source": source, "prompt": "Say: ${text}", "output": str(tmp_path / "out"), **GREEDY}
    _, said = cluster.finish(cluster.start("infer", {"engine": engine, "batch": batch}))

    assert said[0] == f"3 files, {ROWS} rows to answer"
    assert said[-1].startswith(f"{ROWS} of {ROWS} rows, 0 failed, ")
    assert all(len(line) < 120 for line in said)


def test_the_stock_stage_works_on_the_engine(cluster, engine, source, offline, texts, tmp_path):
    """It is an ordinary Serve deployment: Ray's own processor finds it by application and deployment name."""
    script = REPOSITORY / "tests" / "integration" / "stock_stage.py"
    where = [engine["deployment"], engine["application"], engine["model"]]
    cluster.run_script(script, *where, f"{source}/0.parquet", tmp_path, MAX_TOKENS)

    rows = [json.loads(line) for line in (tmp_path / "stock.jsonl").read_text().splitlines()]
    expected = dict(zip(texts, offline["prompts"], strict=True))
    assert {row["text"]: row["response"] for row in rows} == {row["text"]: expected[row["text"]] for row in rows}
    assert len(rows) == ROWS // 3 + 1
