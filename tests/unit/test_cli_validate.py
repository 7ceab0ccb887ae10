"""What `raylm validate` finds in a folder of DAGs, and how their tasks are rendered without a run."""

import textwrap

import pytest

from airflow_provider_raylm.cli import tasks
from airflow_provider_raylm.cli.main import main
from airflow_provider_raylm.errors import BatchError, SpecError
from airflow_provider_raylm.testing import FakeRayJobs
from tests.conftest import DAGS

DAG = """
from airflow.sdk import DAG, Param, task
from airflow_provider_raylm.authoring import shared_engine

with DAG("d", schedule=None, params={"folder": "/in", "rows": 5}) as dag:

    @task
    def places():
        return [{"source": "/in/a", "output": "/out/a"}]

    listed = places()
    with shared_engine("e", model="{{ params.get('model', 'm') }}", {engine}) as engine:
{body}
"""


@pytest.fixture
def fake():
    fake = FakeRayJobs()
    with fake.installed():
        yield fake


def folder_with(tmp_path, body, engine=""):
    code = DAG.replace("{engine}", engine).replace("{body}", textwrap.indent(textwrap.dedent(body), " " * 8))
    (tmp_path / "dag.py").write_text(code)
    return str(tmp_path)


def validated(tmp_path, capsys, body, *options, engine=""):
    """Return the exit status, and the line of each task but the engine's own."""
    status = main(["validate", folder_with(tmp_path, body, engine), *options])
    lines = dict(line.split(maxsplit=1)[::-1] for line in capsys.readouterr().out.splitlines())
    return status, {line: kind for line, kind in lines.items() if "_e" not in line.partition(":")[0]}


def test_the_example_dags_are_valid(fake, capsys):
    """What is known only when they run is said so."""
    assert main(["validate", str(DAGS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert "ok     raylm_quickstart.reply" in lines
    assert "ok     raylm_quickstart.deploy_reviewer: engine reviewer, Qwen/Qwen3-8B" in lines
    known = [line.split()[1] for line in lines if "as far as is known" in line]
    assert known == [
        *("raylm_partition_groups.partition.language:", "raylm_partition_groups.partition.summary:"),
        *("raylm_partitions.language:", "raylm_taskflow.summary:", "raylm_taskflow.language:"),
    ]
    assert fake.submitted == []


def test_what_a_template_makes_is_checked(fake, tmp_path, capsys):
    """A field that is no number once it is rendered, and a rule between two fields: neither is known before."""
    body = """
    engine.infer("bad", source="{{ params.folder }}", prompt="p", max_tokens="{{ params.folder }}", output="/out/bad")
    engine.infer("own", source="{{ params.folder }}", prompt="p", output="{{ params.folder }}/out")
    engine.infer("good", source="/in/{{ ds }}", prompt="p", max_tokens="{{ params.rows }}", output="/out/{{ ds }}")
    """
    status, lines = validated(tmp_path, capsys, body)

    assert status == 1
    assert lines["d.good"] == "ok"
    (bad, own) = sorted(line for line, kind in lines.items() if kind == "error")
    assert bad.startswith("d.bad: BatchSpec.max_tokens:")
    assert "lies in the source" in own


def test_a_question_that_the_engine_is_not_loaded_for(fake, tmp_path, capsys):
    """Told by what the engine's template makes."""
    body = 'engine.infer("label", source="/in", prompt="p", output="/out")'
    status, lines = validated(tmp_path, capsys, body, engine="task=\"{{ 'embed' }}\"")

    assert status == 1
    (line,) = lines
    assert "this engine is loaded for task='embed'" in line


def test_a_file_that_cannot_be_imported(fake, tmp_path, capsys):
    """Is an error, and hides no other."""
    (tmp_path / "broken.py").write_text("# airflow DAG\nimport nothing_of_this_name\n")
    body = 'engine.infer("label", source="/in", prompt="p", output="/out")'
    status, lines = validated(tmp_path, capsys, body)

    assert status == 1
    assert lines["d.label"] == "ok"
    assert any("No module named 'nothing_of_this_name'" in line for line, kind in lines.items() if kind == "error")


@pytest.mark.parametrize(
    ("source", "more"),
    [
        ("{{ var.value.not_here }}", ""),
        ("{{ conn.not_here.host }}", ""),
        ("/in", 'dag.params["told"] = Param(type="string")'),
    ],
)
def test_what_this_airflow_cannot_tell_is_no_error(fake, tmp_path, capsys, airflow_db, source, more):
    """A variable or a connection that is elsewhere, and a parameter that a run has to tell."""
    body = f"""
    engine.infer("var", source="{source}", prompt="p", output="/out/v")
    {more}
    """
    status, lines = validated(tmp_path, capsys, body)

    assert status == 0
    assert [kind for line, kind in lines.items() if line.startswith("d.var: as far as is known")] == ["ok"]


def test_whatever_a_template_does_hides_no_other_task(fake, tmp_path, capsys):
    """Each has its line, which says what went wrong: in Jinja, in a macro of the author's, in a prompt's file."""
    (tmp_path / "in.jinja").write_text("{{ 1 / 0 }}")
    body = """
    engine.infer("zero", source="/in/{{ 1 / 0 }}", prompt="p", output="/out/a")
    engine.infer("absent", source="/in/{{ dag_run.conf.x.y }}", prompt="p", output="/out/b")
    engine.infer("macro", source="/in/{{ own() }}", prompt="p", output="/out/c")
    engine.infer("file", source="/in", prompt_file="{{ params.folder[1:] }}.jinja", output="/out/d")
    engine.infer("good", source="/in", prompt="p", output="/out/e")

    def own():
        raise OSError("no such place")

    dag.user_defined_macros = {"own": own}
    """
    status, lines = validated(tmp_path, capsys, body)
    found = {line.split(":")[0]: (kind, line.partition(": ")[2]) for line, kind in lines.items()}

    assert status == 1
    assert found["d.good"] == ("ok", "")
    assert found["d.zero"] == ("error", "zero cannot be rendered: ZeroDivisionError: division by zero")
    assert found["d.absent"][1].startswith("batch: a template asks for what is not there: ")
    assert found["d.macro"][1].startswith("macro cannot be rendered (dag.py, line ")
    assert found["d.macro"][1].endswith("OSError: no such place")
    assert found["d.file"] == ("error", "file cannot be rendered: ZeroDivisionError: division by zero")


def test_sources_are_looked_at_on_request(fake, tmp_path, capsys):
    """By a job on the task's cluster, with its credentials; what another task writes is not there yet."""
    fake.report("label", 1_200)
    body = """
    label = engine.infer("label", source="/in", prompt="p", output="/out/label", storage_options={"s3": {"key": "k"}})
    engine.infer("reply", source=label.output, prompt="p", output="/out/reply")
    """
    status, lines = validated(tmp_path, capsys, body, "--storage")

    assert (status, set(lines)) == (
        0,
        {"d.label: 1 files, 1,200 rows", "d.reply: its source is what label writes, which is not looked at"},
    )
    (request,) = fake.submitted
    assert (request.verb, request.storage) == ("plan", {"s3": {"key": "k"}})
    assert (request.metadata["dag_id"], request.metadata["task_id"]) == ("d", "label")


def test_a_source_that_is_not_there(fake, tmp_path, capsys):
    """Is an error, in the cluster's words."""
    fake.fail("label", BatchError("source '/in' matches no file."))
    body = 'engine.infer("label", source="/in", prompt="p", output="/out")'
    status, lines = validated(tmp_path, capsys, body, "--storage")

    assert (status, lines) == (1, {"d.label: source '/in' matches no file.": "error"})


def test_a_folder_that_is_not_there(capsys):
    assert main(["validate", "/no/such/folder"]) == 1
    assert capsys.readouterr().err == "There is no folder /no/such/folder.\n"


# --- rendering --------------------------------------------------------------------------------------------------------


def one(tmp_path, body, task_id, moment, **options):
    dag = tasks.find_dag(folder_with(tmp_path, body), "d")
    return tasks.rendered(tasks.inference(dag, task_id), moment, **options)[0]


def test_conf_and_date_are_those_of_the_run(tmp_path):
    """Parameters from the run's conf, dates from its logical date, and the DAG's task stays as it is."""
    from datetime import UTC, datetime

    body = (
        'engine.infer("label", source="{{ params.folder }}/{{ ds }}", prompt="p", output="/out/{{ dag_run.conf.x }}")'
    )
    moment = tasks.Moment(conf={"folder": "/other", "x": "y"}, logical_date=datetime(2026, 2, 3, tzinfo=UTC))
    dag = tasks.find_dag(folder_with(tmp_path, body), "d")
    task = tasks.inference(dag, "label")
    batch = tasks.rendered(task, moment)[0].batch

    assert (batch["source"], batch["output"]) == ("/other/2026-02-03", "/out/y")
    assert task.batch["source"] == "{{ params.folder }}/{{ ds }}"


def test_instances_of_mapped_tasks(tmp_path):
    """Literal ones, and those of a list that a task would have returned."""
    body = """
    engine.infer.partial("fixed", prompt="p").expand_kwargs(
        [{"source": "/in/{{ ds }}/0", "output": "/o/0"}, {"source": "/in/1", "output": "/o/1"}]
    )
    engine.infer.partial("told", prompt="p").expand_kwargs(listed)
    """
    assert one(tmp_path, body, "fixed", tasks.Moment(map_index=1)).batch["source"] == "/in/1"
    with pytest.raises(tasks.NotRun, match="--xcom places=JSON"):
        one(tmp_path, body, "told", tasks.Moment())
    given = {"places": [{"source": "/a", "output": "/b"}]}
    assert one(tmp_path, body, "told", tasks.Moment(xcoms=given)).batch["source"] == "/a"


def test_what_is_given_for_a_mapped_task_has_to_fit(tmp_path):
    """An instance that is not there, and a result that nothing can be mapped over."""
    body = """
    engine.infer.partial("fixed", prompt="p").expand_kwargs([{"source": "/in/0", "output": "/o/0"}])
    engine.infer.partial("told", prompt="p").expand_kwargs(listed)
    """
    with pytest.raises(SpecError, match="fixed has no instance 1"):
        one(tmp_path, body, "fixed", tasks.Moment(map_index=1))
    with pytest.raises(SpecError, match="told cannot be rendered: ValueError: .* not dict"):
        one(tmp_path, body, "told", tasks.Moment(xcoms={"places": {"source": "/a"}}))


def test_a_function_that_fails_is_named_by_its_line(tmp_path):
    """It is the author's code, and no fault of the command."""
    body = """
    @engine.task
    def reply():
        return {}["nothing"]

    reply()
    """
    with pytest.raises(SpecError, match=r"reply cannot be rendered \(dag.py, line \d+\): KeyError: 'nothing'"):
        one(tmp_path, body, "reply", tasks.Moment())


def test_the_function_of_a_decorated_task_is_called_on_request(tmp_path):
    """It tells the spec; its arguments may be what an inference task reports."""
    body = """
    label = engine.infer("label", source="/in", prompt="p", output="/out/{{ ds }}")

    @engine.task
    def reply(report, params=None):
        return {"source": report["output"], "prompt": "p", "output": f"/out/{params['rows']}"}

    reply(label.output)
    """
    moment = tasks.Moment()
    batch = one(tmp_path, body, "reply", moment).batch
    assert (batch["source"], batch["output"]) == (f"/out/{moment.logical_date:%Y-%m-%d}", "/out/5")
    assert moment.chained == {"label"}
    assert "source" not in one(tmp_path, body, "reply", tasks.Moment(), call=False).batch


def test_a_name_that_is_not_there(tmp_path):
    """What is there is told."""
    body = 'engine.infer("label", source="/in", prompt="p", output="/out")'
    dag = tasks.find_dag(folder_with(tmp_path, body), "d")
    with pytest.raises(SpecError, match="no inference task 'deploy_e'; there are: label"):
        tasks.inference(dag, "deploy_e")
    with pytest.raises(SpecError, match="no DAG 'x'; there are: d"):
        tasks.find_dag(str(tmp_path), "x")
    assert tasks.engine_of(tasks.inference(dag, "label"), tasks.Moment()).model == "m"
