"""From a source to blocks of rows: files that others wrote, on a local folder and on S3."""

import bz2
import csv
import gc
import gzip
import io
import json
import re
import uuid
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_raylm.cluster.batch import ids, json_text
from airflow_provider_raylm.cluster.batch.formats import csv_text, format_of
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID, File, Fragment, Reading
from airflow_provider_raylm.cluster.batch.plan import Block, Plan, make_plan
from airflow_provider_raylm.cluster.batch.reader import read_blocks
from airflow_provider_raylm.cluster.batch.task import Work
from airflow_provider_raylm.errors import BatchError, SpecError
from airflow_provider_raylm.specs import BatchSpec, build
from tests.s3 import BUCKET
from tests.scripted import REF, attempt, shouts


def spec(tmp_path, **fields):
    defaults = {"prompt": "${text}", "source": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    return build(BatchSpec, {**defaults, **fields})


def write(tmp_path, name, content):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def blocks_of(task, done=()):
    said = []
    plan = make_plan(task, said.append)
    return [(name, table) for name, table in read_blocks(plan, lambda name: name not in done)]


def rows_of(task):
    tables = [table for _, table in blocks_of(task)]
    return pa.concat_tables(tables).to_pylist() if tables else []


def texts_of(task):
    return [row["text"] for row in rows_of(task)]


# --- formats ----------------------------------------------------------------------------------------------------

CSV = 'text,n\nx,1\n"y\nwith line",\n'
JSONL = '{"text": "x", "n": 1}\n\n{"text": "y"}\n'


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL.encode()),
        ("a.JSONL", JSONL.encode()),
        ("a.ndjson", JSONL.encode()),
        ("a.json", b'\n [{"text": "x", "n": 1},\n{"text": "y"}\n]\n'),
        ("a.json", b'{"text": "x"}\n{"text": "y"}'),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL.encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
        ("a.jsonl.bz2", bz2.compress(JSONL.encode())),
        ("a.jsonl.zst", zstd(JSONL.encode())),
        ("a.csv", CSV.encode()),
        ("a.CSV", CSV.encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()),
        ("a.tsv", CSV.replace(",", "\t").encode()),
        ("a.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode())),
        ("a.csv.gz", gzip.compress(CSV.encode()[:6]) + gzip.compress(CSV.encode()[6:])),
        ("a.csv.zst", zstd(CSV.encode())),
        ("a.txt", b"x\ny\n"),
        ("a.txt", b"\xef\xbb\xbfx\r\ny"),
    ],
)
def test_each_format_gives_rows_with_ids(tmp_path, name, content):
    """One id per row: the file's number and the row's position; whatever case, mark or compression it has."""
    write(tmp_path, name, content)
    rows = rows_of(spec(tmp_path, block_rows=1))

    assert [row[ROW_ID] for row in rows] == ["00000-000000000", "00000-000000001"]
    assert [row["text"][0] for row in rows] == ["x", "y"]


def test_a_large_file_is_cut_by_positions(tmp_path):
    """Where its format does not tell how many rows it has; what is done is read over."""
    lines = [f"line {i} {'x' * 40}" for i in range(5_000)]
    write(tmp_path, "a.txt", "".join(f"{line}\n" for line in lines))
    write(tmp_path, "b.csv", "text\n" + "".join(f"{line}\n" for line in lines))
    task = spec(tmp_path, block_rows=1_000)

    assert make_plan(task, print).rows is None
    assert texts_of(task) == lines * 2
    done = {f"{n:05d}-{first:09d}" for n in (0, 1) for first in (0, 2_000, 4_000)}
    assert [name for name, _ in blocks_of(task, done)] == [
        f"{n:05d}-{first:09d}" for n in (0, 1) for first in (1_000, 3_000)
    ]
    assert all(table["text"][0].as_py() == lines[int(name[-9:])] for name, table in blocks_of(task, done))


def test_csv_as_excel_and_others_write_it(tmp_path):
    """Semicolons, a mark, Windows-1252, and a cell longer than Python's csv module takes."""
    long = "x" * 200_000
    write(tmp_path, "a.csv", f'text;n\r\n"ü;""q""";1\r\n{long};\r\n'.encode("cp1252"))
    assert texts_of(spec(tmp_path, delimiter=";", encoding="cp1252")) == ['ü;"q"', long]
    with pytest.raises(BatchError, match=r"cannot read .*a\.csv as csv.*"):
        rows_of(spec(tmp_path, delimiter=";"))
    write(tmp_path, "a.csv", "text,n\nü,1\n".encode("utf-16"))
    assert texts_of(spec(tmp_path, encoding="utf-16")) == ["ü"]


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-16", "utf-16-le", "utf-16-be", "utf-32-be", "gb18030"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_a_mark_at_the_beginning_is_no_text(tmp_path, encoding, name):
    """Whatever the encoding; a file without one is read as well, and one within is kept."""
    content = {"a.csv": "text\nx\ufeff\n", "a.jsonl": '{"text": "x\ufeff"}', "a.txt": "x\ufeff\n"}[name]
    for mark in ("", "" if encoding == "utf-16" else "\ufeff"):
        write(tmp_path, name, (mark + content).encode(encoding))
        assert texts_of(spec(tmp_path, encoding=encoding)) == ["x\ufeff"]


@pytest.mark.parametrize("rows", [1, 20_000])
@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_excels_own_line_gives_the_delimiter(tmp_path, first, rows):
    """And is no row; the author's delimiter goes before it. Blocks are cut at the same positions."""
    texts = [f"x,{number}" for number in range(rows)]
    write(tmp_path, "a.csv", f"\ufeff{first}\r\ntext;n\r\n" + "".join(f"{text};1\r\n" for text in texts))
    write(tmp_path, "b.tsv", f"{first}\ntext\tn\nx\t1\n")
    task = spec(tmp_path, source=f"{tmp_path}/in/a.csv", block_rows=7_000)

    assert texts_of(task) == texts
    assert all(
        table["text"][0].as_py() == texts[int(name[-9:])] for name, table in blocks_of(task, {"00000-000007000"})
    )
    assert texts_of(spec(tmp_path, source=f"{tmp_path}/in/b.tsv", delimiter="\t")) == ["x"]


@pytest.mark.parametrize("rows", [1, 20_000])
def test_columns_at_the_end_without_name_and_values_are_none(tmp_path, rows):
    """As Excel leaves them; a value in one is refused, not left out."""
    write(tmp_path, "a.csv", "text,n,,\n" + "x,1,,\n" * rows)
    assert rows_of(spec(tmp_path))[-1].keys() == {"text", "n", ROW_ID}
    assert texts_of(spec(tmp_path)) == ["x"] * rows

    write(tmp_path, "a.csv", "text,n,,\n" + "x,1,,\n" * rows + "x,1,,y\n")
    with pytest.raises(BatchError, match=rf"a\.csv as csv: column 4 has no name, but a value in row {rows + 1}\."):
        rows_of(spec(tmp_path))
    write(tmp_path, "a.csv", ",text,\n1,x,\n")
    assert [row[""] for row in rows_of(spec(tmp_path))] == ["1"]


SPARKS = r"""text,n
plain C:\new\,1
"a \"q\", \\ \n",2
"",3
"ends with \\",4
"two
lines \"\\\"",5
5" pipe,6
"dou""ble",7
"""


@pytest.mark.parametrize("encoding", ["utf-8", "shift-jis"])
@pytest.mark.parametrize("characters", [1, 2, 3, 1 << 20])
def test_csv_as_spark_writes_it(tmp_path, monkeypatch, encoding, characters):
    """A backslash stands before quotes and itself where a cell is in quotes; elsewhere it is a character."""
    monkeypatch.setattr(csv_text, "_READ_CHARACTERS", characters)
    # Of which the second byte is a backslash.
    write(tmp_path, "a.csv", (SPARKS + '"\u8868",8\n').encode(encoding))

    assert texts_of(spec(tmp_path, escape="\\", encoding=encoding)) == [
        "plain C:\\new\\",
        'a "q", \\ \\n',
        "",
        "ends with \\",
        'two\nlines "\\"',
        '5" pipe',
        'dou"ble',
        "\u8868",
    ]


cells = st.text(st.sampled_from('a\\",;\n ') | st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=9)


@given(rows=st.lists(st.tuples(cells, st.booleans()), min_size=1), characters=st.integers(1, 30))
def test_escaped_quotes_are_doubled_wherever_what_is_read_ends(rows, characters):
    """Each cell is what Spark was given, in quotes because it has to be or by chance."""
    written, values = io.StringIO(), []
    for text, in_quotes in rows:
        if in_quotes or not text or set(text) & set('",\n') or text.isspace():
            escaped = text.replace("\\", "\\\\").replace('"', '\\"')
            written.write(f'"{escaped}",x\n')
        else:
            written.write(f"{text},x\n")
        values.append(text)
    written.seek(0)
    before, csv_text._READ_CHARACTERS = csv_text._READ_CHARACTERS, characters
    try:
        doubled = "".join(csv_text._doubled(written, ",", "\\"))
    finally:
        csv_text._READ_CHARACTERS = before

    assert [row[0] for row in csv.reader(io.StringIO(doubled, newline=""))] == values


def test_options_of_reading_are_honoured_or_refused(tmp_path):
    """Never ignored."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"]}))
    for option in ({"delimiter": ";"}, {"escape": "\\"}):
        with pytest.raises(BatchError, match=f"{next(iter(option))}: none of the source's files is CSV"):
            rows_of(spec(tmp_path, **option))
    with pytest.raises(BatchError, match="encoding: all of the source's files are Parquet"):
        rows_of(spec(tmp_path, encoding="cp1252"))
    for fields, reason in (
        ({"escape": "\\", "source_format": "jsonl"}, "only CSV has one"),
        ({"escape": '"'}, "a meaning of its own"),
        ({"escape": "ä"}, "no ASCII"),
        ({"escape": ";", "delimiter": ";"}, "stands between cells"),
        ({"delimiter": ";", "source_format": "jsonl"}, "only CSV has one"),
        ({"delimiter": '"'}, "a meaning of its own"),
        ({"encoding": "utf-9"}, "Python knows none of the name 'utf-9'"),
        ({"encoding": "cp1252", "source_format": "parquet"}, "tells its own"),
    ):
        with pytest.raises(SpecError, match=reason):
            spec(tmp_path, **fields)


def test_json_objects_are_each_rows_own_text(tmp_path):
    """As they are written, numbers too; nothing of other rows."""
    lines = [
        '{"meta":{"k1":1}}',
        '{"meta":{"k2":[0,10, 2.50]}, "n": 5}',
        '{"n": 2.50, "x": [[1]]}',
        '{"n": -0}',
        '{"n": 0}',
    ]
    write(tmp_path, "a.jsonl", "\n".join(lines))
    rows = rows_of(spec(tmp_path, prompt="${meta}"))

    assert [row["meta"] for row in rows] == ['{"k1":1}', '{"k2":[0,10, 2.50]}', None, None, None]
    assert [row["n"] for row in rows] == [None, "5", "2.50", "-0", "0"]
    assert [row["x"] for row in rows] == [None, None, "[[1]]", None, None]


def test_a_json_column_has_one_type_over_all_files(tmp_path):
    """That of its values if they are alike, else text as it is written."""
    write(
        tmp_path, "a.jsonl", '{"text": "x", "i": 1, "f": 1.5, "b": true, "l": [], "s": ["k"], "mixed": 1, "big": 1}\n'
    )
    write(
        tmp_path, "b.jsonl", f'{{"text": null, "i": -2, "l": [1], "s": [null], "mixed": {{"a": "ü"}}, "big": {2**70}}}'
    )
    tables = [table for _, table in blocks_of(spec(tmp_path, block_rows=1))]

    assert len({table.schema for table in tables}) == 1
    assert pa.concat_tables(tables).drop_columns([ROW_ID]).to_pylist() == [
        {"text": "x", "i": 1, "f": 1.5, "b": True, "l": [], "s": ["k"], "mixed": "1", "big": "1"},
        {"text": None, "i": -2, "f": None, "b": None, "l": [1], "s": [None], "mixed": '{"a": "ü"}', "big": str(2**70)},
    ]


def test_json_beside_parquet(tmp_path):
    """Numbers of two widths are numbers, and what no type holds is the text that JSON has for it."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], "n": pa.array([1], pa.int32()), "odd": [1.5]}))
    write(tmp_path, "b.jsonl", '{"text": "y", "n": 2, "odd": {"k": 2.50}}')
    rows = rows_of(spec(tmp_path))

    assert [(row["n"], row["odd"]) for row in rows] == [(1, "1.5"), (2, '{"k": 2.50}')]


def test_reading_json_takes_time_in_proportion(tmp_path):
    """To its bytes, however many different keys its objects have."""
    write(tmp_path, "a.jsonl", "".join(json.dumps({"meta": {f"k{i}": i}}) + "\n" for i in range(20_000)))
    tables = [table for _, table in blocks_of(spec(tmp_path, prompt="${meta}", block_rows=1_000))]

    assert sum(table.nbytes for table in tables) < 5_000_000


def test_json_arrays_are_read_piece_by_piece(tmp_path, monkeypatch):
    """Whatever stands at the end of a piece."""
    monkeypatch.setattr(json_text, "_READ_CHARACTERS", 5)
    rows = [{"text": "a, ]b", "n": i, "o": {"x": [1, {"y": "]"}]}} for i in range(20)]
    write(tmp_path, "a.json", json.dumps(rows, indent=1))

    assert [(row["text"], row["n"], json.loads(row["o"])) for row in rows_of(spec(tmp_path))] == [
        tuple(row.values()) for row in rows
    ]


def test_json_escapes_of_half_a_character_stay_as_they_are_written(tmp_path):
    """They are no text, but no reason to refuse the file; a whole pair is a character."""
    write(tmp_path, "a.jsonl", '{"text": "a\\ud83d b", "more": ["\\uDC00"]}\n{"text": "\\ud83d\\ude00"}\n')

    assert [(row["text"], row["more"]) for row in rows_of(spec(tmp_path))] == [
        ("a\\ud83d b", ["\\udc00"]),
        ("\U0001f600", None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.parquet", b"PAR1 not really", "cannot read .*bad.parquet as parquet"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": \n', "cannot read .*bad.jsonl as jsonl: line 2"),
        ("list.jsonl", b"\n1\n", "line 2: expected an object, found int"),
        ("open.json", b'[{"text": "x"},', "cannot read .*open.json as jsonl: element 2"),
        ("bad.csv", b"text,n\nx,1\ny\n", "cannot read .*bad.csv as csv: .*Expected 2 columns, got 1"),
        ("bad.txt", b"\xff\xfe\xfa", "cannot read .*bad.txt as text"),
        ("cut.csv.gz", gzip.compress(CSV.encode() * 100)[:-20], "cannot read .*cut.csv.gz as csv"),
        ("cut.jsonl.zst", zstd(JSONL.encode() * 100)[:-9], "cannot read .*cut.jsonl.zst as jsonl"),
        ("deep.jsonl", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "cannot read .*deep.jsonl as jsonl: line 1"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, reason):
    """With its place and the reader's own words."""
    write(tmp_path, name, content)

    with pytest.raises(BatchError, match=reason):
        rows_of(spec(tmp_path, prompt="q"))


# --- columns ----------------------------------------------------------------------------------------------------


def invalid_utf8():
    return pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"ok\xff")]
    )


@pytest.mark.parametrize(
    "column",
    [
        invalid_utf8(),
        pa.array([0, 10**18], pa.timestamp("us")),
        pa.array([0, 1], pa.timestamp("us", tz="Nowhere/City")),
        pa.array(["a", "b"], pa.string_view()),
        pa.array([["a"], ["b"]], pa.list_(pa.string_view())),
        pa.array([[1.0] * 1536] * 2, pa.list_(pa.float32(), 1536)),
        pa.array([{"a": 1}, None]),
        pa.array(["a", "a"]).dictionary_encode(),
        pa.array([b"\xff", None]),
        pa.array([float("nan"), float("inf")]),
        pa.array([1, None], pa.decimal128(30, 2)),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_a_column_that_nobody_needs_cannot_hurt(tmp_path, column, output_format):
    """It passes by as it is; the rows are answered."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x", "y"], "odd": column}))
    report = attempt(spec(tmp_path, output_format=output_format))

    assert (report.rows_written, report.rows_quarantined) == (2, 0)
    (part,) = (tmp_path / "out").glob("part-*")
    if output_format == "parquet":
        written = pq.read_table(part)["odd"]
        before = pa.chunked_array([column])
        assert written.type.equals(before.type) or "view" in str(before.type)
        assert written.cast(before.type).equals(before) or pc.any(pc.is_nan(before)).as_py()
    else:
        rows = [json.loads(line, parse_constant=pytest.fail) for line in part.read_text().splitlines()]
        assert [row["text"] for row in rows] == ["x", "y"]


@pytest.mark.parametrize("column", [invalid_utf8(), pa.array([0, 10**18], pa.timestamp("us"))], ids=["text", "time"])
def test_a_value_that_a_template_needs_and_python_does_not_know_fails_its_row(tmp_path, column):
    """The others are answered."""
    write(tmp_path, "a.parquet", pa.table({"text": column}))
    report = attempt(spec(tmp_path, max_failed_fraction=0.5))

    assert (report.rows_written, report.failures) == (1, {"unreadable_value": 1})


def a_time(kind):
    """One nanosecond after midnight, as a value of a type that has such within."""
    if isinstance(kind, pa.MapType):
        return [("a", 1)]
    return {"a": 1} if pa.types.is_struct(kind) else [1] if pa.types.is_nested(kind) else 1


@pytest.mark.parametrize(
    "kind",
    [
        pa.time64("ns"),
        pa.list_(pa.time64("ns")),
        pa.list_(pa.time64("ns"), 1),
        pa.large_list(pa.time64("ns")),
        pa.struct([("a", pa.time64("ns"))]),
        pa.map_(pa.string(), pa.time64("ns")),
        pa.timestamp("ns"),
        pa.timestamp("ns", "UTC"),
        pa.duration("ns"),
    ],
    ids=str,
)
@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_no_nanosecond_is_lost(tmp_path, kind, output_format):
    """Neither in what is asked nor in what is written."""
    column = pa.array([a_time(kind)], kind)
    write(tmp_path, "a.parquet", pa.table({"text": column}))
    asked = []

    def ask(fields, prompts):
        asked.extend(prompts)
        return shouts(fields, prompts)

    attempt(spec(tmp_path, output_format=output_format), ask=ask)
    (part,) = (tmp_path / "out").glob("part-*")
    assert "00:00:00.000000001" in asked[0]
    if output_format == "jsonl":
        assert "00:00:00.000000001" in part.read_text()
    else:
        assert pq.read_table(part)["text"].combine_chunks().equals(column)


def test_a_time_of_day_without_nanoseconds_is_one_of_pythons(tmp_path):
    """Whatever the column could hold."""
    write(
        tmp_path, "a.parquet", pa.table({"text": pa.array([45_296_500_000_000], pa.time64("ns")).dictionary_encode()})
    )
    attempt(spec(tmp_path, output_format="jsonl"))

    (part,) = (tmp_path / "out").glob("part-*")
    assert json.loads(part.read_text())["text"] == "12:34:56.500000"


def test_what_cannot_be_written_is_refused_before_the_first_row(tmp_path, monkeypatch):
    """Naming the column."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"]}))
    plan = make_plan(spec(tmp_path), print)
    interval = pa.field("odd", pa.month_day_nano_interval())

    def with_interval(task, say):
        return type(plan)(plan.fragments, plan.schema.append(interval), plan.how, plan.block_rows)

    with pytest.raises(BatchError, match=r"the column 'odd' is of type month_day_nano.*columns="):
        attempt(spec(tmp_path), ask=pytest.fail, plan_of=with_interval)


def test_columns_are_checked_in_every_file_before_anything_is_asked(tmp_path):
    """Missing ones are named beside those that are there; none of the source's is overwritten."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], "a": [1]}))
    with pytest.raises(BatchError, match="no column 'n', 'z'|no column 'z', 'n'"):
        make_plan(spec(tmp_path, prompt="${z}", columns=["n"]), print)
    with pytest.raises(BatchError, match="output_column 'a' is a column of the source"):
        make_plan(spec(tmp_path, output_column="a"), print)
    make_plan(spec(tmp_path, output_column="a", columns=["text"]), print)

    write(tmp_path, "b.parquet", pa.table({"text": ["x"], "response": [1]}))
    with pytest.raises(BatchError, match=r"output_column 'response' is a column of the source \(file.*b\.parquet\)"):
        make_plan(spec(tmp_path), print)
    write(tmp_path, "b.parquet", pa.table({"other": ["x"]}))
    with pytest.raises(BatchError, match=r"no column 'text'; it has other \(file.*b\.parquet\)"):
        make_plan(spec(tmp_path), print)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b"text,text\nx,y\n"), ("a.csv.gz", gzip.compress(b"text,text\nx,y\n"))],
)
def test_two_columns_of_one_name(tmp_path, name, content):
    """Nothing could tell which is meant."""
    write(tmp_path, name, content)
    with pytest.raises(BatchError, match=r"a\.csv.* has several columns of the name 'text'"):
        make_plan(spec(tmp_path), print)
    write(tmp_path, name, b"x")
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    (tmp_path / "in" / name).unlink()
    write(tmp_path, "a.parquet", table)
    with pytest.raises(BatchError, match="several columns of the name 'text'"):
        make_plan(spec(tmp_path), print)


def test_files_with_different_columns_make_parts_of_one_schema(tmp_path):
    """Of the type that holds both; what no type holds is refused, and does not matter where it is left out."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], "n": pa.array([1], pa.int32()), "odd": ["s"]}))
    write(tmp_path, "b.parquet", pa.table({"n": pa.array([2.5]), "text": pa.array(["y"], pa.large_string())}))
    attempt(spec(tmp_path, block_rows=1))

    tables = [pq.read_table(part) for part in sorted((tmp_path / "out").glob("part-*"))]
    assert len({table.schema for table in tables}) == 1
    assert [table["n"].to_pylist() for table in tables] == [[1.0], [2.5]]

    write(tmp_path, "c.parquet", pa.table({"text": ["z"], "n": [1], "odd": [7]}))
    with pytest.raises(
        BatchError, match=r"the column 'odd' is of type string in .*a\.parquet and of type int64 in .*c\.p"
    ):
        make_plan(spec(tmp_path), print)
    assert make_plan(spec(tmp_path, columns=["text"]), print).rows == 3


def test_columns_of_the_path(tmp_path):
    """Hive's: part of the row, decoded, text as it is written; what the file says itself goes before."""
    write(tmp_path, "day=01/region=a%20b/p.parquet", pa.table({"text": ["x"]}))
    write(tmp_path, "day=02/region=__HIVE_DEFAULT_PARTITION__/p.parquet", pa.table({"text": ["y"], "day": ["own"]}))
    attempt(spec(tmp_path, prompt="${text} ${day}", block_rows=1))

    rows = [row for part in sorted((tmp_path / "out").glob("part-*")) for row in pq.read_table(part).to_pylist()]
    assert [(row["day"], row["region"], row["response"]) for row in rows] == [
        ("01", "a b", "X 01"),
        ("own", None, "Y OWN"),
    ]


def test_what_is_held_of_a_file_ends_with_it_however_wide_its_rows_are(tmp_path):
    """One that is read to its end, one of which the rest is not wanted, and one that shares a block."""
    (tmp_path / "in").mkdir()
    for number, rows in enumerate((64, 64, 8)):
        table = pa.table({"text": [f"{i}".ljust(1 << 20) for i in range(rows)]})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet", row_group_size=16)
    task = spec(tmp_path, block_rows=16)
    plan = make_plan(task, print)
    gc.collect()
    before = pa.total_allocated_bytes()
    most = 0
    gc.disable()
    try:
        for _, _rows in read_blocks(plan, lambda name: not name.startswith("00001-00000003")):
            most = max(most, pa.total_allocated_bytes() - before)
        del _rows
        left = pa.total_allocated_bytes() - before
    finally:
        gc.enable()
    assert left == 0
    # A row group as it is decoded and its dictionary, the block, and the one before it.
    assert most < 16 * 5 << 20


def test_only_needed_columns_are_read(tmp_path):
    """Unless a row function may look at any."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], "a": [1], "b": [2], "raylm_prompt_tokens": [3]}))

    assert make_plan(spec(tmp_path), print).schema.names == ["text", "a", "b"]
    assert make_plan(spec(tmp_path, columns=["a"]), print).schema.names == ["text", "a"]
    assert make_plan(spec(tmp_path, columns=["a"], preprocess="m:f"), print).schema.names == ["text", "a", "b"]


# --- ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([7, 8]), ["7", "8"]),
        (pa.array([uuid.UUID(int=1).bytes, uuid.UUID(int=2).bytes], pa.binary(16)), [f"{n:032x}" for n in (1, 2)]),
        (pa.array([b"\xff", b"a"]), ["ff", "61"]),
        (pa.array(["u", "v"]).dictionary_encode(), ["u", "v"]),
        (pa.array(["u", "v"], pa.string_view()), ["u", "v"]),
    ],
)
def test_an_id_column_is_used(tmp_path, values, texts):
    """As text; bytes, such as a UUID's, as hexadecimal digits."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x", "y"], "key": values}))

    assert [row[ROW_ID] for row in rows_of(spec(tmp_path, id_column="key"))] == texts
    assert [row[ROW_ID] for row in rows_of(spec(tmp_path, id_column="key", columns=["text"]))] == texts


def test_an_id_column_that_cannot_be_one(tmp_path):
    """Null, a struct, or not in one of the files."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x", "y"], "key": [7, None], "s": [{"a": 1}] * 2}))
    with pytest.raises(BatchError, match=r"a\.parquet: the id column 'key' is null in 1 rows"):
        make_plan(spec(tmp_path, id_column="key"), print)
    with pytest.raises(BatchError, match=r"a\.parquet: the column 's' is of type struct.*cannot be an id"):
        make_plan(spec(tmp_path, id_column="s"), print)
    with pytest.raises(BatchError, match="no column 'k', which id_column names; it has text, key, s"):
        make_plan(spec(tmp_path, id_column="k"), print)


@pytest.mark.parametrize("rows", [3, 60_000])
@pytest.mark.parametrize("held", [1_000_000, 10])
def test_ids_of_a_column_must_be_unique(tmp_path, monkeypatch, rows, held):
    """Two outputs over one source carry the same ids: noticed before anything is paid for, in bounded memory."""
    monkeypatch.setattr(ids, "_HELD", held)
    monkeypatch.setattr(ids.Seen.__init__, "__defaults__", (held,))
    for name, shift in (("a", 0), ("b", rows)):
        table = pa.table({"text": ["x"] * rows, ROW_ID: [f"0-{i + shift}" for i in range(rows)]})
        write(tmp_path, f"{name}.parquet", table)
    assert make_plan(spec(tmp_path), print).rows == 2 * rows

    write(tmp_path, "c.parquet", pa.table({"text": ["x"], ROW_ID: ["0-1"]}))
    with pytest.raises(BatchError, match="ids of the column 'raylm_row_id' stand on several rows, '0-1' for one"):
        make_plan(spec(tmp_path), print)


def test_two_ids_may_share_a_hash(tmp_path, monkeypatch):
    """That is no reason to refuse them."""
    monkeypatch.setattr(ids, "hash_array", lambda values, categorize: __import__("numpy").zeros(len(values), "uint64"))
    write(tmp_path, "a.parquet", pa.table({"text": ["x", "y"], "key": [7, 8]}))

    assert make_plan(spec(tmp_path, id_column="key"), print).rows == 2


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_ids_of_an_earlier_task_beside_a_raw_file_are_checked(tmp_path, format):
    """Made ids and kept ones may be the same."""
    for name, columns in (("a", {"text": ["x", "y"]}), ("b", {"text": ["z"], ROW_ID: ["00000-000000001"]})):
        table = pa.table(columns)
        lines = "\n".join(json.dumps(row) for row in table.to_pylist())
        write(tmp_path, f"{name}.{format}", table if format == "parquet" else lines)

    with pytest.raises(BatchError, match="'00000-000000001' for one"):
        make_plan(spec(tmp_path), print)


def test_an_earlier_tasks_ids_are_kept_and_its_counts_dropped(tmp_path):
    """So that outputs of a chain can be joined on the id."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], ROW_ID: ["00003-7"], "raylm_prompt_tokens": [3]}))

    assert rows_of(spec(tmp_path)) == [{"text": "x", ROW_ID: "00003-7"}]


# --- files ------------------------------------------------------------------------------------------------------


def test_folders_globs_hidden_files_and_files_of_other_kinds(tmp_path):
    """What a manifest or a quarantine keeps beside the rows is no input, nor is what tells no format."""
    for name in ("a.txt", "deep/b.txt", "_quarantine/c.txt", ".d.txt", "_SUCCESS", "README.md", "deep/x.crc"):
        write(tmp_path, name, "x\n")
    said = []

    def names(source, **fields):
        plan = make_plan(spec(tmp_path, source=source, **fields), said.append)
        return [fragment.file.uri.removeprefix(f"file://{tmp_path}/in/") for fragment in plan.fragments]

    folder = str(tmp_path / "in")
    assert names(folder) == ["a.txt", "deep/b.txt"]
    assert said == [f"2 files in {folder} are left out: their suffixes tell no format that is read"]
    assert names(f"{folder}/*.txt") == ["a.txt"]
    assert names(f"{folder}/**/*.txt") == ["a.txt", "deep/b.txt"]
    assert names(f"{folder}/_quarantine/*.txt") == ["_quarantine/c.txt"]
    assert names([f"file://{folder}/a.txt", folder]) == ["a.txt", "deep/b.txt"]
    assert names(f"{folder}/README.md", source_format="text") == ["README.md"]
    with pytest.raises(BatchError, match=r"README\.md: unknown suffix"):
        names(f"{folder}/README.md")
    with pytest.raises(BatchError, match="has no file of a format that is read"):
        names(f"{folder}/*.md")


def test_a_file_without_bytes_has_no_rows(tmp_path):
    """Failed writers leave it; where nothing else is there, it is no empty day."""
    write(tmp_path, "a.jsonl", '{"text": "x"}\n')
    write(tmp_path, "b.parquet", b"")
    write(tmp_path, "c.csv", b"")
    said = []

    assert make_plan(spec(tmp_path), said.append).rows == 1
    assert said == [f"1 files in {tmp_path}/in are left out: they have no bytes, and so no rows"]
    with pytest.raises(BatchError, match=r"b\.parquet as parquet: it has no bytes"):
        make_plan(spec(tmp_path, source=f"{tmp_path}/in/b.parquet"), print)
    with pytest.raises(BatchError, match=r"has no file of a format that is read \(0 of its files .*, 1 no bytes\)"):
        make_plan(spec(tmp_path, source=f"{tmp_path}/in/*.parquet"), print)


def test_markers_of_folders_on_s3_are_no_files(s3, tmp_path):
    """By which consoles and Hadoop make a folder; also of one whose name has a suffix."""
    folder = tmp_path.name
    client = fsspec.filesystem("s3")
    for key in (f"{folder}/", f"{folder}/a.parquet/", f"{folder}/b_$folder$", f"{folder}/sub/"):
        client.call_s3("put_object", Bucket=BUCKET, Key=key, Body=b"")
    task = spec(tmp_path, source=f"s3://{BUCKET}/{folder}")
    with pytest.raises(BatchError, match="has no file of a format"):
        make_plan(task, print)
    client.pipe_file(f"{BUCKET}/{folder}/sub/a.txt", b"x\n")
    said = []

    assert texts_of(task) == ["x"]
    assert make_plan(task, said.append).rows == 1
    assert said == [f"1 files in s3://{BUCKET}/{folder} are left out: their suffixes tell no format that is read"]


@pytest.mark.parametrize(("storage", "name"), [("local", "a::b.txt"), ("s3", "a::b.txt"), ("s3", "a?versionId=1.txt")])
def test_a_name_that_is_taken_for_something_else_is_refused(request, tmp_path, name, storage):
    """By its own name, and not with an error of another file."""
    write(tmp_path, name, "x\n")
    source = str(tmp_path / "in")
    if storage == "s3":
        request.getfixturevalue("s3")
        source = f"s3://{BUCKET}/{tmp_path.name}"
        fsspec.filesystem("s3").call_s3("put_object", Bucket=BUCKET, Key=f"{tmp_path.name}/{name}", Body=b"x\n")

    write(tmp_path, "../fine/a?versionId=1.txt", "x\n")
    assert texts_of(spec(tmp_path, source=str(tmp_path / "fine"))) == ["x"]
    with pytest.raises(BatchError, match=rf"{re.escape(name)}: the name of this file has .*Rename it"):
        make_plan(spec(tmp_path, source=source), print)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("a.parquet", ("parquet", None)),
        ("a.b/c.JSONL", ("jsonl", None)),
        ("x.csv.gz", ("csv", "gzip")),
        ("x.TSV.Zst", ("csv", "zstd")),
        ("x.json.bz2", ("jsonl", "bz2")),
        ("x.gz", None),
        ("x.bin", None),
        ("_SUCCESS", None),
    ],
)
def test_format_and_compression_follow_from_the_suffixes(path, told):
    """In any case; what the author says goes before the format, not before the compression."""
    assert format_of(path, None) == told
    assert format_of("x.bin.gz", "text") == ("text", "gzip")


@pytest.mark.parametrize("source", ["{}/nothing-here", "{}/*.parquet"])
def test_a_source_that_matches_nothing_is_named(tmp_path, source):
    """A misspelt path must not look like an empty day."""
    with pytest.raises(BatchError, match="matches no file"):
        make_plan(spec(tmp_path, source=source.format(tmp_path)), print)


@pytest.mark.parametrize(
    ("source", "output", "quarantine"),
    [
        ("{}/in", "{}/in/out", None),
        ("{}/in/", "{}/in", None),
        ("{}/in", "{}/in/../in/out", None),
        ("{}/*/*.txt", "{}/in", None),
        ("{}/**", "{}/elsewhere", None),
        ("{}/in/a.txt", "{}/in", None),
        ("{}/in", "{}/out", "{}/in/failed"),
        ("{}/in/a.txt", "{}/out", "{}/in"),
    ],
)
def test_an_output_within_its_source_is_refused(tmp_path, source, output, quarantine):
    """Before anything starts, by any spelling: a retry would read its own answers."""
    write(tmp_path, "a.txt", "x\n")
    fields = {"source": source.format(tmp_path), "output": output.format(tmp_path)}
    fields |= {"quarantine": quarantine.format(tmp_path)} if quarantine else {}

    with pytest.raises((BatchError, SpecError), match="source"):
        make_plan(spec(tmp_path, **fields), print)
    with pytest.raises(SpecError, match="is the output, too"):
        spec(tmp_path, quarantine=f"{tmp_path}/out/")


def test_an_output_beside_its_source_is_not(tmp_path):
    """Names may begin alike, and what is hidden is not read."""
    write(tmp_path, "a.txt", "x\n")

    for output in ("in-out", "in/_out", "i"):
        assert make_plan(spec(tmp_path, output=str(tmp_path / output)), print).rows == 1


# --- blocks -----------------------------------------------------------------------------------------------------


def test_ids_restore_the_order_of_several_files(tmp_path):
    """Sorting by id is sorting by file and position, whatever the block size."""
    for name in ("b", "a"):
        write(tmp_path, f"{name}.parquet", pa.table({"text": [f"{name}{i}" for i in range(5)]}))
    rows = rows_of(spec(tmp_path, block_rows=2))

    assert [row["text"] for row in sorted(rows, key=lambda row: row[ROW_ID])] == [
        f"{n}{i}" for n in "ab" for i in range(5)
    ]


def test_small_files_share_a_block(tmp_path):
    """Whole and in order, never more than block_rows; where a block begins names it."""
    for name, rows in {"a.csv": "1\n2\n3\n", "b.csv": "4\n", "c.csv": "", "d.csv": "5\n", "e.csv": "6\n7\n"}.items():
        write(tmp_path, name, f"text\n{rows}")
    task = spec(tmp_path, block_rows=2)

    assert [(name, table["text"].to_pylist()) for name, table in blocks_of(task)] == [
        ("00000-000000000", ["1", "2"]),
        ("00000-000000002", ["3"]),
        ("00001-000000000", ["4", "5"]),
        ("00004-000000000", ["6", "7"]),
    ]
    assert [name for name, _ in blocks_of(task, {"00000-000000000", "00001-000000000"})] == [
        "00000-000000002",
        "00004-000000000",
    ]


def test_twenty_thousand_tiny_files_are_not_so_many_blocks(tmp_path):
    """Packed by the plan, without opening them again."""
    for i in range(300):
        write(tmp_path, f"{i:03d}.txt", "x\n" * 10)
    plan = make_plan(spec(tmp_path, block_rows=256), print)

    assert len(list(plan.blocks())) == 12
    assert next(plan.blocks()) == Block(tuple(range(25)), 0, 250)


def test_row_groups_that_are_done_are_not_read(tmp_path):
    """A block is read from the row groups that have its rows."""
    table = pa.table({"text": [str(i) for i in range(100)]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=7)
    task = spec(tmp_path, block_rows=10)
    done = {f"00000-{first:09d}" for first in range(0, 100, 10)} - {"00000-000000040", "00000-000000090"}

    assert [(name, t["text"].to_pylist()) for name, t in blocks_of(task, done)] == [
        (f"00000-{first:09d}", [str(i) for i in range(first, first + 10)]) for first in (40, 90)
    ]


@pytest.mark.parametrize("limit", [1, 5, 12, 4_999, 6_000])
def test_a_limit_is_the_first_rows_of_the_plan(tmp_path, limit):
    """For a trial; also where only reading tells how many rows a file has."""
    write(tmp_path, "a.parquet", pa.table({"text": [f"{i}" for i in range(10)]}))
    write(tmp_path, "b.txt", "".join(f"{i} {'x' * 20}\n" for i in range(5_000)))
    write(tmp_path, "c.txt", "last\n")
    task = spec(tmp_path, limit=limit, block_rows=4)

    assert len(texts_of(task)) == min(limit, 5_011)
    assert texts_of(task) == texts_of(spec(tmp_path, block_rows=4))[:limit]
    assert attempt(task).rows_in == min(limit, 5_011)


@given(
    sizes=st.lists(st.integers(0, 12), max_size=12),
    block_rows=st.integers(1, 7),
    limit=st.none() | st.integers(1, 40),
)
def test_blocks_have_every_row_once(sizes, block_rows, limit):
    """In order, none larger than it may be, each named by where it begins."""
    file = File("a.parquet", "parquet", None, 1, "v")
    fragments = [Fragment(number, file, rows) for number, rows in enumerate(sizes)]
    plan = Plan(fragments, pa.schema([]), Reading(), block_rows, limit)
    covered, names = [], []
    for block in plan.blocks():
        names.append(plan.name(block.fragments[0], block.first))
        if len(block.fragments) > 1:
            rows = [(number, row) for number in block.fragments for row in range(sizes[number])]
        else:
            rows = [(block.fragments[0], block.first + row) for row in range(block.rows)]
        assert len(rows) == block.rows <= block_rows
        covered += rows

    every = [(number, row) for number, rows in enumerate(sizes) for row in range(rows)]
    assert len(covered) == plan.rows == min(len(every), limit or len(every))
    assert covered == every[: len(covered)]
    assert names == sorted(set(names))


@pytest.mark.parametrize("replicas", [1, 8, 9, 25])
def test_stages_share_the_blocks(replicas, tmp_path):
    """Each block is one stage's, also where only reading tells how many there are, and where small files make one."""
    write(tmp_path, "a.parquet", pa.table({"text": [f"row {i}" for i in range(97)]}))
    write(tmp_path, "b.jsonl", "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(55)))
    for name in "cdef":
        write(tmp_path, f"{name}.parquet", pa.table({"text": [name]}))
    task = spec(tmp_path, block_rows=3)
    plan = make_plan(task, print)
    done = {"00000-000000009": 3}
    ref = REF.model_copy(update={"replicas": replicas})
    works = [Work(task, ref, plan, None, SimpleNamespace(done=done), stage) for stage in range(-(-replicas // 8))]
    shares = [[(name, rows.num_rows) for name, rows in work.left()] for work in works]

    assert {work.stages for work in works} == {len(works)}
    assert sum(rows for share in shares for _, rows in share) == 97 + 55 + 4 - 3
    names = [name for share in shares for name, _ in share]
    assert len(set(names)) == len(names)
    assert all(shares)


# --- what others left in a folder -------------------------------------------------------------------------------


def test_links_lead_to_their_files(tmp_path):
    """To a file, one with a suffix to one without, a folder, and a folder that has itself within."""
    write(tmp_path, "../blobs/1234", '{"text": "blob"}')
    write(tmp_path, "../others/c.jsonl", '{"text": "folder"}')
    write(tmp_path, "a.jsonl", '{"text": "own"}')
    (tmp_path / "in/b.jsonl").symlink_to("../blobs/1234")
    (tmp_path / "in/more").symlink_to("../others")
    (tmp_path / "others/again").symlink_to(".")

    assert texts_of(spec(tmp_path)) == ["own", "blob", "folder"]
    assert texts_of(spec(tmp_path, source=str(tmp_path / "in/*.jsonl"))) == ["own", "blob"]
    assert texts_of(spec(tmp_path, source=str(tmp_path / "in/b.jsonl"))) == ["blob"]


def test_a_link_to_nothing_is_named(tmp_path):
    """It is no file fewer."""
    write(tmp_path, "a.jsonl", '{"text": "x"}')
    (tmp_path / "in/b.jsonl").symlink_to("gone")

    with pytest.raises(BatchError, match=r"b\.jsonl"):
        texts_of(spec(tmp_path))


def test_a_name_may_have_brackets(tmp_path):
    """They are a pattern only where they match as one."""
    write(tmp_path, "a[1].jsonl", '{"text": "x"}')

    assert texts_of(spec(tmp_path, source=str(tmp_path / "in/a[1].jsonl"))) == ["x"]


@pytest.mark.parametrize("between", ["", "\n", " \r\n\n" + " " * 100])
def test_arrays_may_follow_each_other(tmp_path, monkeypatch, between):
    """All their rows are there, however they lie in what is read at a time."""
    monkeypatch.setattr(json_text, "_READ_CHARACTERS", 20)
    write(tmp_path, "a.jsonl", between.join(f'[{{"text": "{number}"}}]' for number in range(5)) + between)

    assert texts_of(spec(tmp_path)) == ["0", "1", "2", "3", "4"]


def test_a_glob_may_name_partitions(tmp_path):
    """All files of them are read, their columns are told, and nothing is written there."""
    for day in ("2026-01-01", "2026-01-02", "2025-12-31"):
        write(tmp_path, f"day={day}/a.jsonl", f'{{"text": "{day}"}}')
        write(tmp_path, f"day={day}/hour=1/a.jsonl", f'{{"text": "{day}"}}')
    source = str(tmp_path / "in/day=2026-*")

    rows = rows_of(spec(tmp_path, source=source))
    assert len(rows) == 4
    assert [row["day"] for row in rows] == [row["text"] for row in rows]
    with pytest.raises(BatchError, match="lies in its source"):
        rows_of(spec(tmp_path, source=source, output=str(tmp_path / "in/day=2026-01-03/out")))


def test_what_follows_an_array_is_not_left_out(tmp_path):
    """It would be rows that nobody misses."""
    write(tmp_path, "a.json", '[{"text": "x"}] {"text": "y"}')

    with pytest.raises(BatchError, match=r"a\.json.*what follows the array"):
        rows_of(spec(tmp_path))


@pytest.mark.parametrize("rows", [2, 20_000])
def test_blank_lines_before_a_header_are_read_over(tmp_path, rows):
    """In a file that is looked at as a whole, and in a larger one."""
    write(tmp_path, "a.csv", "\n\r\ntext,n\n" + "x,1\n" * rows)

    assert texts_of(spec(tmp_path)) == ["x"] * rows


def test_rows_without_any_column_lack_what_is_asked_for(tmp_path):
    """The message names the column."""
    write(tmp_path, "a.jsonl", "{}\n{}\n")

    with pytest.raises(BatchError, match="no column 'text'; it has none"):
        rows_of(spec(tmp_path))


@pytest.mark.parametrize("name", ["b.jsonl", "b.csv"])
def test_an_empty_file_needs_no_ids(tmp_path, name):
    """Nor has it a column for them."""
    write(tmp_path, "a.jsonl", '{"text": "x", "n": 1}')
    write(tmp_path, name, "")

    assert [row[ROW_ID] for row in rows_of(spec(tmp_path, id_column="n"))] == ["1"]


@pytest.mark.parametrize(
    ("in_json", "in_parquet", "values"),
    [
        ('{"k": 1}', pa.array([{"k": 2}]), ['{"k": 1}', '{"k": 2}']),
        ('[1, "a"]', pa.array([[2]]), ['[1, "a"]', "[2]"]),
        ('[{"k": 1}]', pa.array([[{"k": 2}]]), ['[{"k": 1}]', '[{"k": 2}]']),
        ('{"k": 1}', pa.array(["s"], pa.large_string()), ['{"k": 1}', "s"]),
        ("0.1", pa.array([1234567890123456], pa.decimal128(20, 2)), ["0.1", "1234567890123456.00"]),
    ],
)
def test_json_beside_other_types_stays_as_it_is_written(tmp_path, in_json, in_parquet, values):
    """And the others become text, in which nothing of them is lost."""
    write(tmp_path, "a.jsonl", f'{{"text": "x", "n": {in_json}}}')
    write(tmp_path, "b.parquet", pa.table({"text": ["y"], "n": in_parquet}))

    assert [row["n"] for row in rows_of(spec(tmp_path))] == values


def test_types_that_would_change_a_value_are_refused(tmp_path):
    """When the files are looked at: decimals beside doubles, a number that no double holds.

    Whether the footer tells what is greatest, or only reading does.
    """
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], "n": [0.5]}))
    write(tmp_path, "b.parquet", pa.table({"text": ["x"], "n": pa.array([1], pa.decimal128(20, 2))}))
    with pytest.raises(BatchError, match="no one type holds both"):
        make_plan(spec(tmp_path), print)

    for statistics in (True, False):
        table = pa.table({"text": ["x"] * 3, "n": [1, 2**53 + 1, None]})
        pq.write_table(table, tmp_path / "in/b.parquet", row_group_size=1, write_statistics=statistics)
        with pytest.raises(BatchError, match=r"b\.parquet.*column 'n' is int64 here and double.*columns="):
            make_plan(spec(tmp_path), print)
        assert make_plan(spec(tmp_path, columns=["text"]), print).rows == 4
        pq.write_table(table.slice(2), tmp_path / "in/b.parquet", write_statistics=statistics)
        assert rows_of(spec(tmp_path))[-1]["n"] is None

    (tmp_path / "in/b.parquet").unlink()
    write(tmp_path, "b.jsonl", '{"text": "x", "n": 9007199254740993}')
    with pytest.raises(BatchError, match=r"b\.jsonl.*column 'n' is int64 here and double"):
        make_plan(spec(tmp_path), print)


def test_text_is_not_read_for_the_plan(tmp_path, monkeypatch):
    """Nor are other columns that the common type always holds."""
    columns = {
        "text": ["x"],
        "n": pa.array([1], pa.int32()),
        "l": [["x"]],
        "b": [b"x"],
        "f": pa.array([1.5], pa.float32()),
    }
    wide = {
        "text": pa.large_string(),
        "n": pa.float64(),
        "l": pa.list_(pa.large_string()),
        "b": pa.large_binary(),
        "f": pa.float64(),
    }
    write(tmp_path, "a.parquet", pa.table(columns))
    write(tmp_path, "b.parquet", pa.table(columns).cast(pa.schema(wide)))
    monkeypatch.setattr("airflow_provider_raylm.cluster.batch.columns.samples", pytest.fail)

    assert make_plan(spec(tmp_path), print).rows == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([[0.5]]), pa.array([[2**53 + 1]])),
        (pa.array([-1]), pa.array([2**64 - 1], pa.uint64())),
        (pa.array([1], pa.decimal128(20, 2)), pa.array([-(10**18)])),
        (pa.array([1], pa.timestamp("ns")), pa.array([-(10**10)], pa.timestamp("s"))),
        (pa.array([1], pa.duration("ns")), pa.array([10**10], pa.duration("s"))),
        (pa.array([1], pa.timestamp("ns")), pa.array([-(10**6)], pa.date32())),
    ],
    ids=lambda array: str(array.type),
)
def test_a_value_that_the_common_type_cannot_hold_is_refused_in_the_plan(tmp_path, one, other):
    """Before a row of an earlier file is paid for."""
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], "n": one}))
    write(tmp_path, "b.parquet", pa.table({"text": ["x"], "n": other}))
    with pytest.raises(BatchError, match="the column 'n'"):
        make_plan(spec(tmp_path), print)


def test_json_that_is_mixed_keeps_numbers_that_are_none(tmp_path):
    """As JSON's writers write them."""
    write(tmp_path, "a.jsonl", '{"text": NaN}\n{"text": -Infinity}\n{"text": "x"}\n')

    assert texts_of(spec(tmp_path)) == ["NaN", "-Infinity", "x"]


def test_bytes_that_are_text_are_asked_as_such(tmp_path):
    """As Hive and older Sparks write text; others fail their row."""
    write(tmp_path, "a.parquet", pa.table({"text": pa.array([b"gr\xc3\xb6\xc3\x9fe", b"\xff"])}))
    asked = []

    def ask(fields, prompts):
        asked.extend(prompts)
        return shouts(fields, prompts)

    report = attempt(spec(tmp_path, max_failed_fraction=1), ask=ask)
    assert asked == ["größe"]
    assert report.failures == {"unreadable_value": 1}


def unchanged(row):
    return row


def test_a_row_function_may_leave_a_map_as_it_is(tmp_path):
    """No type is inferred of what it did not make."""
    kind = pa.map_(pa.string(), pa.int64())
    write(tmp_path, "a.parquet", pa.table({"text": ["x"], "n": pa.array([[("a", 1)]], kind)}))
    report = attempt(spec(tmp_path, postprocess="tests.unit.test_source:unchanged"))

    assert report.failures == {}
    (part,) = (tmp_path / "out").glob("part-*")
    assert pq.read_table(part)["n"].to_pylist() == [[("a", 1)]]
