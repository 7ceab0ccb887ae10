"""Answers of a type: from a schema to Arrow, from a text to a value, and to a file and back."""

import asyncio
import datetime
import io
import json
import math
import sys
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, WithJsonSchema, create_model, field_serializer, field_validator

from airflow_provider_raylm.cluster.batch.encoding import encode
from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.rows import EngineTraits, compile_step
from airflow_provider_raylm.cluster.batch.rows.arrow_types import shape_of
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer
from airflow_provider_raylm.errors import BatchError, SpecError
from airflow_provider_raylm.specs import BatchSpec, Step

REVIEW = {
    "type": "object",
    "properties": {
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "topics": {"type": "array", "items": {"type": "string"}},
        "bought": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
    },
    "required": ["stars", "topics"],
    "additionalProperties": False,
}


class Person(BaseModel):
    """What a pydantic model may have."""

    name: str
    age: int | None = None
    friends: list["Person"] = []


class Order(BaseModel):
    """With a date, and a model within."""

    day: datetime.date
    buyer: Person
    amount: float


class Rate(BaseModel):
    """Whose own code fails of some answers."""

    share: int

    @field_validator("share")
    @classmethod
    def _of_hundred(cls, value):
        return 100 // value


class Odd(BaseModel):
    """Whose values are other than its schema says."""

    count: Annotated[int, WithJsonSchema({"type": "string"})] = 1


class Size(BaseModel):
    """Whose values some of its answers make other than its schema says."""

    size: int

    @field_serializer("size")
    def _sized(self, value):
        return f"{value} m" if value > 1 else value


ONE = {"properties": {"a": {"type": "integer"}}}
TWO = {"properties": {"b": {"type": "integer"}}}
ONE_STRUCT = pa.struct([("a", pa.int64())])
Word = str
HERE = "tests.unit.test_typed_answers"


@pytest.mark.parametrize(
    ("schema", "arrow"),
    [
        ({"type": "string"}, pa.string()),
        ({"type": "integer"}, pa.int64()),
        ({"type": ["number", "null"]}, pa.float64()),
        ({"type": ["integer", "number"]}, pa.float64()),
        ({"type": "boolean"}, pa.bool_()),
        ({"enum": ["a", "b", None]}, pa.string()),
        ({"enum": [1, 2]}, pa.int64()),
        ({"enum": [1, "a"]}, pa.string()),
        ({"const": True}, pa.bool_()),
        ({"type": "string", "format": "date"}, pa.date32()),
        ({"type": "string", "format": "date-time"}, pa.timestamp("us", "UTC")),
        ({"type": "array", "items": {"type": "integer"}}, pa.list_(pa.int64())),
        ({"type": "array"}, pa.string()),
        ({"type": "array", "prefixItems": [{"type": "integer"}]}, pa.string()),
        ({"type": "object"}, pa.string()),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, pa.string()),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, pa.string()),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64()),
        ({"anyOf": [{"type": "integer"}, {"type": "null", "title": "None", "default": None}]}, pa.int64()),
        ({"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"const": None}}}, pa.int64()),
        ({"anyOf": [{"type": "null"}]}, pa.string()),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, pa.float64()),
        ({"anyOf": [{"type": "array", "items": one} for one in ({"type": "string"}, {"type": "object"})]}, pa.string()),
        (
            {"anyOf": [{"type": "array", "items": {"type": "string"}, "maxItems": n} for n in (1, 3)]},
            pa.list_(pa.string()),
        ),
        (
            {"anyOf": [{"properties": {"a": one}} for one in ({"type": "object"}, {"type": "string"})]},
            pa.string(),
        ),
        ({"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"type": "integer"}}}, pa.int64()),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "boolean"}}}, pa.bool_()),
        ({"properties": {"a": {"$ref": "#"}, "b": {"type": "integer"}}}, None),
        ({"$ref": "https://elsewhere"}, pa.string()),
        ({"$ref": "#/$defs/x", "description": "d", "type": "object", "$defs": {"x": ONE}}, ONE_STRUCT),
        ({"$ref": "#/$defs/x", "properties": {"b": True}, "$defs": {"x": ONE}}, pa.string()),
        ({"$ref": "#/$defs/x", "additionalProperties": {"type": "string"}, "$defs": {"x": ONE}}, pa.string()),
        ({"$ref": "#/$defs/x", "unevaluatedProperties": False, "$defs": {"x": ONE}}, ONE_STRUCT),
        ({"$ref": "#/$defs/x", "anyOf": [{"required": ["b"]}], "$defs": {"x": ONE}}, pa.string()),
        ({"$ref": "#/$defs/x", "items": TWO, "$defs": {"x": {"items": ONE}}}, pa.string()),
        ({"allOf": [ONE], "anyOf": [TWO]}, pa.string()),
        ({"anyOf": [ONE], "oneOf": [TWO]}, pa.string()),
        ({"anyOf": [ONE], "additionalProperties": True}, pa.string()),
        ({"$dynamicRef": "#x", **ONE}, pa.string()),
        ({**ONE, "unevaluatedProperties": False}, ONE_STRUCT),
        ({**ONE, "additionalProperties": {}}, pa.string()),
        (True, pa.string()),
        ({}, pa.string()),
        (
            REVIEW,
            pa.struct([("stars", pa.int64()), ("topics", pa.list_(pa.string())), ("bought", pa.date32())]),
        ),
    ],
)
def test_a_schema_has_an_arrow_type(schema, arrow):
    """What has no one type is JSON text; what holds itself is so one level down."""
    found = shape_of(schema).type
    assert found == (arrow or pa.struct([("a", pa.struct([("a", pa.string()), ("b", pa.int64())])), ("b", pa.int64())]))


def read(text, **step):
    """Return the value that an answer's text is, or its refusal."""
    read = compile_step(Step(prompt="x", **step), EngineTraits("m")).read(Answer(text, "stop", 1, 1))
    return read if isinstance(read, Refusal) else read["response"]


def test_an_answer_is_a_value_of_its_schema():
    """Dates are dates; what may be left out is null."""
    answer = '{"stars": 4, "topics": ["fit"], "bought": "2026-02-03"}'

    assert read(answer, output_schema=REVIEW) == {
        "stars": 4,
        "topics": ["fit"],
        "bought": datetime.date(2026, 2, 3),
    }
    assert read('{"stars": 4, "topics": []}', output_schema=REVIEW)["bought"] is None
    times = {"type": "string", "format": "date-time"}
    assert read('"2026-02-03T12:00:00+02:00"', output_schema=times).hour == 10
    assert read('"2026-02-03T12:00:00"', output_schema=times).tzinfo is datetime.UTC
    assert read('"2026-02-03t12:00:00.123456000z"', output_schema=times).microsecond == 123456
    both = {"$ref": "#/$defs/one", **TWO, "$defs": {"one": ONE}}
    assert json.loads(read('{"a": 1, "b": 2}', output_schema=both)) == {"a": 1, "b": 2}
    assert read('{"b": [1, "é"]}', output_schema={"type": "object"}) == '{"b": [1, "é"]}'
    lists = [{"type": "array", "items": {"type": kind}} for kind in ("string", "object")]
    assert read('["a"]', output_schema={"anyOf": lists}) == '["a"]'
    assert read('[{"a": 1}]', output_schema={"anyOf": lists}) == '[{"a": 1}]'
    assert read('"a\tb"', output_schema={"type": "string"}) == "a\tb"
    assert read('"a\tb"', output_schema=f"{HERE}:Word") == "a\tb"


@pytest.mark.parametrize(
    ("text", "schema", "words"),
    [
        ('{"stars": 4, "topics": [', REVIEW, "no JSON"),
        ('{"stars": 6, "topics": []}', REVIEW, "stars: 6 is greater than the maximum of 5"),
        ('{"stars": 4}', REVIEW, "'topics' is a required property"),
        ('{"stars": 4, "topics": [], "more": 1}', REVIEW, "'more'"),
        ('{"stars": 4, "topics": [], "bought": "tomorrow"}', REVIEW, "bought"),
        ("NaN", {"type": "number"}, "NaN"),
        ('"2026-01-01T00:00:00.123456789Z"', {"type": "string", "format": "date-time"}, "finer than a microsecond"),
        (str(2**63), {"type": "integer"}, "64 bits"),
        (r'"\ud800"', {"type": "string"}, "surrogate"),
        ('{"a": 1, "b": 2}', {"properties": {"a": {"type": "integer"}}}, "'b' is none of a"),
        ("[" * 100_000, {"type": "array"}, "no JSON"),
        ("1e400", {"type": "number", "multipleOf": 2}, "1e400 is more than a double holds"),
        ("1" + "0" * 400, {"type": "number", "multipleOf": 0.5}, "OverflowError"),
        ("5", {"properties": {"a": {"type": "integer"}}}, "5 is no object"),
        ("5", {"items": {"type": "integer"}}, "5 is no array"),
        ('{"day": "2026-01-01", "buyer": {}, "amount": 1}', f"{HERE}:Order", "buyer.name: Field required"),
        ('{"share": 0}', f"{HERE}:Rate", "ZeroDivisionError"),
        ("{}", f"{HERE}:Odd", "1 is no string"),
        ('{"size": 2}', f"{HERE}:Size", "'2 m' is no integer"),
    ],
)
def test_an_answer_that_does_not_fit_says_why(text, schema, words):
    """In words that the model can be told, too."""
    refusal = read(text, output_schema=schema)

    assert refusal.reason == "invalid_output"
    assert words in refusal.message


def test_an_answer_may_be_nested_deeper_than_its_schema_is_followed():
    """It does not fit, as others; how deep that is, any library of the process may have set."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000)
    try:
        refusal = read("[" * 600 + "]" * 600, output_schema={"type": "array", "items": {"$ref": "#"}})
    finally:
        sys.setrecursionlimit(limit)

    assert refusal.reason == "invalid_output"
    assert "nested too deep" in refusal.message


def test_a_pydantic_model_is_a_schema():
    """The engine is held to it, the answer is checked by it, and what it makes of the answer is written."""
    step = compile_step(Step(prompt="x", output_schema=f"{HERE}:Order"), EngineTraits("m"))
    text = '{"day": "2026-01-01", "buyer": {"name": "A", "age": "5", "friends": [{"name": "B"}]}, "amount": 2}'
    value = step.read(Answer(text, "stop", 1, 1))["response"]

    assert json.loads(step.question)["fields"]["structured_outputs"]["json"] == Order.model_json_schema()
    assert value["day"] == datetime.date(2026, 1, 1)
    assert (value["buyer"]["age"], value["amount"]) == (5, 2.0)
    assert pa.array([value], step.columns[0].type).to_pylist() == [value]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, "output_schema.type: 'objekt'"),
        ("no.such:Model", "output_schema: cannot import no.such:Model"),
        (f"{HERE}:HERE", "output_schema: .* is no type that pydantic knows"),
        ({"items": {"$ref": "#/$defs/none"}}, r"output_schema: its \$ref '#/\$defs/none' leads nowhere"),
        ({"$ref": "https://elsewhere"}, "'https://elsewhere' leads nowhere"),
        ({"$ref": "#/definitions/a", "definitions": {"a": {"$ref": "#/b"}}}, "'#/b' leads nowhere"),
        ({"$ref": "#/title", "title": "a"}, "'#/title' leads to no schema, but 'a'"),
    ],
)
def test_a_schema_that_is_none_ends_the_task(schema, words):
    """Before anything is asked."""
    with pytest.raises(BatchError, match=words):
        compile_step(Step(prompt="x", output_schema=schema), EngineTraits("m"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"response_format": "json_object"}, r"extra_body\.response_format: expected an object, .* got 'json_object'"),
        ({"response_format": {"json_schema": "x"}}, r"extra_body\.response_format\.json_schema: expected an object"),
        ({"response_format": {"json_schema": {"schema": 5}}}, r"extra_body\.response_format\.json_schema\.schema: "),
        ({"structured_outputs": [1]}, r"extra_body\.structured_outputs: expected an object"),
        ({"structured_outputs": {"json": "{not"}}, r"extra_body\.structured_outputs\.json: .* is no JSON"),
        ({"structured_outputs": {"json": {"$schema": []}}}, r"\.json\.\$schema: expected the address of a dialect"),
        ({"structured_outputs": {"json": {"type": "objekt"}}}, r"extra_body\.structured_outputs\.json\.type: 'objekt'"),
    ],
)
def test_a_field_of_vllm_that_is_none_is_named(body, words):
    """Before anything is asked."""
    with pytest.raises(BatchError, match=words):
        compile_step(Step(prompt="x", extra_body=body), EngineTraits("m"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"output_schema": REVIEW, "choice": ["a"]}, "choice: the answer is held to output_schema already"),
        ({"choice": ["a"], "extra_body": {"response_format": {}}}, "extra_body.response_format: .*held to choice"),
        ({"output_schema": "Review"}, "output_schema: expected a JSON Schema or package.module:Model"),
        ({"regex": "("}, "regex: "),
        ({"reasks": 2}, "reasks: only for answers that are held to"),
        ({"keep": ["reasoning"]}, "keep: 'reasoning' is a chat's"),
        ({"extra_body": {"logprobs": 3}}, r"extra_body.logprobs: its result would be dropped; add keep=\['logprobs'\]"),
        ({"extra_body": {"tools": []}}, "tool_calls"),
        ({"extra_body": {"prompt_logprobs": 1}}, "has no column"),
        ({"max_tokens": "many"}, "max_tokens: Input should be a valid integer"),
        ({"temperature": "${a} ${b}"}, "temperature: Input should be a valid number"),
        ({"n": "${n}"}, "n: Input should be a valid integer"),
    ],
)
def test_what_contradicts_itself_is_refused_when_built(fields, words):
    """With the field to change."""
    with pytest.raises(SpecError, match=words):
        Step(prompt="x", **fields)


def asked(answers, **step):
    """Ask one row of a task; return what came, and what was asked."""
    spec = BatchSpec(source="in", output="out", prompt="${a}", **step)
    said = iter(answers)
    requests = []

    async def ask(question, asked, near):
        requests.extend(asked)
        return [next(said) for _ in asked]

    table = pa.table({"a": ["Which?"], ROW_ID: ["0"]})
    return asyncio.run(BlockAnswerer(spec, EngineTraits("m"), ask).answer(table, "block")), requests


def test_an_answer_that_does_not_fit_is_asked_for_again():
    """With what is wrong; all tokens are counted, and the row is one row."""
    answers = [Answer("6", "stop", 2, 3), Answer("5", "stop", 4, 1)]
    came, requests = asked(answers, output_schema=REVIEW["properties"]["stars"])

    assert came.rows["response"].to_pylist() == [5]
    assert came.rows["raylm_completion_tokens"].to_pylist() == [4]
    assert (came.counts["reasked"], came.counts["prompt_tokens"]) == (1, 6)
    assert requests[0].content == "Which?"
    assert requests[1].content.startswith("Which?6\n\nThat answer is not valid: 6 is greater than the maximum of 5.")


def test_of_several_answers_the_model_is_shown_the_invalid_one():
    """Else it would be told that a valid one is not."""
    answers = [Answer(["5", "6", "7"], "stop", 1, 3), Answer(["5", "4", "3"], "stop", 1, 3)]
    came, requests = asked(answers, output_schema=REVIEW["properties"]["stars"], n=3)

    assert came.rows["response"].to_pylist() == [[5, 4, 3]]
    assert requests[1].content.startswith("Which?6\n\nThat answer is not valid: 6 is greater")


def test_a_row_without_a_valid_answer_fails_in_the_end():
    """What was paid for it is counted."""
    came, requests = asked([Answer("6", "length", 1, 1)] * 3, output_schema={"type": "string"}, reasks=2)

    assert came.failed["raylm_reason"].to_pylist() == ["invalid_output"]
    assert came.failed["raylm_message"].to_pylist() == ["it was cut off at max_tokens"]
    assert (len(requests), came.counts["completion_tokens"], came.counts["cut_off"]) == (3, 3, 3)


def test_a_message_that_quotes_half_a_character_is_written():
    """Escaped: the message of one row must not fail the file."""
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    came, _ = asked([Answer(r'{"\ud800": "a"}', "stop", 1, 1)] * 2, output_schema=schema)

    assert came.failed["raylm_message"].to_pylist() == [r"\ud800: 'a' is not of type 'integer'"]


SCALARS = st.sampled_from(
    [
        ({"type": "string"}, st.text(st.characters(exclude_categories=["Cs"]))),
        ({"type": "integer"}, st.integers(-(2**63), 2**63 - 1)),
        ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False)),
        ({"type": "boolean"}, st.booleans()),
        ({"type": ["integer", "null"]}, st.none() | st.integers(-9, 9)),
        ({"enum": ["a", "b"]}, st.sampled_from("ab")),
        ({"type": "string", "format": "date"}, st.dates().map(str)),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, st.text("xyz") | st.integers(0, 9)),
        ({"type": "object"}, st.dictionaries(st.text("ab", min_size=1), st.integers(0, 9))),
    ]
)


def _within(inner):
    lists = inner.map(lambda one: ({"type": "array", "items": one[0]}, st.lists(one[1], max_size=3)))
    objects = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3).map(
        lambda members: (
            {"type": "object", "properties": {name: one[0] for name, one in members.items()}},
            st.fixed_dictionaries({}, optional={name: one[1] for name, one in members.items()}),
        )
    )
    optional = inner.map(lambda one: ({"anyOf": [one[0], {"type": "null"}]}, st.none() | one[1]))
    return lists | objects | optional


def _by_reference(schema, chance):
    """Return a schema that says the same, by references here and there."""
    defined = {}

    def moved(part):
        part = {
            word: {name: moved(one) for name, one in value.items()}
            if word == "properties"
            else [moved(one) for one in value]
            if word == "anyOf"
            else moved(value)
            if word == "items"
            else value
            for word, value in part.items()
        }
        if chance.random() < 0.5:
            return part
        name = f"a/{len(defined)}"
        defined[name] = part
        return {"$ref": f"#/$defs/{name.replace('/', '~1')}", "description": "By reference."}

    return {**moved(schema), "$defs": defined}


@settings(max_examples=150, deadline=None)
@given(st.recursive(SCALARS, _within, max_leaves=6), st.randoms(use_true_random=False), st.data())
def test_any_value_of_any_schema_comes_back_from_a_file(case, chance, data):
    """As the answer had it: what a property may leave out is null, and a union is its JSON text."""
    schema, values = case
    told = data.draw(st.lists(values, min_size=1, max_size=4))
    back = _written([json.dumps(value) for value in told], _by_reference(schema, chance))

    assert all(_same(one, value, schema) for one, value in zip(back, told, strict=True))
    assert shape_of(_by_reference(schema, chance)) == shape_of(schema)


TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "first": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                "others": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
            },
            "required": ["name", "others"],
        }
    },
}
TREES = st.recursive(
    st.builds(dict, name=st.text("xyz"), others=st.just([])),
    lambda inner: st.builds(dict, name=st.text("xyz"), first=st.none() | inner, others=st.lists(inner, max_size=2)),
    max_leaves=4,
)


@settings(max_examples=30, deadline=None)
@given(TREES)
def test_a_value_that_holds_itself_comes_back_from_a_file(tree):
    """One level down as JSON text, at any depth."""
    (back,) = _written([json.dumps(tree)], TREE)
    first = back["first"] and json.loads(back["first"])

    assert {**back, "first": first, "others": list(map(json.loads, back["others"]))} == {"first": None, **tree}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PERSONS = st.builds(Person, name=TEXTS, age=st.none() | st.integers(0, 99), friends=st.just([]))
FIELDS = st.sampled_from(
    [
        (int, st.integers(-(2**63), 2**63 - 1), None),
        (float, st.floats(allow_nan=False, allow_infinity=False), None),
        (str, TEXTS, None),
        (bool | None, st.none() | st.booleans(), None),
        (Literal["a", "b"], st.sampled_from("ab"), None),
        (datetime.date, st.dates(), None),
        (datetime.datetime, st.datetimes(timezones=st.just(datetime.UTC)), None),
        (list[int], st.lists(st.integers(0, 9)), None),
        (dict[str, int], st.dictionaries(TEXTS, st.integers(0, 9)), json.loads),
        (int | str, st.integers(0, 9) | st.text("ab"), json.loads),
        (Person | None, st.none() | PERSONS, None),
        (list[Person], st.lists(PERSONS, max_size=2), None),
    ]
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), FIELDS, min_size=1), st.data())
def test_any_value_of_a_pydantic_model_comes_back_from_a_file(fields, data):
    """As the model had it: what has no one type is JSON text."""
    global Drawn
    Drawn = create_model("Drawn", **{name: kind for name, (kind, *_) in fields.items()})
    told = Drawn.model_construct(**{name: data.draw(values) for name, (_, values, _) in fields.items()})
    (back,) = _written([told.model_dump_json()], f"{HERE}:Drawn")

    found = {name: loads(back[name]) if loads else back[name] for name, (_, _, loads) in fields.items()}
    assert found == told.model_dump()


def _written(texts, schema):
    """Return what a file has of answers with these texts."""
    step = compile_step(Step(prompt="x", output_schema=schema), EngineTraits("m"))
    read = [step.read(Answer(text, "stop", 1, 1))["response"] for text in texts]
    return _of_parquet(encode(pa.table({"response": pa.array(read, step.columns[0].type)}), "parquet"))


def _of_parquet(content):
    return pq.read_table(io.BytesIO(content))["response"].to_pylist()


def _same(found, told, schema):
    """Say whether a value from a file is what an answer said."""
    if found is None or told is None:
        return found is None and told is None
    if "anyOf" in schema and {"type": "null"} in schema["anyOf"]:
        return _same(found, told, schema["anyOf"][0])
    kind = schema.get("type")
    if "anyOf" in schema or (kind == "object" and "properties" not in schema):
        return json.loads(found) == told
    if kind == "object":
        members = schema["properties"]
        return set(found) == set(members) and all(_same(found[n], told.get(n), members[n]) for n in members)
    if kind == "array":
        return len(found) == len(told) and all(_same(a, b, schema["items"]) for a, b in zip(found, told, strict=True))
    if kind == "number":
        return math.isclose(found, told)
    return str(found) == told if schema.get("format") == "date" else found == told
