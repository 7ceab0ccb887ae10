"""What the docs say is there: links, code blocks, DAGs, connections, tables of fields, metrics, manifests."""

import argparse
import ast
import importlib.util
import json
import os
import re
import subprocess
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.sdk import BaseOperator

from airflow_provider_raylm import specs
from airflow_provider_raylm.cli.commands import COMMANDS
from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.specs import build
from airflow_provider_raylm.testing import FakeRayJobs
from tests.airflows import AIRFLOW, DagBag, sync_bag_to_db
from tests.conftest import DAGS, REPOSITORY
from tests.scripted import attempt

DOCS = REPOSITORY / "docs"
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
PACKAGE = REPOSITORY / "airflow_provider_raylm"
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.M | re.S)
# What a page's excerpt may take for granted.
PRELUDE = """
import json, os, tempfile
from datetime import timedelta
import pendulum
from airflow.sdk import DAG, Asset, AssetAlias, literal
from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.operators.raylm import *
from airflow_provider_raylm.sensors.raylm import EngineSensor
from airflow_provider_raylm.specs import BatchSpec, EngineSpec
"""


def name_of(page):
    return str(page.relative_to(REPOSITORY))


def blocks(*languages):
    """Return the pages' code blocks in some languages, as test parameters: page and text."""
    return [
        pytest.param(page, textwrap.dedent(code), id=f"{name_of(page)}:{text[: match.start()].count(chr(10)) + 1}")
        for page in PAGES
        for text in [page.read_text()]
        for match in FENCE.finditer(text)
        for _, language, code in [match.groups()]
        if language in languages
    ]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text())
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)]
    return {slug if not slugs[:at].count(slug) else f"{slug}-{slugs[:at].count(slug)}" for at, slug in enumerate(slugs)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """To a file, and to a heading in it; what is elsewhere is not looked at."""
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\n\s*", " ", text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_is_in_a_table_of_contents():
    """So that the site leads to it."""
    listed = set()
    for page in (DOCS / "index.md", DOCS / "decisions.md"):
        for entry in re.findall(
            r"^([\w/-]+)$", "\n".join(re.findall(r"```{toctree}(.*?)```", page.read_text(), re.S)), re.M
        ):
            listed.add(DOCS / f"{entry}.md")
    assert {page for page in PAGES if DOCS in page.parents and page.name != "index.md"} == {
        page for page in listed if "/api/" not in str(page)
    }


def in_a_dag(code):
    """Return an excerpt as it would stand in a DAG, with an engine and a task to refer to."""
    body = textwrap.indent(code, "    ")
    return (
        f'{PRELUDE}with DAG("d", schedule=None), shared_engine("outer", model="m") as engine:\n'
        '    label = engine.infer("before", source="s3://in", prompt="${text}", output="s3://out/before")\n'
        f"    deploy = engine.deploy\n{body}"
    )


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_run(page, code):
    """A file of DAGs as it is, an excerpt inside a DAG; what is taken from `dags/` is there word for word."""
    if any(code.strip("\n") in textwrap.dedent(path.read_text()) or found(code, path) for path in DAGS.glob("*.py")):
        return
    tree = ast.parse(code)
    if "dag.test()" in code or "pyarrow" in code or "AIRFLOW_HOME" in code:
        return  # Run below, or with Airflow's own tests.
    whole = any(isinstance(node, ast.With) and "DAG(" in ast.unparse(node.items[0]) for node in tree.body)
    program = (
        code if whole else in_a_dag(code.replace("{...}", "{'source': 's3://i', 'prompt': 'p', 'output': 's3://o'}"))
    )
    if not whole:
        program = program.replace('output="…"', 'output="s3://o"')
        program = program.replace('("label", ...,', '("label", source="s3://i", prompt="p", output="s3://o1",')
        program = program.replace('("reply", ...,', '("reply", source="s3://i", prompt="p", output="s3://o2",')
    exec(compile(program, name_of(page), "exec"), {})


def found(code, path):
    """Return whether an excerpt stands in a file, at some indentation."""
    lines = [line.strip() for line in code.strip().splitlines()]
    there = [line.strip() for line in path.read_text().splitlines()]
    return any(there[at : at + len(lines)] == lines for at in range(len(there)))


@pytest.mark.parametrize(("page", "code"), blocks("bash"))
def test_shell_blocks_parse(page, code):
    """And the make targets, and the modules that they run, exist."""
    assert subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True).returncode == 0
    for module in re.findall(
        r"python -m (airflow_provider_raylm[\w.]*)|from (airflow_provider_raylm[\w.]*) import", code
    ):
        importlib.import_module("".join(module))


def test_make_targets_exist():
    """Wherever a page names one."""
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    named = {
        target for page in PAGES for target in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", page.read_text(), re.M)
    }
    assert {"".join(pair) for pair in named} <= targets
    assert named


@pytest.mark.parametrize(("page", "code"), blocks("json", "toml", "yaml"))
def test_data_blocks_parse(page, code, monkeypatch):
    """And a connection is one that the hook takes."""
    if code.lstrip().startswith("{"):
        data = json.loads(code)
        if "conn_type" in data:
            assert_connects(code, monkeypatch)
    else:
        assert tomllib.loads(code) if "=" in code else list(yaml.safe_load_all(code))


@pytest.mark.parametrize(("page", "code"), blocks("bash", ""))
def test_connections_in_variables_connect(page, code, monkeypatch):
    """URIs and JSON, wherever a page sets one."""
    for quoted, bare in re.findall(r"AIRFLOW_CONN_RAYLM_DEFAULT=(?:'([^']+)'|(\S+))", code):
        assert_connects(quoted or bare, monkeypatch)


def assert_connects(value, monkeypatch):
    from airflow_provider_raylm import local
    from airflow_provider_raylm.hooks.raylm import RayLMHook

    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", value)
    monkeypatch.setattr(local, "ensure_local_cluster", lambda port: f"http://127.0.0.1:{port}")
    # The file of a CA need not exist for the address to be right.
    monkeypatch.setattr("ssl.create_default_context", lambda **given: __import__("ssl")._create_unverified_context())
    client = RayLMHook().get_conn()
    client.close()
    assert client.dashboard_url.startswith(("http://", "https://"))


def rows_of(page, heading):
    """Return the first cells of the table below a heading, without backticks."""
    section = re.split(rf"^#+ {re.escape(heading)}$", page.read_text(), flags=re.M)[1]
    section = re.split(r"^#+ ", section, flags=re.M)[0]
    cells = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)}


@pytest.mark.parametrize(
    "spec",
    [
        *("EngineSpec", "Lease", "Step", "EngineRef", "Labels", "BatchReport", "EngineUsage", "EngineSeconds"),
        *("TeardownReport", "SweepReport", "EngineInfo", "RuntimeEnv"),
    ],
)
def test_tables_have_the_fields_of_specs(spec):
    """All of them, and no other."""
    assert rows_of(DOCS / "specs.md", spec) == set(getattr(specs, spec).model_fields)


def test_the_batch_specs_table_adds_to_the_steps():
    """Its fields are those of a Step and its own."""
    own = set(specs.BatchSpec.model_fields) - set(specs.Step.model_fields)
    assert rows_of(DOCS / "specs.md", "BatchSpec") == own


def test_the_connections_table_has_its_fields():
    """The extra's, by their names."""
    from airflow_provider_raylm.hooks.raylm import Extra

    table = re.findall(r"^\|[^|]+\| extra `(\w+)`", (DOCS / "connection.md").read_text(), re.M)
    assert set(Extra.model_fields) == set(table)


def measured():
    """Return the metrics that a page names, and the kind of each."""
    table = (DOCS / "observability.md").read_text().split("## Dashboard")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `raylm.")]
    return {name: row[2].strip() for row in rows for name in re.findall(r"`raylm\.(\w+)`", row[1])}


def test_metrics_that_are_told_are_sent():
    """Each name in the table stands in the code that measures."""
    names = ("observability.py", "operators/raylm.py", "operators/engines.py")
    code = "".join((PACKAGE / name).read_text() for name in names)
    assert {name for name in measured() if f'"{name}"' not in code} == set()


@pytest.fixture(scope="module")
def installed_metrics():
    """Names that the installed Ray and vLLM send, as Ray's exporter prefixes them."""
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("ray", "vllm")]
    files = [
        *(roots[0] / "serve/_private").glob("*.py"),
        *(roots[0] / "dashboard/modules/metrics/dashboards").glob("default_*.py"),
        roots[0] / "dashboard/modules/reporter/reporter_agent.py",
        *(roots[1] / "v1/metrics").glob("*.py"),
    ]
    text = "\n".join(path.read_text() for path in files)
    sent = {f"ray_{name.replace(':', '_')}" for name in re.findall(r'"((?:serve_|vllm:|node_)\w+)"', text)}
    return sent | set(re.findall(r"\bray_resources\b", text))


@pytest.mark.parametrize("path", ["grafana/raylm.json", "kuberay/alerts.yaml"])
def test_dashboard_and_alerts_ask_for_metrics_that_exist(path, installed_metrics):
    """Airflow's by OpenTelemetry's names for counters, gauges and timers, Ray's and vLLM's by Ray's."""
    text = (DOCS / path).read_text()
    names = set(re.findall(r"\b(?:airflow|ray)_\w+", text))
    assert len(names) > 4
    ends = {"counter": "_total", "gauge": "", "timer": "_milliseconds"}
    sent = {f"airflow_raylm_{name}{ends[kind]}" for name, kind in measured().items()}
    for name in names:
        if name.startswith("airflow_raylm_"):
            assert name in sent
        else:
            assert {name, name.removesuffix("_total")} & installed_metrics, name


@pytest.mark.skipif(AIRFLOW < (3, 3), reason="earlier versions send gauges")
@pytest.mark.parametrize("path", ["grafana/raylm.json", "kuberay/alerts.yaml"])
def test_timers_are_read_as_airflow_sends_them(path):
    """As exponential histograms, which Prometheus keeps as native ones: there is no series of sums or buckets."""
    metrics = Path(importlib.util.find_spec("airflow").origin).parent / "_shared/observability/metrics"
    assert "aggregation=ExponentialBucketHistogramAggregation()" in (metrics / "otel_logger.py").read_text()
    lines = [line for line in (DOCS / path).read_text().splitlines() if "increase(" in line and "_milliseconds" in line]
    assert len(lines) > 1
    assert [line for line in lines if "histogram_" not in line] == []


def test_the_dashboard_is_one():
    """Panels do not overlap, and each says what it shows."""
    dashboard = json.loads((DOCS / "grafana/raylm.json").read_text())
    taken = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def manifests(name):
    return list(yaml.safe_load_all((DOCS / "kuberay" / name).read_text()))


def test_the_kuberay_cluster_is_what_its_page_says():
    """GPUs from zero, a token, one image and one identity for head and workers, the package's own version."""
    from airflow_provider_raylm import __version__

    (cluster,) = manifests("cluster.yaml")
    spec = cluster["spec"]
    (gpu,) = spec["workerGroupSpecs"]
    pods = [spec["headGroupSpec"]["template"]["spec"], gpu["template"]["spec"]]
    (account,) = manifests("storage.yaml")

    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert gpu["minReplicas"] == gpu["replicas"] == 0 < gpu["maxReplicas"]
    assert [pod["serviceAccountName"] for pod in pods] == [account["metadata"]["name"]] * 2
    assert {box["image"].rpartition(":")[2] for pod in pods for box in pod["containers"]} == {__version__}
    for box in gpu["template"]["spec"]["containers"]:
        assert box["resources"]["limits"] == box["resources"]["requests"]
        assert {mount["name"] for mount in box["volumeMounts"]} == {
            v["name"] for v in gpu["template"]["spec"]["volumes"]
        }


def test_an_engine_fits_on_a_gpu_pod():
    """The one in the page: its bundle, beside a stage."""
    from airflow_provider_raylm.cluster.engine.resources import bundles

    (gpu,) = manifests("cluster.yaml")[0]["spec"]["workerGroupSpecs"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    (bundle,) = bundles(specs.EngineSpec(name="reviewer", model="m"))
    assert bundle["GPU"] <= int(limits["nvidia.com/gpu"])
    assert bundle["CPU"] + 0.1 <= int(limits["cpu"])


def test_the_ingress_leads_to_the_clusters_dashboard():
    """By the name that KubeRay gives its service, on the dashboard's port, with TLS."""
    ingress, policy = manifests("ingress.yaml")
    cluster = manifests("cluster.yaml")[0]["metadata"]["name"]
    (rule,) = ingress["spec"]["rules"]
    service = rule["http"]["paths"][0]["backend"]["service"]

    assert service == {"name": f"{cluster}-head-svc", "port": {"number": 8265}}
    assert ingress["spec"]["tls"][0]["hosts"] == [rule["host"]]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": cluster}


def test_whom_the_page_sends_to_the_cluster_is_let_in():
    """The ingress, and an Airflow beside it that uses the service: both reach the dashboard, and nothing else."""
    _, policy = manifests("ingress.yaml")
    dashboard = {
        source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for rule in policy["spec"]["ingress"]
        if rule.get("ports") == [{"port": 8265}]
        for source in rule["from"]
    }
    assert dashboard == {"ingress-nginx", "airflow"}
    assert "namespace `airflow`" in (DOCS / "kuberay.md").read_text()


# --- DAGs of the pages run, and row by row where a page promises what comes out --------------------------------------


def section(page, heading):
    """Return the code blocks below a heading, in order."""
    text = re.split(rf"^#+ {re.escape(heading)}$", (REPOSITORY / page).read_text(), flags=re.M)[1]
    return [textwrap.dedent(code) for _, _, code in FENCE.findall(re.split(r"^## ", text, flags=re.M)[0])]


def dag_of(code):
    """Return the DAG that a block makes, known to Airflow as if its processor had found it in a file."""
    namespace = {}
    exec(code, namespace)
    # A block names no variable for its DAG; its tasks know it.
    (dag,) = {task.dag for task in made(namespace)}
    DagBundlesManager().sync_bundles_to_db()
    bag = DagBag(os.devnull)
    bag.dags[dag.dag_id] = dag
    sync_bag_to_db(bag, "dags-folder", None)
    return dag


def made(namespace):
    """Return the tasks in a block's variables."""
    values = [getattr(value, "deploy", value) for value in namespace.values()]
    return [value for value in values if isinstance(value, BaseOperator)]


def ran(dag, fake):
    with fake.installed():
        return {str(ti.state) for ti in dag.test().get_task_instances()}


def batches_of(dag):
    """Return the dicts of a DAG's inference tasks, by task id."""
    return {task.task_id: task.batch for task in dag.tasks if isinstance(task, BatchInferenceOperator)}


@pytest.mark.parametrize(
    ("page", "heading", "tasks"),
    [
        ("README.md", "A DAG", {"label", "reply"}),
        ("docs/tutorial.md", "3. Write the DAG", {"label", "reply"}),
        ("docs/recipes.md", "A daily DAG reads the day that is over", {"language"}),
    ],
)
def test_whole_dags_run(page, heading, tasks, airflow_db):
    """From deploy to teardown, on a cluster that is not there."""
    fake = FakeRayJobs()
    assert ran(dag_of(section(page, heading)[0]), fake) == {"success"}
    assert (set(fake.batches), fake.engines) == (tasks, {})


@pytest.mark.parametrize("path", [*DAGS.glob("*.py")], ids=lambda path: path.name)
def test_daily_dags_name_their_interval(path):
    """A cron text makes `ds` the day that begins."""
    if "{{ ds }}" in path.read_text():
        assert "CronDataIntervalTimetable(" in path.read_text()


def test_the_daily_recipe_reads_the_day_that_is_over(airflow_db):
    """The run that starts on 2 January reads the files of 1 January."""
    import pendulum
    from airflow.serialization.serialized_objects import DagSerialization

    dag = dag_of(section("docs/recipes.md", "A daily DAG reads the day that is over")[0])
    scheduler = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))
    first = scheduler.next_dagrun_info(last_automated_run_info=None)
    with_catchup = pendulum.instance(first.logical_date)
    assert pendulum.instance(first.run_after).diff(with_catchup).in_hours() == 24


def test_the_tutorial_ends_as_it_says(tmp_path, monkeypatch, airflow_db, capsys):
    """Its input is made, its tasks ask real blocks of it, and what it prints has the failed row."""
    subprocess.run(["bash", "-ec", section("docs/tutorial.md", "2. Make an input")[0]], cwd=tmp_path, check=True)
    dag = dag_of(section("docs/tutorial.md", "3. Write the DAG")[0])
    for batch in batches_of(dag).values():
        told = {**batch, "source": batch["source"] if isinstance(batch["source"], str) else f"{tmp_path}/out/label"}
        told = json.loads(json.dumps(told).replace("{{ params.folder }}", str(tmp_path)))
        attempt(build(specs.BatchSpec, told), ask=lambda fields, prompts: [Answer("fine", "stop", 2, 1)] * len(prompts))

    monkeypatch.chdir(tmp_path)
    # Airflow may have said something of a DAG that no bundle has.
    capsys.readouterr()
    exec(section("docs/tutorial.md", "5. Read the answers")[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kettle | fine | fine"
    assert (len(lines), lines[-1]) == (5, "desk lamp failed: null_value")


def test_the_quarantine_of_a_green_task_is_asked_again(tmp_path):
    """In a task of its own, as the recipe has it; and both outputs go into the next task, each row once."""
    (code,) = section("docs/recipes.md", "Ask the quarantine of a green task again")
    code = code.replace("s3://out", str(tmp_path))
    namespace = {}
    exec(in_a_dag(code), namespace)
    fixed, reply = (task.batch for task in namespace["engine"].deploy.dag.tasks if task.task_id in ("label", "reply"))
    (tmp_path / "in.txt").write_text("good\nbad\n")
    first = {**fixed, "source": str(tmp_path / "in.txt"), "output": str(tmp_path / "label"), "max_failed_fraction": 1}

    def refuses(fields, prompts):
        return [Refusal("invalid_request", "no") if "bad" in one else Answer("fine", "stop", 1, 1) for one in prompts]

    assert attempt(build(specs.BatchSpec, first), ask=refuses).rows_quarantined == 1
    assert attempt(build(specs.BatchSpec, first)).rows_already_done == 1
    again = attempt(build(specs.BatchSpec, fixed), ask=lambda fields, prompts: [Answer("now", "stop", 1, 1)])
    assert (again.rows_written, again.rows_quarantined) == (1, 0)
    told = {**reply, "source": [str(tmp_path / "label"), again.output]}
    assert attempt(build(specs.BatchSpec, told)).rows_written == 2


def test_an_engine_is_lent(monkeypatch, airflow_db):
    """The borrower's DAG works on the engine of the owner's, which is torn down by its owner alone."""
    owner, borrower = section("docs/recipes.md", "Lend an engine to another DAG")
    borrowed, lent = dag_of(borrower), dag_of(owner.replace("WaitSensor(", "wait = WaitSensor("))
    fake = FakeRayJobs()

    def lend(context):
        assert ran(borrowed, fake) == {"success"}
        assert [spec.name for spec in fake.engines.values()] == ["shared"]

    monkeypatch.setattr(lent.task_dict["lend"], "execute", lend)
    assert ran(lent, fake) == {"success"}
    assert (fake.deployed, set(fake.batches), fake.engines) == (["shared"], {"label"}, {})


def test_the_page_on_tests_has_tests_that_pass(airflow_db):
    """On the DAG of the README."""
    (module, _) = section("docs/testing.md", "An example")
    namespace = {}
    exec(module, namespace)
    dag = dag_of(section("README.md", "A DAG")[0])
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test(dag)


def test_the_map_has_every_module():
    """By its path below the package; the last words of a row's first cell may leave the folder out."""
    table = (DOCS / "how-it-works.md").read_text().split("## Modules")[1]
    named = set(re.findall(r"`([\w/]+)(?:\.py|/)`", "".join(line.split(" | ")[0] for line in table.splitlines())))
    # Those of the specs stand in the second cell.
    (specs,) = re.findall(r"`specs/` \|.*:(.*) \|", table)
    named |= {f"specs/{name}" for name in re.findall(r"\w+", specs)}
    modules = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert [str(one) for one in modules if not {str(one), one.name} & named] == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_commands_and_their_options_are_told(command):
    """In the page's first table and a section; options, which `preview` and `estimate` share, anywhere on the page."""

    def options(parser):
        for action in parser._actions:
            yield from action.option_strings
            for inner in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
                yield from options(inner)

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    page = (DOCS / "cli.md").read_text()

    assert f"| [`{command.name}`](#{command.name}) |" in page
    assert f"\n## {command.name}\n" in page
    assert [name for name in options(parser) if name not in page and name not in ("-h", "--help")] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/how-it-works.md"])
def test_paths_that_are_named_exist(page):
    """Below the package, or from the top."""
    text = FENCE.sub("", (REPOSITORY / page).read_text())
    paths = re.findall(r"`((?:[\w-]+/)+[\w.-]*|[\w-]+/|\w+\.(?:py|md))`", text)
    listed = {path.name for path in PACKAGE.rglob("*.py")}
    assert len(paths) > 15
    for path in [path for path in paths if not path.startswith("build/")]:
        assert (PACKAGE / path).exists() or (REPOSITORY / path).exists() or path in listed, path
