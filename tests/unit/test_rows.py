"""Templates are text with holes; data is never evaluated."""

import json

import pytest

from airflow_provider_raylm.cluster.batch.rows import (
    RowError,
    compile_step,
    compile_template,
    missing_columns,
    shared_fields,
)
from airflow_provider_raylm.specs import Step
from airflow_provider_raylm.specs.batch import placeholders


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
        compile_step(step)({"a": " \n"})

    assert error.value.refusal.reason == "empty_prompt"


def test_what_all_rows_share_is_said_once():
    """The model and how to sample, as an OpenAI request without a question; the question is the row's own."""
    step = Step(prompt="Say ${a}", max_tokens=4, temperature=0, stop=["."], extra_body={"logprobs": 1})

    assert json.loads(shared_fields(step, "m")) == {
        "model": "m",
        "max_tokens": 4,
        "temperature": 0,
        "stop": ["."],
        "logprobs": 1,
    }
    assert compile_step(step)({"a": 'quote " and \ud800'}) == 'Say quote " and \ud800'


def test_a_chat_request_keeps_roles_and_order():
    """Each message is its own template."""
    step = Step(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "${a}?"}])

    assert compile_step(step)({"a": "Why"}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]


def test_columns_of_earlier_steps_count_as_present():
    """A step may use what the steps before it produced, not what later ones do."""
    steps = [Step(prompt="${a} ${c}", output_column="b"), Step(prompt="${b} ${d}", output_column="c")]

    assert missing_columns(steps, ["a"]) == ["c", "d"]
    assert placeholders("${b} $${x} ${b}") == ["b", "b"]
