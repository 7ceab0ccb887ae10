"""What an editor and a type checker know of a DAG that uses this package."""

import inspect
import re
from pathlib import Path

import pytest
from airflow.sdk import BaseOperator

from airflow_provider_raylm import keywords
from airflow_provider_raylm.operators.checks import FIELDS
from airflow_provider_raylm.specs import EngineSpec
from tests.conftest import DAGS, REPOSITORY
from tests.keywords import OWN, text

WRONG = """
from airflow.sdk import DAG, Asset, literal
from airflow_provider_raylm.authoring import shared_engine

with DAG("right"), shared_engine("e", model="m", replicas=(1, 2), teardown_args={"on_busy": "fail"}) as engine:
    label = engine.infer("a", source=Asset("s3://in"), prompt=literal("x"), output="s3://a", retries=2)
    engine.infer("b", source=[label.output, "s3://b"], prompt_file="b.txt", max_tokens="{{ params.n }}", output="s3://b")
    engine.infer.partial("c", messages=[{"role": "user", "content": "x"}], output="s3://c").expand(source=["s3://in"])
with DAG("wrong"), shared_engine("e", modell="m") as engine:  # modell
    engine.infer("a", source="s3://in", promt="x", output="s3://a")  # promt
    engine.infer("b", source="s3://in", prompt="x", max_tokens=[1], output="s3://b")  # max_tokens
    engine.infer("c", source="s3://in", prompt="x", output_format="csv", output="s3://c", retries="x")  # retries
    engine.infer.partial("d", stop=3).expand(source=["s3://in"])  # stop
with DAG("wrong"), shared_engine("e", model="m", deploy_args={"on_busy": "fail"}):  # deploy_args
    pass
"""


NEWEST = pytest.mark.skipif(
    "retry_policy" not in inspect.signature(BaseOperator.__init__).parameters,
    reason="the keywords are those of the newest Airflow; an older one refuses what it does not have",
)


@NEWEST
def test_the_keywords_are_the_specs_and_the_operators():
    """Name by name and type by type; ``python -m tests.keywords`` writes them anew."""
    assert inspect.getsource(keywords) == text()


def test_nothing_that_airflow_takes_is_missing():
    """Of its own arguments for any task; and of the specs' fields."""
    of_airflow = set(inspect.signature(BaseOperator.__init__).parameters) - OWN
    assert of_airflow <= set(keywords.TaskArguments.__annotations__)
    assert set(keywords.BatchFields.__annotations__) == set(FIELDS)
    assert {*keywords.EngineFields.__annotations__, "name"} == set(EngineSpec.model_fields)


@NEWEST
def test_a_users_dag_is_checked(tmp_path):
    """Strictly: those that are shipped pass, and what is misspelt, or of another type, does not."""
    api = pytest.importorskip("mypy.api")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    cache = REPOSITORY / ".mypy_cache" / "dags"
    found, errors, _ = api.run(
        ["--strict", "--config-file=", "--cache-dir", str(cache), str(wrong), *map(str, DAGS.glob("*.py"))]
    )

    assert errors == ""
    lines = re.findall(r"^(.+\.py):(\d+): error: (.+)$", found, re.M)
    # An error that mypy remembers has the path of an earlier run.
    assert {Path(name).name for name, *_ in lines} == {wrong.name}, found
    expected = [number for number, line in enumerate(WRONG.splitlines(), 1) if re.search(r"  # \w+$", line)]
    assert expected == sorted({int(number) for _, number, _ in lines}), found
    for number in expected:
        word = WRONG.splitlines()[number - 1].rpartition("# ")[2]
        assert any(word in said for _, at, said in lines if int(at) == number), found
