"""The package as Airflow and Ray meet it: light, apart, and described."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import jsonschema
import pytest

from airflow_provider_raylm import __version__
from airflow_provider_raylm.get_provider_info import get_provider_info
from tests.airflows import AIRFLOW
from tests.conftest import DAGS, REPOSITORY

# What imports Ray's own LLM server, which has dependencies of its own.
WITH_RAYS_OWN = re.compile(r"\.replica\.(server|questions)")
BLOCK = """
import sys, time
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""


def python(code, blocked):
    """Run *code* in a fresh interpreter in which some packages cannot be imported; return what it prints."""
    program = BLOCK.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def modules(cluster):
    root = REPOSITORY / "airflow_provider_raylm"
    paths = [path for path in root.rglob("*.py") if ("cluster" in path.parts) == cluster]
    # What only Airflow's API server imports has its web framework below it.
    paths = [path for path in paths if path.parent.name != "plugins" or path.stem == "raylm"]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names)


def test_the_worker_side_needs_no_ray():
    """All of it and all DAGs import without ray, vllm and torch, in 1.5 s, or half of what Airflow itself takes."""
    code = f"""
began = time.perf_counter()
import importlib, runpy
import airflow.sdk, pydantic, httpx
from airflow.sdk import BaseOperator, DAG, BaseHook, Param, task
DAG("warm")
started = time.perf_counter()
for name in {modules(cluster=False)!r}:
    importlib.import_module(name)
for path in {[str(path) for path in DAGS.glob("*.py")]!r}:
    runpy.run_path(path)
print(time.perf_counter() - started, started - began)
"""
    ours, airflows = map(float, python(code, {"ray", "vllm", "torch", "transformers"}).split()[-2:])
    assert ours < max(1.5, 0.5 * airflows)


def test_the_engines_page_needs_no_ray():
    """Nor what only the API server imports of this package."""
    python("import airflow_provider_raylm.plugins.api", {"ray", "vllm", "torch", "transformers", "pyarrow"})


def test_a_dag_with_fifty_tasks_parses_in_a_second():
    """Beyond Airflow's own import; or in a third of what that takes."""
    code = """
began = time.perf_counter()
import airflow.sdk, pydantic, httpx
from airflow.sdk import DAG, BaseHook, BaseOperator, BaseSensorOperator, Param, task
started = time.perf_counter()
from airflow_provider_raylm.authoring import shared_engine
with DAG("fifty"), shared_engine("e", model="m") as engine:
    for number in range(50):
        engine.infer(f"task_{number}", source="s3://in/{{ ds }}", prompt="${text}", output=f"s3://out/{number}")
print(time.perf_counter() - started, started - began)
"""
    ours, airflows = map(float, python(code, {"ray", "vllm", "torch", "transformers"}).split()[-2:])
    assert ours < max(1.0, airflows / 3)


def test_the_cluster_side_needs_no_airflow():
    """Every module of it imports on a machine without Airflow."""
    pytest.importorskip("ray")
    code = f"""
import importlib
for name in {[name for name in modules(cluster=True) if not WITH_RAYS_OWN.search(name)]!r}:
    importlib.import_module(name)
print("airflow" in sys.modules)
"""
    assert python(code, {"airflow", "httpx"}).split() == ["False"]


def test_provider_info_passes_airflows_schema():
    """And names only what is there."""
    import airflow

    schema = json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    info = get_provider_info()
    jsonschema.validate(info, schema)

    for kind in ("operators", "sensors", "hooks", "triggers"):
        for entry in info[kind]:
            for module in entry["python-modules"]:
                assert module in modules(cluster=False)
    assert info["versions"] == [__version__]


def test_airflow_finds_the_provider():
    """Through the entry point, with the connection type, its hook and its form, which 3.1 does not read."""
    from airflow.providers_manager import ProvidersManager

    assert [point.name for point in entry_points(group="apache_airflow_provider") if "raylm" in point.value]
    manager = ProvidersManager()
    assert "airflow-provider-raylm" in manager.providers
    assert manager.hooks["raylm"].hook_name == "Ray LM"
    (declared,) = get_provider_info()["connection-types"]
    fields = {f"extra__raylm__{name}" for name in declared["conn-fields"]} if AIRFLOW >= (3, 2) else set()
    assert {name for name in manager.connection_form_widgets if "raylm" in name} == fields
    links = {name for name in manager.extra_links_class_names if "raylm" in name}
    assert links == {
        f"airflow_provider_raylm.links.raylm.{link}Link" for link in ("RayJob", "ServeApplication", "Output")
    }


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE"])
def test_what_a_reader_looks_for_is_there(name):
    """At the top."""
    assert (REPOSITORY / name).stat().st_size > 200


def test_what_is_declared_is_what_is_tested():
    """The Pythons and Airflows of the package's metadata are those of `make compat`, and the README names them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    makefile = (REPOSITORY / "Makefile").read_text()
    (airflows,) = re.findall(r"^AIRFLOWS := (.*)$", makefile, re.M)
    releases = [release.rpartition(".")[0] for release in airflows.split()]
    pythons = set()
    for release in airflows.split():
        (python,) = re.findall(rf"^PYTHON_{re.escape(release)} := (.*)$", makefile, re.M)
        # Before what it runs on where there is no such Python.
        pythons |= {*re.findall(r"/(3\.\d+)\.\*/", python)} or {*re.findall(r"^PYTHON \?= python(.*)$", makefile, re.M)}

    classified = {name.rpartition(" ")[2] for name in project["classifiers"] if "Python :: 3." in name}
    assert classified == pythons
    assert project["requires-python"] == f">={min(pythons, key=numbers)}"
    assert f"apache-airflow>={min(releases, key=numbers)},<4" in project["dependencies"]
    assert f"on Airflow {', '.join(releases[:-1])} and {releases[-1]} |" in (REPOSITORY / "README.md").read_text()


def numbers(version):
    return [int(part) for part in version.split(".")]
