"""What a task leaves in its output folder, whenever it is killed; on a local folder and on S3."""

import importlib
import json
import re
import shutil
import sys
from contextlib import contextmanager, suppress

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_raylm.cluster.batch import storage
from airflow_provider_raylm.cluster.batch.budget import HOPELESS_BLOCKS
from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.output import MANIFEST
from airflow_provider_raylm.cluster.batch.report import ENGINE_COUNTS, Tally
from airflow_provider_raylm.cluster.batch.storage import Place
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchSpec, EngineRef, EngineSpec, build
from tests.s3 import BUCKET, PRIVATE_BUCKET
from tests.scripted import REF, attempt, shouts


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """An empty folder, by its address."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


def put(uri, content):
    fs, path = fsspec.url_to_fs(uri)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True) if uri.startswith("/") else None
    fs.pipe_file(path, content.encode())


def listed(uri):
    fs, path = fsspec.url_to_fs(uri)
    fs.invalidate_cache()
    return sorted(name.removeprefix(path).strip("/") for name in fs.find(path))


def rows_of(uri):
    """The rows of a folder's parts, and the schemas of these."""
    fs, path = fsspec.url_to_fs(uri)
    tables = []
    for name in listed(uri):
        if name.startswith("part-"):
            with fs.open(f"{path}/{name}", "rb") as stream:
                if name.endswith("jsonl"):
                    tables.append(pa.Table.from_pylist([json.loads(line) for line in stream]))
                else:
                    tables.append(pq.read_table(stream))
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row[ROW_ID]), {str(table.schema) for table in tables}


def manifest_of(uri):
    fs, path = fsspec.url_to_fs(uri)
    return json.loads(fs.cat_file(f"{path}/{MANIFEST}"))


def spec(root, texts="abcdefghij", write=True, **fields):
    source = f"{root}/in/a.txt"
    if write:
        put(source, "".join(f"{text}\n" for text in texts))
    defaults = {
        "prompt": "${text}",
        "source": source,
        "output": f"{root}/out",
        "block_rows": 3,
        "max_failed_fraction": 1,
    }
    return build(BatchSpec, {**defaults, **fields})


class Killed(BaseException):
    """The process was killed."""


@contextmanager
def killed_at(number, monkeypatch):
    """Kill whatever writes or deletes, before the write of this number; count the writes in the one element."""
    count = [0]

    def dying(real):
        def call(self, *args):
            if count[0] == number:
                raise Killed
            count[0] += 1
            return real(self, *args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", dying(Place.write))
        patch.setattr(Place, "delete", dying(Place.delete))
        with suppress(Killed):
            yield count


# --- a task and its retries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_finished_output_is_not_done_again(root, format):
    """It has parts with rows only, of one schema, named after their blocks; a second run returns the first's report."""
    task = spec(root, ["a", "b", "bad", "c"], output_format=format)
    report = attempt(task)
    again = attempt(spec(root, write=False, output_format=format), ask=pytest.fail)

    assert (report.rows_in, report.rows_written, report.rows_quarantined) == (4, 3, 1)
    assert (again.rows_already_done, again.rows_written, again.fingerprint) == (3, 0, report.fingerprint)
    assert listed(task.output) == [
        MANIFEST,
        f"_quarantine/part-00000-000000000-3.{format}",
        f"part-00000-000000000-3.{format}",
        f"part-00000-000000003-1.{format}",
    ]
    rows, schemas = rows_of(task.output)
    assert [(row["text"], row["response"]) for row in rows] == [("a", "A"), ("b", "B"), ("c", "C")]
    assert len(schemas) == 1
    failed, _ = rows_of(task.quarantine_uri)
    assert [(row["text"], row[ROW_ID], row["raylm_reason"]) for row in failed] == [
        ("bad", "00000-000000002", "invalid_request")
    ]


def test_a_retry_asks_what_is_not_done(root, monkeypatch):
    """Also with other block_rows, of which the first attempt's count; and where failed rows are concerned."""
    task = spec(root, ["a", "bad1", "b", "c", "d", "e", "bad2", "bad3", "bad4", "f"])
    with killed_at(5, monkeypatch):
        attempt(task, at_a_time=1)
    assert manifest_of(task.output)["state"] == "writing"
    asked = []

    def better(fields, prompts):
        asked.extend(prompts)
        return [Refusal("timeout", "late") if p == "bad2" else Answer(p.upper(), "stop", 1, 1) for p in prompts]

    report = attempt(spec(root, write=False, block_rows=1000), ask=better)
    rows, schemas = rows_of(task.output)

    assert sorted(asked) == ["bad1", "bad2", "bad3", "bad4", "f"]
    assert (report.rows_in, report.rows_already_done, report.rows_written, report.rows_quarantined) == (10, 5, 4, 1)
    assert [row["response"] for row in rows] == ["A", "BAD1", "B", "C", "D", "E", "BAD3", "BAD4", "F"]
    assert [row["text"] for row in rows_of(task.quarantine_uri)[0]] == ["bad2"]
    assert len(schemas) == 1


def test_another_processes_files_are_seen(root):
    """Listings are never earlier ones."""
    task = spec(root)
    assert Place(task.output).files() == {}
    attempt(task)
    other = fsspec.filesystem("s3" if root.startswith("s3") else "file", skip_instance_cache=True)
    fs, path = fsspec.url_to_fs(task.output)
    assert fs.exists(f"{path}/{MANIFEST}")
    for name in (MANIFEST, "part-00000-000000000-3.parquet"):
        other.rm_file(f"{path}/{name}")

    with pytest.raises(BatchError, match=r"holds part-00000-000000003-3\.parquet"):
        attempt(spec(root, write=False))


def test_another_task_or_input_is_not_mixed_in(root):
    """Unless the author says that it may be replaced; then nothing of it is left."""
    attempt(spec(root))
    with pytest.raises(BatchError, match="holds the output of another spec, engine or input"):
        attempt(spec(root, prompt="Now ${text}"))
    report = attempt(spec(root, texts=["x", "bad"], overwrite=True))

    assert report.rows_in == 2
    assert [row["text"] for row in rows_of(f"{root}/out")[0]] == ["x"]
    with pytest.raises(BatchError, match="another spec, engine or input"):
        attempt(spec(root, texts=["y"]))


def test_somebody_elses_files_are_left_alone(root):
    """A folder with part files and no manifest of ours is not touched; other files are nobody's business."""
    put(f"{root}/out/part-0.parquet", "precious")
    with pytest.raises(BatchError, match=r"holds part-0\.parquet"):
        attempt(spec(root))
    assert listed(f"{root}/out") == ["part-0.parquet"]

    put(f"{root}/out2/notes.txt", "mine")
    attempt(spec(root, output=f"{root}/out2"))
    attempt(spec(root, output=f"{root}/out2", texts="xy", overwrite=True))
    assert "notes.txt" in listed(f"{root}/out2")


@pytest.mark.parametrize("texts", ["", ["bad", "bad"]])
def test_an_output_without_answers_has_one_part_with_their_columns(root, texts):
    """So that the next task can read it."""
    task = spec(root, texts)
    report = attempt(task)

    assert report.rows_in == len(texts)
    assert [name for name in listed(task.output) if name.startswith("part-")] == ["part-00000-000000000-0.parquet"]
    following = spec(
        root, write=False, source=task.output, output=f"{root}/next", prompt="${response}", output_column="x"
    )
    assert attempt(following).rows_in == 0
    _, (schema,) = rows_of(task.output)
    assert {schema} == rows_of(attempt(spec(root, output=f"{root}/some")).output)[1]


def test_a_chain_of_tasks(root):
    """The output is the next one's source as it is, with the ids that it gave."""
    first = attempt(spec(root, ["a", "bad", "b"]))
    second = attempt(
        spec(root, write=False, source=first.output, output=f"{root}/next", prompt="${response}!", output_column="x")
    )
    replayed = attempt(
        spec(
            root, write=False, source=first.quarantine, output=f"{root}/again", prompt="good ${text}", output_column="x"
        )
    )

    assert second.rows_in == 2
    assert [(row["x"], row[ROW_ID]) for row in rows_of(second.output)[0]] == [
        ("A!", "00000-000000000"),
        ("B!", "00000-000000002"),
    ]
    assert [(row["x"], row[ROW_ID]) for row in rows_of(replayed.output)[0]] == [("GOOD BAD", "00000-000000001")]


def test_only_what_can_change_an_answer_makes_another_task(root):
    """Not how many replicas answer, how long it may take, or who may read the input."""
    engine = EngineSpec(name="e", model="m", engine_kwargs={"max_model_len": 512})
    ref = EngineRef(**{**REF.model_dump(), **answers(engine)})
    attempt(spec(root), ref=ref)
    if not root.startswith("s3"):
        fs, path = fsspec.url_to_fs(f"{root}/in/a.txt")
        fs.chmod(path, 0o600)
    for fields in (
        {"replicas": 3},
        {"hang_timeout": 5},
        {"num_cpus": 7},
        {"env": {"A": "b"}},
        {"served_model_name": "x"},
    ):
        other = EngineSpec(**{**engine.model_dump(exclude_unset=True), **fields})
        assert answers(other)["fingerprint"] != answers(engine)["fingerprint"]
        again = EngineRef(**{**REF.model_dump(), **answers(other)})
        assert (
            attempt(spec(root, write=False, output=f"{root}/out/"), ask=pytest.fail, ref=again).rows_already_done == 10
        )
    for fields in ({"model": "n"}, {"engine_kwargs": {"max_model_len": 256}}, {"tokenizer": "t"}):
        other = EngineSpec(**{**engine.model_dump(exclude_unset=True), **fields})
        with pytest.raises(BatchError, match="another spec, engine or input"):
            attempt(spec(root, write=False), ref=EngineRef(**{**REF.model_dump(), **answers(other)}))


def answers(engine):
    from airflow_provider_raylm.naming import answers_fingerprint, fingerprint

    return {"fingerprint": fingerprint(engine), "answers": answers_fingerprint(engine)}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a module of a package, as the next job would import it."""
    monkeypatch.syspath_prepend(tmp_path)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "authors_own"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def write(name, source):
        path = tmp_path / "authors_own" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        forget()

    yield write
    forget()


def test_a_changed_row_function_makes_another_task(root, written):
    """It is known by the source of its module, and of what of its package that one imports; not by its name alone."""
    written("__init__.py", "")
    written("unused.py", "")
    written("words.py", "WAY = 1\n")
    written("rows.py", "from authors_own.words import WAY\n\n\ndef clean(row):\n    return {**row, 'way': WAY}\n")
    attempt(spec(root, preprocess="authors_own.rows:clean"))

    def again():
        return attempt(spec(root, write=False, preprocess="authors_own.rows:clean"), ask=pytest.fail)

    written("unused.py", "OTHER = 1\n")
    assert again().rows_written == 0
    written("words.py", "WAY = 2\n")
    with pytest.raises(BatchError, match="another spec, engine or input"):
        again()


def odd_ones_out(row):
    number = int(row["text"])
    return {**row, "kind": [None, number, number / 2, str(number), {"n": number}][number % 5], f"c{number % 2}": number}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_row_functions_make_parts_of_one_schema(root, format):
    """Whatever types they return, in whichever block; text where no other type holds all."""
    task = spec(root, map(str, range(10)), preprocess=f"{__name__}:odd_ones_out", output_format=format, block_rows=1)
    attempt(task)
    rows, schemas = rows_of(task.output)

    if format == "parquet":
        assert len(schemas) == 1
        assert [row["kind"] for row in rows[:5]] == [None, "1", "1.0", "3", '{"n": 4}']
    assert [row["c1"] for row in rows if row.get("c1") is not None] == [1, 3, 5, 7, 9]


# --- kills and refusals -------------------------------------------------------------------------------------------


def test_a_kill_before_any_write_is_made_good_by_the_next_attempt(root, monkeypatch):
    """Every row once, and at any moment the folder says what it is: complete only when all is there."""
    texts = ["a", "bad1", "b", "c", "d", "bad2", "bad3", "bad4", "e"]
    with killed_at(-1, monkeypatch) as count:
        attempt(spec(root, texts, output=f"{root}/whole"), at_a_time=1)
    writes = count[0]
    assert writes >= 6
    for number in range(writes + 1):
        task = spec(root, texts, output=f"{root}/out{number}", write=False)
        with killed_at(number, monkeypatch):
            attempt(task, at_a_time=1)
        assert (number == writes) == (listed(task.output) != [] and manifest_of(task.output)["state"] == "complete")
        attempt(task)
        ids = [row[ROW_ID] for uri in (task.output, task.quarantine_uri) for row in rows_of(uri)[0]]
        assert sorted(ids) == [f"00000-{n:09d}" for n in range(9)], number
        assert manifest_of(task.output)["state"] == "complete"


def test_a_kill_while_it_replaces_never_leaves_a_complete_half(root, monkeypatch):
    """An overwrite that was killed says so; who may not overwrite does not go on with it."""
    for number in range(12):
        output = f"{root}/out{number}"
        attempt(spec(root, output=output))
        with killed_at(number, monkeypatch):
            attempt(spec(root, texts=["x", "bad", "y"], output=output, overwrite=True), at_a_time=1)
        state, names = manifest_of(output)["state"], [n for n in listed(output) if n.startswith("part-")]
        if state == "complete":
            assert len(names) == (4 if number == 0 else 1)
        if state == "clearing":
            with pytest.raises(BatchError, match="what an overwrite had begun to delete"):
                attempt(spec(root, texts="abcdefghij", output=output))
        report = attempt(spec(root, texts=["x", "bad", "y"], output=output, overwrite=True))
        assert report.rows_in == 3
        assert [row["text"] for row in rows_of(output)[0]] == ["x", "y"], number
        assert [row["text"] for row in rows_of(f"{output}/_quarantine")[0]] == ["bad"], number


@pytest.mark.parametrize("examples", [pytest.param(40, id="local"), pytest.param(6, id="s3")])
def test_any_number_of_kills(request, tmp_path_factory, examples):
    """Whichever rows fail in which attempt, each ends once, and no answer is paid for twice once it is written."""

    @settings(max_examples=examples, deadline=None)
    @given(
        failing=st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=5),
        kills=st.lists(st.integers(0, 12), min_size=5, max_size=5),
        block_rows=st.integers(1, 13),
    )
    def killed(failing, kills, block_rows):
        folder = tmp_path_factory.mktemp("kills")
        root = str(folder) if request.node.callspec.id == "local" else f"s3://{BUCKET}/{folder.name}"
        task = spec(root, [f"t{i}" for i in range(12)], block_rows=block_rows)
        each_row_ends_once(task, failing, kills)

    if request.node.callspec.id == "s3":
        # Where parts are written in other threads than on a local folder.
        request.getfixturevalue("s3")
    killed()


def each_row_ends_once(task, failing, kills):
    def failing_at(fails):
        def ask(fields, prompts):
            return [
                Refusal("timeout", "late") if int(p[1:]) in fails else Answer(p.upper(), "stop", 1, 1) for p in prompts
            ]

        return ask

    for fails, kill in zip(failing, kills, strict=False):
        before = {row[ROW_ID] for row in rows_of(task.output)[0]} if listed(task.output) else set()
        with killed_at(kill, pytest.MonkeyPatch()):
            attempt(task, ask=failing_at(fails), at_a_time=1)
        assert before <= {row[ROW_ID] for row in rows_of(task.output)[0]}
        if listed(task.output) and manifest_of(task.output)["state"] == "complete":
            break
    attempt(task, ask=failing_at(failing[-1]))
    answered, failed = ([row[ROW_ID] for row in rows_of(uri)[0]] for uri in (task.output, task.quarantine_uri))
    assert sorted(answered + failed) == [f"00000-{n:09d}" for n in range(12)]


@pytest.mark.parametrize("place", ["in", "*.txt"])
def test_a_place_that_refuses_is_named(s3, place):
    """As an error of this package, with what to look at, and not as one of the storage's library."""
    source = f"s3://{PRIVATE_BUCKET}/{place}"
    task = build(BatchSpec, {"source": source, "output": f"s3://{BUCKET}/refused", "prompt": "${text}"})
    with pytest.raises(BatchError, match=rf"cannot list {re.escape(source)}: .*storage_conn_id"):
        attempt(task)


def test_a_policy_for_a_prefix_is_enough(s3, tmp_path):
    """No bucket is looked at or made."""
    root = f"s3://{BUCKET}/team/{tmp_path.name}"
    task = spec(root, ["a", "bad", "b"])
    s3.only = "team/"
    s3.denied.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        attempt(task)
        attempt(spec(root, texts="xy", overwrite=True))
    finally:
        s3.only = None

    assert s3.denied == []


@pytest.mark.parametrize("change", ["lost", "foreign", "doubled"])
def test_parts_that_are_not_the_tasks_are_noticed(root, change):
    """Before the manifest says that all is there."""
    task = spec(root)

    def meddling(fields, prompts):
        if prompts == ["j"]:
            fs, path = fsspec.url_to_fs(task.output)
            first = f"{path}/part-00000-000000000-3.parquet"
            if change == "lost":
                fs.rm_file(first)
            else:
                other = {"foreign": "part-x.parquet", "doubled": "part-00000-000000000-2.parquet"}[change]
                fs.pipe_file(f"{path}/{other}", fs.cat_file(first))
        return shouts(fields, prompts)

    with pytest.raises(BatchError, match="Something else wrote or deleted there"):
        attempt(task, ask=meddling, at_a_time=1)
    assert manifest_of(task.output)["state"] == "writing"


def test_a_storage_that_refuses_is_named(tmp_path, monkeypatch):
    """With the file and its own words."""
    task = spec(str(tmp_path))
    monkeypatch.setattr(storage.os.path, "realpath", lambda path: path)

    def full(self, path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsspec.get_filesystem_class("file"), "pipe_file", full)
    with pytest.raises(BatchError, match=r"cannot write .*_manifest\.json: .*No space left"):
        attempt(task)


# --- the budget ---------------------------------------------------------------------------------------------------


def refusing(reason="invalid_request", message="no", of=lambda prompt: True):
    asked = []

    def ask(fields, prompts):
        asked.extend(prompts)
        return [Refusal(reason, message) if of(p) else Answer(p, "stop", 1, 1) for p in prompts]

    return ask, asked


def test_a_task_ends_as_soon_as_its_budget_cannot_be_met(tmp_path):
    """What was answered stays; the rest is not paid for."""
    task = spec(str(tmp_path), [str(i) for i in range(1000)], block_rows=10, max_failed_fraction=0.05)
    ask, asked = refusing(of=lambda prompt: int(prompt) % 4 == 0)
    with pytest.raises(BatchError, match=r"rows have failed already, .* allows 50 \(5.0%\): the rest is not asked"):
        attempt(task, ask=ask)

    assert 200 <= len(asked) < 300
    assert len(rows_of(task.output)[0]) > 100


def test_a_task_whose_first_rows_all_fail_for_one_reason_ends(tmp_path):
    """Where nobody knows how many rows there are, too; unless any number may fail, or some are answered."""
    texts = [f"{i} {'x' * 100}" for i in range(2_000)]
    few = {"block_rows": 10, "max_failed_fraction": 0.5}
    ask, asked = refusing(message="max_tokens is above the context")
    with pytest.raises(BatchError, match=r"all failed for one reason: .*told: max_tokens is above the context"):
        attempt(spec(str(tmp_path), texts, **few), ask=ask)
    assert len(asked) < 10 * (HOPELESS_BLOCKS + 8)

    ask, asked = refusing(of=lambda prompt: not prompt.startswith("0 "))
    with pytest.raises(BatchError, match="1999 of 2000 rows failed, the error budget allows 1000"):
        attempt(spec(str(tmp_path), texts, **few, output=str(tmp_path / "b")), ask=ask)
    ask, asked = refusing()
    report = attempt(
        spec(str(tmp_path), texts, **{**few, "max_failed_fraction": 1}, output=str(tmp_path / "c")), ask=ask
    )
    assert report.rows_quarantined == 2_000


def test_a_progress_line_has_rows_rates_and_time_left():
    """The time left is only said when the total is known."""
    tally = Tally(total=100)
    engine = {**dict.fromkeys(ENGINE_COUNTS, 0), "prompt_tokens": 50, "completion_tokens": 40}
    counts = {"block": "0-0", "rows": 20, "kept": 0, "written": 18, **engine}
    tally.add({**counts, "failures": ["timeout\t2"], "failed_rows": [], "message": "late"})

    assert tally.line(10) == "20 of 100 rows, 2 failed, 2.0 rows/s, 4 tokens/s, 40 s left"
    tally.total = None
    assert tally.line(10) == "20 rows, 2 failed, 2.0 rows/s, 4 tokens/s"
