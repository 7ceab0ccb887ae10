"""Source, stage and sink, each alone: no cluster, an engine made of a function."""

import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.serve.exceptions import RayServeException, RequestCancelledError

from airflow_provider_raylm.cluster import stage
from airflow_provider_raylm.cluster.recovery import EngineFailure
from airflow_provider_raylm.cluster.report import Tally, count_block
from airflow_provider_raylm.cluster.rows import Answer, Refusal
from airflow_provider_raylm.cluster.sinks import MANIFEST, Folder, Output, checksum, task_fingerprint
from airflow_provider_raylm.cluster.source import (
    ROW_ID,
    check_columns,
    check_ids,
    columns_to_read,
    count_rows,
    list_files,
    read_blocks,
    read_rows,
    schema_of,
)
from airflow_provider_raylm.cluster.stage import MESSAGE, REASON, BlockAnswerer, Calls, once, through_handle
from airflow_provider_raylm.cluster.window import in_order, window
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.specs import BatchReport, BatchSpec

SPEC = {"prompt": "${text}", "output": "unused"}


def spec(tmp_path, **fields):
    return BatchSpec.model_validate({**SPEC, "source": str(tmp_path), "output": str(tmp_path / "out"), **fields})


def rows_of(task, columns=None):
    tables = [table for file in list_files(task) for table in read_rows(file, columns, task.id_column, task.block_rows)]
    return pa.concat_tables(tables, promote_options="default").to_pylist() if tables else []


# --- source -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x", "n": 1}\n\n{"text": "y"}\n'),
        ("a.csv", 'text,n\nx,1\n"y\nwith line",\n'),
        ("a.csv.gz", "text,n\nx,1\ny,2\n"),
        ("a.txt", "x\ny\n"),
    ],
)
def test_each_format_gives_rows_with_ids(tmp_path, name, content):
    """One id per row: the file's number and the row's position."""
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    rows = rows_of(spec(tmp_path, block_rows=1))

    assert [row[ROW_ID] for row in rows] == ["00000-000000000", "00000-000000001"]
    assert [row["text"][0] for row in rows] == ["x", "y"]


def test_a_jsonl_column_has_one_type_in_all_blocks(tmp_path):
    """The narrowest that holds all its values, as one reader of all part files needs it; else text."""
    rows = [
        {"text": "x", "late": None, "n": 1, "list": [], "mixed": 1, "big": 1, "empty": {}},
        {"text": "y", "late": "z", "n": 0.5, "list": ["k"], "mixed": {"a": "ü"}, "big": 2**70},
        {"text": None, "n": 2, "mixed": "m"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = list_files(spec(tmp_path))
    blocks = list(read_rows(files[0], None, None, 1))

    assert len(blocks) == 3
    assert len({block.schema for block in blocks}) == 1
    assert pa.concat_tables(blocks).drop_columns([ROW_ID]).to_pylist() == [
        {"text": "x", "late": None, "n": 1.0, "list": [], "mixed": "1", "big": "1", "empty": "{}"},
        {"text": "y", "late": "z", "n": 0.5, "list": ["k"], "mixed": '{"a": "ü"}', "big": str(2**70), "empty": None},
        {"text": None, "late": None, "n": 2.0, "list": None, "mixed": "m", "big": None, "empty": None},
    ]


def test_json_escapes_of_half_a_character_stay_as_they_are_written(tmp_path):
    """They are no text, but no reason to refuse the file; a whole pair is a character."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b", "more": ["\\uDC00"]}\n{"text": "\\ud83d\\ude00"}\n')

    assert [(row["text"], row["more"]) for row in rows_of(spec(tmp_path))] == [
        ("a\\ud83d b", ["\\udc00"]),
        ("\U0001f600", None),
    ]


def test_a_quarantine_can_be_a_source(tmp_path):
    """Its rows come as they came before, with their ids, and without what went wrong."""
    failed = pa.table({"text": ["x"], ROW_ID: ["00000-7"], REASON: ["timeout"], MESSAGE: ["too late"]})
    Folder(f"{tmp_path}/out/_quarantine", "parquet").write(failed)

    assert rows_of(spec(tmp_path, source=f"{tmp_path}/out/_quarantine")) == [{"text": "x", ROW_ID: "00000-7"}]


def test_ids_restore_the_order_of_several_files(tmp_path):
    """Sorting by id is sorting by file and position, whatever the block size."""
    for name in ("b", "a"):
        pq.write_table(pa.table({"text": [f"{name}{i}" for i in range(5)]}), tmp_path / f"{name}.parquet")
    task = spec(tmp_path, block_rows=2)
    rows = rows_of(task)

    assert [row["text"] for row in sorted(rows, key=lambda row: row[ROW_ID])] == [
        f"{n}{i}" for n in "ab" for i in range(5)
    ]
    assert count_rows(list_files(task)) == 10


def test_an_earlier_tasks_ids_are_kept_and_its_counts_dropped(tmp_path):
    """So that outputs of a chain can be joined on the id."""
    pq.write_table(pa.table({"text": ["x"], ROW_ID: ["00003-7"], "raylm_prompt_tokens": [3]}), tmp_path / "a.parquet")

    assert rows_of(spec(tmp_path)) == [{"text": "x", ROW_ID: "00003-7"}]


def test_an_id_column_is_used_and_must_not_be_null(tmp_path):
    """Numbers become text."""
    pq.write_table(pa.table({"text": ["x", "y"], "key": [7, 8]}), tmp_path / "a.parquet")
    assert [row[ROW_ID] for row in rows_of(spec(tmp_path, id_column="key"))] == ["7", "8"]

    pq.write_table(pa.table({"text": ["x", "y"], "key": [7, None]}), tmp_path / "a.parquet")
    with pytest.raises(BatchError, match=r"a\.parquet: the id column 'key' is null in 1 rows"):
        rows_of(spec(tmp_path, id_column="key"))


def test_ids_of_a_column_must_be_unique(tmp_path):
    """Two outputs over one source carry the same ids: noticed before anything is paid for."""
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": ["x", "y"], ROW_ID: ["0-1", "0-2"]}), tmp_path / f"{name}.parquet")
    task = spec(tmp_path)

    check_ids(list_files(task)[:1], task)
    with pytest.raises(BatchError, match=r"2 ids of the column 'raylm_row_id' stand on several rows, '0-1' for one"):
        check_ids(list_files(task), task)


def test_folders_globs_and_hidden_files(tmp_path):
    """What a manifest or a quarantine keeps beside the rows is no input."""
    for name in ("in/a.txt", "in/deep/b.txt", "in/_quarantine/c.txt", "in/.d.txt", "in/_manifest.txt", "e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")

    def names(source):
        return [file.uri.removeprefix(f"file://{tmp_path}/") for file in list_files(spec(tmp_path, source=source))]

    assert names(str(tmp_path / "in")) == ["in/a.txt", "in/deep/b.txt"]
    assert names(f"{tmp_path}/in/*.txt") == ["in/a.txt"]
    assert names(f"{tmp_path}/in/**/*.txt") == ["in/a.txt", "in/deep/b.txt"]
    assert names(f"{tmp_path}/in/_quarantine/*.txt") == ["in/_quarantine/c.txt"]
    assert names([f"file://{tmp_path}/e.txt", f"{tmp_path}/in"]) == ["e.txt", "in/a.txt", "in/deep/b.txt"]


@pytest.mark.parametrize("source", ["{}/nothing-here", "{}/*.parquet"])
def test_a_source_that_matches_nothing_is_named(tmp_path, source):
    """A misspelt path must not look like an empty day."""
    with pytest.raises(BatchError, match="matches no file"):
        list_files(spec(tmp_path, source=source.format(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.parquet", b"PAR1 not really", "cannot read .*bad.parquet as parquet"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": \n', "cannot read .*bad.jsonl as jsonl: line 2"),
        ("list.jsonl", b"[1]\n", "line 1: expected an object, found list"),
        ("bad.csv", b"text,n\nx,1\ny\n", "cannot read .*bad.csv as csv: row 2 has 1 fields, the header 2"),
        ("bad.txt", b"\xff\xfe\xfa", "cannot read .*bad.txt as text"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, reason):
    """With its place and the reader's own words."""
    (tmp_path / name).write_bytes(content)
    task = spec(tmp_path)

    with pytest.raises(BatchError, match=reason):
        [schema_of(file) for file in list_files(task)] and rows_of(task)


def test_columns_are_checked_before_anything_is_asked(tmp_path):
    """Missing ones are named beside those that are there; none of the source's is overwritten."""
    with pytest.raises(BatchError, match=r"no column 'text', 'n'|no column 'n', 'text'"):
        check_columns(spec(tmp_path, columns=["n"]), ["a", "b"])
    with pytest.raises(BatchError, match="output_column 'text' is a column of the source"):
        check_columns(spec(tmp_path, output_column="text"), ["text"])
    check_columns(spec(tmp_path, output_column="text", prompt="${a}", columns=["a"]), ["text", "a"])


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_ids_of_an_earlier_task_beside_a_raw_file_are_checked(tmp_path, format):
    """Made ids and kept ones may be the same."""
    raw, earlier = {"text": ["x", "y"]}, {"text": ["z"], ROW_ID: ["00000-000000001"]}
    for name, columns in (("a", raw), ("b", earlier)):
        if format == "parquet":
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        else:
            lines = [json.dumps(row) for row in pa.table(columns).to_pylist()]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    task = spec(tmp_path)

    with pytest.raises(BatchError, match="'00000-000000001' for one"):
        check_ids(list_files(task), task)


def test_small_files_share_a_block(tmp_path):
    """In order, never more than block_rows, never two schemas; what is done is left out."""
    for name, rows in {
        "a.csv": "text\n1\n2\n3\n",
        "b.csv": "text\n4\n",
        "c.csv": "text\n5\n6\n",
        "d.csv": "text,n\n7,1\n",
    }.items():
        (tmp_path / name).write_text(rows)
    task = spec(tmp_path, block_rows=2)

    def texts(done):
        blocks = read_blocks(list_files(task), None, None, 2, pa.array(done, pa.string()))
        return [block["text"].to_pylist() for block in blocks]

    assert texts([]) == [["1", "2"], ["3", "4"], ["5", "6"], ["7"]]
    assert texts(["00000-000000001", "00001-000000000"]) == [["1", "3"], ["5", "6"], ["7"]]


def test_only_needed_columns_are_read(tmp_path):
    """Unless a row function may look at any."""
    there = ["text", "a", "b", ROW_ID]

    assert columns_to_read(spec(tmp_path), there) is None
    assert columns_to_read(spec(tmp_path, columns=["a"]), there) == ["text", "a", ROW_ID]
    assert columns_to_read(spec(tmp_path, columns=["a"], preprocess="m:f"), there) is None


# --- stage ------------------------------------------------------------------------------------------------------


def ask(fields, prompts):
    """Answer with the prompt in capitals; refuse what starts with "bad"."""
    assert json.loads(fields)["model"] == "m"
    return [
        Refusal("invalid_request", "refused") if prompt.startswith("bad") else Answer(prompt.upper(), "stop", 2, 3)
        for prompt in prompts
    ]


def table(*texts, **columns):
    ids = [f"id{i}" for i in range(len(texts))]
    return pa.table({"text": pa.array(texts, pa.string()), **columns, ROW_ID: ids})


def test_every_row_ends_in_one_of_two_tables(tmp_path):
    """Answered rows keep their columns and types; failed ones come as they went, with the reason."""
    answered, failed = BlockAnswerer(spec(tmp_path), "m", ask).answer(
        table("a", "bad", None, " ", "b", n=pa.array([1, 2, 3, 4, 5], pa.int8()))
    )

    assert answered.select(["text", "n", "response", ROW_ID]).to_pylist() == [
        {"text": "a", "n": 1, "response": "A", ROW_ID: "id0"},
        {"text": "b", "n": 5, "response": "B", ROW_ID: "id4"},
    ]
    assert answered.schema.field("n").type == pa.int8()
    assert {row[ROW_ID]: row["raylm_reason"] for row in failed.to_pylist()} == {
        "id1": "invalid_request",
        "id2": "null_value",
        "id3": "empty_prompt",
    }
    assert failed.column_names == ["text", "n", ROW_ID, "raylm_reason", "raylm_message"]


def test_steps_see_what_earlier_ones_produced(tmp_path):
    """Tokens add up over the steps; a row that failed is not asked again."""
    steps = [{"prompt": "${text}", "output_column": "one"}, {"prompt": "${text}+${one}", "output_column": "two"}]
    answered, failed = BlockAnswerer(spec(tmp_path, prompt=None, steps=steps), "m", ask).answer(table("a", "bad"))

    assert answered.select(["one", "two", "raylm_prompt_tokens", "raylm_completion_tokens"]).to_pylist() == [
        {"one": "A", "two": "A+A", "raylm_prompt_tokens": 4, "raylm_completion_tokens": 6}
    ]
    assert failed[ROW_ID].to_pylist() == ["id1"]


def shorten(row):
    """Row function: adds a column, drops one, and cannot bear "c"."""
    if row["text"] == "c":
        raise LookupError("no c")
    return {"text": row["text"], "short": row["text"][:1], "n": row["n"]}


def shout(row):
    """Row function: changes the answer."""
    return {**row, "response": row["response"] + "!"}


def test_row_functions(tmp_path):
    """They may change anything but the row's identity; what one raises fails its row."""
    task = spec(
        tmp_path, prompt="${short}", columns=["text"], preprocess=f"{__name__}:shorten", postprocess=f"{__name__}:shout"
    )
    answered, failed = BlockAnswerer(task, "m", ask).answer(table("abc", "c", n=pa.array([1, 2], pa.int8())))

    assert answered.select(["text", "short", "response", ROW_ID]).to_pylist() == [
        {"text": "abc", "short": "a", "response": "A!", ROW_ID: "id0"}
    ]
    assert "n" not in answered.column_names
    assert failed.select(["raylm_reason", "raylm_message"]).to_pylist() == [
        {"raylm_reason": "row_function", "raylm_message": "LookupError: no c"}
    ]


STRANGE = [1, "x", {"a": 1}, {}, 2**70, None, "\ud800", object()]


def make_strange(row):
    return {**row, "made": STRANGE[row["i"]], "text": STRANGE[row["i"]] if row["i"] < 2 else row["text"]}


def test_strange_results_of_a_row_function_fail_no_other_row(tmp_path):
    """What fits no common type becomes text; what no file can hold fails its row."""
    task = spec(tmp_path, preprocess=f"{__name__}:make_strange")
    rows = table(*["t"] * len(STRANGE), i=list(range(len(STRANGE))))
    answered, failed = BlockAnswerer(task, "m", ask).answer(rows)
    Folder(str(tmp_path / "out"), "parquet").write(answered)

    assert answered["made"].to_pylist() == ["1", "x", '{"a": 1}', "{}", str(2**70), None]
    assert answered["text"].to_pylist() == ["1", "x", "t", "t", "t", "t"]
    assert [(row["i"], row[REASON]) for row in failed.to_pylist()] == [(6, "row_function"), (7, "row_function")]


def test_a_row_function_that_is_not_there_is_named(tmp_path):
    """The error says that the cluster has to import it."""
    with pytest.raises(BatchError, match=r"preprocess: cannot import no\.such:thing on the cluster"):
        BlockAnswerer(spec(tmp_path, preprocess="no.such:thing"), "m", ask)


def test_a_column_that_only_some_file_lacks_is_fatal(tmp_path):
    """It is the author's mistake, not the row's."""
    with pytest.raises(BatchError, match="a row has no column 'text'; it has other"):
        BlockAnswerer(spec(tmp_path), "m", ask).answer(pa.table({"other": ["x"], ROW_ID: ["1"]}))


HOLD = Calls(lambda: None)


class Handle:
    """A deployment handle whose replica returns, or raises, what it is told."""

    def __init__(self, outcome):
        self.run_block = self
        self.outcome = outcome
        self.cancelled = False

    def remote(self, fields, contents, timeout, caller):
        return self

    def result(self, timeout_s):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self):
        self.cancelled = True


def test_a_lost_answer_is_noticed():
    """Never a row without its answer."""
    with pytest.raises(EngineError, match="1 of 2 rows"):
        through_handle(Handle([Answer("a", "stop", 1, 1)]), 1, HOLD)("{}", ["a", "b"], alone=False)


def test_a_replica_that_does_not_answer_is_not_waited_for():
    """The rows' own time and a minute; then the call is taken back."""
    handle = Handle(TimeoutError())
    with pytest.raises(EngineFailure, match="did not answer within 65 s"):
        through_handle(handle, 5, HOLD)("{}", ["a"], alone=False)

    assert handle.cancelled


class NobodysHandle:
    """A deployment handle as Serve has it when the deployment is gone: a call waits until it is cancelled."""

    def __init__(self):
        self.run_block = self.run_block_alone = self
        self.cancelled = threading.Event()

    def options(self, stream):
        return self

    def remote(self, fields, contents, timeout, caller):
        return self

    def result(self, timeout_s=10):
        assert self.cancelled.wait(timeout_s)
        raise RequestCancelledError("id")

    def __next__(self):
        return self.result()

    def cancel(self):
        self.cancelled.set()


@pytest.mark.parametrize("alone", [False, True])
def test_a_call_ends_when_the_engine_is_gone(alone, monkeypatch):
    """And not before; a Serve that does not answer is not an engine that is gone."""
    states = [None, RayServeException("restarting"), EngineError("gone")]

    def require_there():
        state = states.pop(0) if len(states) > 1 else states[0]
        if state:
            raise state

    monkeypatch.setattr(stage, "LOOK_PERIOD_S", 0.05)
    with pytest.raises(EngineFailure, match="cancelled"):
        through_handle(NobodysHandle(), 10, Calls(require_there))("{}", ["a"], alone=alone)
    assert len(states) == 1


def test_equal_requests_are_asked_once():
    """Within a block, over blocks, and while another thread still waits for the answer."""
    asked = []
    started, may_end = threading.Event(), threading.Event()

    def slow(fields, contents):
        asked.append(list(contents))
        started.set()
        assert may_end.wait(10)
        return [Answer(content.upper(), "stop", 1, 1) for content in contents]

    ask_once = once(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask_once, "f", ["a", "b", "a"])
        assert started.wait(10)
        second = pool.submit(ask_once, "f", ["b"])
        may_end.set()
        assert [answer.text for answer in first.result(10)] == ["A", "B", "A"]
        assert [answer.text for answer in second.result(10)] == ["B"]

    assert asked == [["a", "b"]]
    ask_once("other fields", ["a"])
    assert asked[1:] == [["a"]]


def test_a_time_out_is_not_remembered():
    """The next equal row is asked again: it was not the question's fault."""
    outcomes = [Refusal("timeout", "late"), Answer("A", "stop", 1, 1)]
    ask_once = once(lambda fields, contents: [outcomes.pop(0)])

    assert ask_once("f", ["a"])[0] == Refusal("timeout", "late")
    assert ask_once("f", ["a"])[0].text == "A"
    assert ask_once("f", ["a"])[0].text == "A"


def test_answers_are_not_remembered_for_ever():
    """The oldest go first."""
    asked = []

    def count(fields, contents):
        asked.extend(contents)
        return [Answer(content, "stop", 1, 1) for content in contents]

    ask_once = once(count, keep=2)
    for content in ("a", "b", "c", "a", "c"):
        ask_once("f", [content])

    assert asked == ["a", "b", "c", "a"]


# --- window -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "block_rows", "capacity", "blocks"),
    [(None, 256, 1024, 8), (None, 256, 100, 4), (None, 1, 64, 128), (20, 7, 1024, 3), (1, 256, 1024, 1)],
)
def test_the_window_follows_the_engine(chosen, block_rows, capacity, blocks):
    """Twice what it works on at a time, unless the author says otherwise."""
    assert window(chosen, block_rows, capacity) == blocks


def test_blocks_come_in_order_while_others_are_worked_on():
    """The first takes longest: the others are done before it, and wait for their turn."""
    finished = []
    first_may_end = threading.Event()

    def work(item):
        if item == 0:
            assert first_may_end.wait(10)
        finished.append(item)
        if item == 3:
            first_may_end.set()
        return item

    assert list(in_order(work, range(6), at_a_time=2)) == [0, 1, 2, 3, 4, 5]
    assert finished[:3] == [1, 2, 3]


def test_no_more_than_the_window_is_begun():
    """What is begun and not done is what a crash can lose."""
    at_work = []
    most = []

    def work(item):
        at_work.append(item)
        most.append(len(at_work))
        time.sleep(0.002)
        at_work.remove(item)

    list(in_order(work, range(50), at_a_time=3))

    assert max(most) == 3


def test_work_goes_on_while_nobody_asks_for_results():
    """The consumer may take its time; the engine must not wait for it."""
    finished = threading.Semaphore(0)

    def work(item):
        finished.release()
        return item

    results = in_order(work, range(20), at_a_time=2)
    assert next(results) == 0
    assert all(finished.acquire(timeout=10) for _ in range(20))
    assert list(results) == list(range(1, 20))


def test_an_error_of_the_source_comes_after_what_it_gave():
    """A file that cannot be read in the middle fails the task; the blocks before it are written."""
    finished = []

    def items():
        yield from range(3)
        raise BatchError("cannot read")

    with pytest.raises(BatchError, match="cannot read"):
        list(in_order(finished.append, items(), at_a_time=2))

    assert sorted(finished) == [0, 1, 2]


def test_the_first_error_ends_it():
    """Nothing more is begun, what has been begun is finished."""
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise EngineError("gone")

    with pytest.raises(EngineError, match="gone"):
        list(in_order(work, range(1000), at_a_time=2))

    assert len(begun) < 10


# --- sink -------------------------------------------------------------------------------------------------------


def prepared(tmp_path, **fields):
    source = tmp_path / "in.txt"
    if not source.exists():
        source.write_text("a\nb\nbad\n")
    task = spec(tmp_path, source=str(source), **fields)
    mark = task_fingerprint(task, "engine", list_files(task))
    return task, Output(task, mark), mark


def run(task, output, mark):
    done = set(output.answers.row_ids().to_pylist())
    tally = Tally(total=None, ids=checksum(output.answers.id_chunks()))
    for file in list_files(task):
        for rows in read_rows(file, None, None, task.block_rows):
            rows = rows.filter(pa.array([one not in done for one in rows[ROW_ID].to_pylist()]))
            answered, failed = BlockAnswerer(task, "m", ask).answer(rows)
            if answered.num_rows:
                output.answers.write(answered)
            if failed.num_rows:
                output.quarantine.write(failed)
            tally.add(count_block(answered, failed))
    report = BatchReport(
        rows_in=tally.rows + len(done),
        rows_written=tally.written,
        rows_quarantined=tally.quarantined,
        rows_already_done=len(done),
        failures=dict(tally.failures),
        output=task.output,
        quarantine=task.quarantine_uri,
        application="a",
        model="m",
        fingerprint=mark,
    )
    output.finish(report, tally.ids, pa.schema([(ROW_ID, pa.string())]))
    return report


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_finished_output_is_not_done_again(tmp_path, format):
    """The second preparation returns the first one's report."""
    task, output, mark = prepared(tmp_path, output_format=format, block_rows=2)
    assert output.prepare() is None
    report = run(task, output, mark)

    assert (report.rows_written, report.rows_quarantined) == (2, 1)
    assert output.prepare() == report
    assert len(output.answers.parts()) == 1
    assert output.quarantine.row_ids().to_pylist() == ["00000-000000002"]


def test_an_unfinished_output_is_gone_on_with(tmp_path):
    """What is there is not asked again; what failed is."""
    task, output, mark = prepared(tmp_path, block_rows=1)
    output.prepare()
    output.answers.write(pa.table({"text": ["a"], "response": ["A"], ROW_ID: ["00000-000000000"]}))
    output.quarantine.write(pa.table({"text": ["b"], ROW_ID: ["00000-000000001"]}))

    assert output.prepare() is None
    report = run(task, output, mark)
    assert (report.rows_in, report.rows_already_done, report.rows_written, report.rows_quarantined) == (3, 1, 1, 1)


def test_another_task_or_input_is_not_mixed_in(tmp_path):
    """Unless the author says that it may be replaced."""
    task, output, mark = prepared(tmp_path)
    output.prepare()
    run(task, output, mark)
    _, changed, _ = prepared(tmp_path, prompt="Now ${text}")

    with pytest.raises(BatchError, match="holds the output of another spec, engine or input"):
        changed.prepare()
    _, replacing, _ = prepared(tmp_path, prompt="Now ${text}", overwrite=True)
    assert replacing.prepare() is None
    assert replacing.answers.parts() == replacing.quarantine.parts() == []

    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    _, output, _ = prepared(tmp_path)
    with pytest.raises(BatchError, match="another spec, engine or input"):
        output.prepare()


def test_somebody_elses_files_are_left_alone(tmp_path):
    """A folder with part files and no manifest of ours is not touched."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-0.parquet").write_bytes(b"precious")
    _, output, _ = prepared(tmp_path)

    with pytest.raises(BatchError, match=r"holds .*part-0\.parquet"):
        output.prepare()
    assert (tmp_path / "out" / "part-0.parquet").read_bytes() == b"precious"


@pytest.mark.parametrize("written", [["x"], ["x", "x"], ["x", "z"], ["x", "y", "y"]])
def test_a_lost_or_doubled_row_is_noticed(tmp_path, written):
    """Also when the count is right."""
    _, output, mark = prepared(tmp_path)
    output.prepare()
    output.answers.write(pa.table({ROW_ID: written}))
    report = BatchReport(
        rows_in=2, rows_written=2, rows_quarantined=0, output="o", quarantine="q", application="a", model="m",
        fingerprint=mark,
    )  # fmt: skip

    with pytest.raises(BatchError, match="are not these"):
        output.finish(report, checksum([pa.array(["x", "y"])]), pa.schema([]))
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["report"] is None


def test_an_empty_output_has_a_schema(tmp_path):
    """So that the next task can read it."""
    task, output, mark = prepared(tmp_path)
    (tmp_path / "in.txt").write_text("")
    task, output, mark = prepared(tmp_path)
    output.prepare()
    report = run(task, output, mark)

    assert report.rows_in == 0
    assert rows_of(spec(tmp_path, source=task.output)) == []


# --- report -----------------------------------------------------------------------------------------------------


def test_a_progress_line_has_rows_rates_and_time_left():
    """The time left is only said when the total is known."""
    tally = Tally(total=100)
    tally.add({"ids": 5, "written": 18, "prompt_tokens": 50, "completion_tokens": 40, "failures": ["timeout\t2"]})

    assert tally.line(10) == "20 of 100 rows, 2 failed, 2.0 rows/s, 4 tokens/s, 40 s left"
    tally.total = None
    assert tally.line(10) == "20 rows, 2 failed, 2.0 rows/s, 4 tokens/s"
