"""Templates are text with holes; data is never evaluated."""

import json

import numpy as np
import pytest

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request, RowError
from airflow_provider_raylm.cluster.batch.rows import EngineTraits, compile_step
from airflow_provider_raylm.cluster.batch.rows.templates import compile_template
from airflow_provider_raylm.cluster.batch.rows.values import missing_columns
from airflow_provider_raylm.specs import Step
from airflow_provider_raylm.specs.per_row import placeholders


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("${a}", "A"),
        ("x ${a} y ${b}${a}", "x A y ${a}A"),
        ("$5 and $a and {a} and $ {a}", "$5 and $a and {a} and $ {a}"),
        ("$${a} is a placeholder, ${a} a value", "${a} is a placeholder, A a value"),
        ("${}", "${}"),
        ("${n} ${list} ${yes}", '1.5 ["é", null] True'),
        ("${odd name!}", "odd"),
    ],
)
def test_render(template, expected):
    """Only the braced form is a placeholder, and a value is never looked at for more."""
    row = {"a": "A", "b": "${a}", "n": 1.5, "list": ["é", None], "yes": True, "odd name!": "odd"}

    assert expected == compile_template(template)(row)


def test_a_null_is_a_row_error():
    """A prompt that says "None" would be paid for and useless."""
    with pytest.raises(RowError, match="column 'a' is null") as error:
        compile_template("${a}")({"a": None})

    assert error.value.refusal.reason == "null_value"


@pytest.mark.parametrize("step", [Step(prompt="${a}"), Step(messages=[{"role": "user", "content": "${a}"}])])
def test_an_empty_prompt_is_a_row_error(step):
    """White space is no question either."""
    with pytest.raises(RowError) as error:
        compile_step(step, EngineTraits("m")).request({"a": " \n"})

    assert error.value.refusal.reason == "empty_prompt"


def test_what_all_rows_share_is_said_once():
    """The model and how to sample, as an OpenAI request without a question; the question is the row's own."""
    step = Step(
        prompt="Say ${a}",
        max_tokens=4,
        temperature=0,
        stop=["."],
        truncate_prompt_tokens=9,
        truncation_side="left",
        extra_body={"priority": 1},
    )

    question = compile_step(step, EngineTraits("m"))

    assert json.loads(question.question) == {
        "kind": "completion",
        "fields": {
            "model": "m",
            "max_tokens": 4,
            "temperature": 0,
            "stop": ["."],
            "truncate_prompt_tokens": 9,
            "truncation_side": "left",
            "priority": 1,
        },
        "keep": [],
    }
    assert question.request({"a": 'quote " and \ud800'}) == Request('Say quote " and \ud800', "")


def test_a_chat_request_keeps_roles_and_order():
    """Each message is its own template."""
    step = Step(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "${a}?"}])

    assert compile_step(step, EngineTraits("m")).request({"a": "Why"}).content == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"prompt": "x"}, {"logprobs": 0}),
        ({"prompt": "x", "extra_body": {"logprobs": 5}}, {"logprobs": 5}),
        ({"messages": "${a}"}, {"logprobs": True, "top_logprobs": 0}),
        ({"messages": "${a}", "extra_body": {"top_logprobs": 5}}, {"logprobs": True, "top_logprobs": 5}),
        ({"messages": "${a}", "extra_body": {"logprobs": True}}, {"logprobs": True, "top_logprobs": 0}),
    ],
)
def test_log_probabilities_are_asked_for_as_each_api_has_it(fields, asked):
    """Of the tokens alone, unless the author says how many others."""
    fields = json.loads(compile_step(Step(**fields, keep=["logprobs"]), EngineTraits("m")).question)["fields"]

    assert {name: fields[name] for name in fields if "logprobs" in name} == asked


def test_columns_of_earlier_steps_count_as_present():
    """A step may use what the steps before it produced, not what later ones do."""
    steps = [Step(prompt="${a} ${c}", output_column="b"), Step(prompt="${b} ${d}", output_column="c")]

    assert missing_columns(steps, ["a"]) == ["c", "d"]
    assert placeholders("${b} $${x} ${b}") == ["b", "b"]


def test_the_whole_answer_is_a_list_of_answers():
    """Of several answers each is one; what is kept of them, too."""
    question = compile_step(Step(prompt="${a}", n=2, keep=["token_ids"]), EngineTraits("m"))
    answer = Answer(["x", "y"], "stop", 1, 4, extra={"token_ids": [[1, 2], [3, 4]]})

    assert question.read(answer) == {"response": ["x", "y"], "response_token_ids": [[1, 2], [3, 4]]}
    assert [str(column.type) for column in question.columns] == ["list<item: string>", "list<item: list<item: int32>>"]
    assert json.loads(question.question)["fields"]["n"] == 2


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], [("user", "Hi")]),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}], [("user", "Hi"), ("assistant", "Yes?")]),
        ('[{"from": "system", "value": "s"}, {"role": "user", "content": "Hi"}]', [("system", "s"), ("user", "Hi")]),
        ([{"role": "user", "content": "Hi", "from": None, "value": None, "tool_calls": None}], [("user", "Hi")]),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [("user", [{"type": "text", "text": "Hi"}])]),
        (
            ({"role": "user", "content": ({"type": "text", "text": "Hi"},)},),
            [("user", [{"type": "text", "text": "Hi"}])],
        ),
        (np.array([{"role": "user", "content": "Hi", "tool_calls": np.array([])}]), [("user", "Hi")]),
    ],
)
def test_a_row_brings_its_conversation(turns, expected):
    """As structs of a column, with ShareGPT's names, as JSON text, or as a row function has it."""
    whole = compile_step(Step(messages="${talk}"), EngineTraits("m")).request({"talk": turns}).content
    mixed = compile_step(Step(messages=[{"role": "system", "content": "Be ${how}."}, "${talk}"]), EngineTraits("m"))

    assert whole == [{"role": role, "content": content} for role, content in expected]
    assert mixed.request({"talk": turns, "how": "brief"}).content == [
        {"role": "system", "content": "Be brief."},
        *whole,
    ]


@pytest.mark.parametrize(
    ("turns", "reason", "words"),
    [
        (None, "null_value", "column 'talk' is null"),
        ([], "empty_prompt", "empty"),
        ("Hi", "invalid_conversation", "no JSON"),
        ("[" * 100_000, "invalid_conversation", "nested too deep"),
        ('{"role": "user"}', "invalid_conversation", "no list"),
        (["Hi"], "invalid_conversation", "turn 0 is no object"),
        ([{"content": "Hi"}], "invalid_conversation", "turn 0 has no role"),
        ([{"role": "user"}], "invalid_conversation", "turn 0 has no content"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "invalid_conversation", "neither text nor an image"),
        ([{"role": "user", "content": 5}], "invalid_conversation", "neither text"),
    ],
)
def test_what_is_no_conversation_is_one_rows_fault(turns, reason, words):
    """A part that names a place is never handed to the engine, which would fetch it on the row's word."""
    with pytest.raises(RowError, match=words) as error:
        compile_step(Step(messages="${talk}"), EngineTraits("m")).request({"talk": turns})

    assert error.value.refusal.reason == reason


def test_a_row_tells_its_own_sampling():
    """Only what each row tells is its own; what its column holds is checked as the field is."""
    step = Step(prompt="${a}", max_tokens="${budget}", temperature=0.5, stop="${ends}")
    question = compile_step(step, EngineTraits("m"))

    assert json.loads(question.question)["fields"] == {"model": "m", "temperature": 0.5}
    request = question.request({"a": "x", "budget": 7, "ends": ["."]})
    styled = compile_step(Step(prompt="${a}", adapter="${style}"), EngineTraits("m"))
    assert styled.request({"a": "x", "style": "legal"}).overrides == '{"model": "legal"}'
    assert (
        json.loads(compile_step(Step(prompt="x", adapter="legal"), EngineTraits("m")).question)["fields"]["model"]
        == "legal"
    )
    assert json.loads(request.overrides) == {"max_tokens": 7, "stop": ["."]}
    assert step.columns_used == {"a", "budget", "ends"}


@pytest.mark.parametrize(
    ("budget", "reason", "words"),
    [
        (None, "null_value", "column 'budget' is null"),
        (0, "invalid_parameter", "max_tokens from column 'budget': .*greater than or equal to 1"),
        ("many", "invalid_parameter", "max_tokens from column 'budget': .*integer"),
    ],
)
def test_a_bad_parameter_is_one_rows_fault(budget, reason, words):
    """Its neighbours have good ones."""
    with pytest.raises(RowError, match=words) as error:
        compile_step(Step(prompt="x", max_tokens="${budget}"), EngineTraits("m")).request({"budget": budget})

    assert error.value.refusal.reason == reason


@pytest.mark.parametrize("ends", [["a", "b"], ("a", "b"), np.array(["a", "b"]), '["a", "b"]', ' ["a", "b"]'])
def test_a_rows_list_is_its_json_text_too(ends):
    """As an author's is: in CSV and text there is no other way to write one."""
    request = compile_step(Step(prompt="x", stop="${ends}"), EngineTraits("m")).request({"ends": ends})

    assert json.loads(request.overrides) == {"stop": ["a", "b"]}
    assert Step(prompt="x", stop='["a", "b"]').stop == ("a", "b")


@pytest.mark.parametrize("ends", ["a", '["a"', '{"a": 1}', "null", "[" * 100_000])
def test_a_text_that_is_no_list_is_one_rows_fault(ends):
    """Nor is it one of an author's."""
    with pytest.raises(RowError, match="stop from column 'ends': expected a list, or its JSON text") as error:
        compile_step(Step(prompt="x", stop="${ends}"), EngineTraits("m")).request({"ends": ends})

    assert error.value.refusal.reason == "invalid_parameter"


OUTPUTS = {"structured_outputs": {"json": {"type": "integer"}}}
JSON_OBJECT = {"response_format": {"type": "json_object"}}
JSON_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}}


@pytest.mark.parametrize(
    ("step", "answer", "reason"),
    [
        (Step(prompt="x"), Answer("cut", "length", 1, 1), None),
        (Step(prompt="x", on_length="fail"), Answer("cut", "length", 1, 1), "answer_cut_off"),
        (
            Step(messages=[{"role": "user", "content": "x"}], keep=["reasoning"]),
            Answer("", "length", 1, 1, extra={"reasoning": "Let me"}),
            "answer_cut_off",
        ),
        (Step(prompt="x", choice=["yes", "no"]), Answer("yes", "stop", 1, 1), None),
        (Step(prompt="x", choice=["yes", "no"]), Answer("ye", "length", 1, 1), "invalid_output"),
        (Step(prompt="x", regex="[0-9]+"), Answer("12a", "stop", 1, 1), "invalid_output"),
        (Step(prompt="x", extra_body=JSON_OBJECT), Answer('{"a": ', "length", 1, 1), "invalid_output"),
        (Step(prompt="x", extra_body=JSON_OBJECT), Answer('{"a": 1}', "stop", 1, 1), None),
        (Step(prompt="x", extra_body=JSON_SCHEMA), Answer('"a"', "stop", 1, 1), "invalid_output"),
        (Step(prompt="x", extra_body=JSON_SCHEMA), Answer("5", "stop", 1, 1), None),
        (Step(prompt="x", extra_body=OUTPUTS), Answer("5", "stop", 1, 1), None),
        (Step(prompt="x", extra_body=OUTPUTS), Answer("x", "stop", 1, 1), "invalid_output"),
    ],
)
def test_an_answer_may_be_none(step, answer, reason):
    """One that is cut off is written unless the author says otherwise, or nothing has been said by then."""
    read = compile_step(step, EngineTraits("m")).read(answer)

    assert (read.reason if isinstance(read, Refusal) else None) == reason
