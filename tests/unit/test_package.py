"""The package as Airflow and Ray meet it: light, apart, and described."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import jsonschema
import pytest

from airflow_provider_raylm import __version__
from airflow_provider_raylm.get_provider_info import get_provider_info
from tests.conftest import DAGS, REPOSITORY

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
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names)


def test_the_worker_side_needs_no_ray():
    """All of it and all DAGs import without ray, vllm and torch, in less than 1.5 s beyond Airflow's own import."""
    code = f"""
import importlib, runpy
import airflow.sdk, pydantic, httpx
from airflow.sdk import BaseOperator, DAG, BaseHook, Param, task, conf
DAG("warm")
started = time.perf_counter()
for name in {modules(cluster=False)!r}:
    importlib.import_module(name)
for path in {[str(path) for path in DAGS.glob("*.py")]!r}:
    runpy.run_path(path)
print(time.perf_counter() - started)
"""
    assert float(python(code, {"ray", "vllm", "torch", "transformers"}).split()[-1]) < 1.5


def test_a_dag_with_fifty_tasks_parses_in_a_second():
    """Beyond Airflow's own import."""
    code = """
import airflow.sdk, pydantic, httpx
from airflow.sdk import DAG, BaseHook, BaseOperator, BaseSensorOperator, Param, conf, task
started = time.perf_counter()
from airflow_provider_raylm.authoring import shared_engine
with DAG("fifty"), shared_engine("e", model="m") as engine:
    for number in range(50):
        engine.infer(f"task_{number}", source="s3://in/{{ ds }}", prompt="${text}", output=f"s3://out/{number}")
print(time.perf_counter() - started)
"""
    assert float(python(code, {"ray", "vllm", "torch", "transformers"}).split()[-1]) < 1.0


def test_the_cluster_side_needs_no_airflow():
    """Every module of it imports on a machine without Airflow."""
    code = f"""
import importlib
for name in {[name for name in modules(cluster=True) if not name.endswith("server")]!r}:
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
    """Through the entry point, with the connection type, its hook and its form."""
    from airflow.providers_manager import ProvidersManager

    assert [point.name for point in entry_points(group="apache_airflow_provider") if "raylm" in point.value]
    manager = ProvidersManager()
    assert "airflow-provider-raylm" in manager.providers
    assert manager.hooks["raylm"].hook_name == "Ray LM"
    links = {name for name in manager.extra_links_class_names if "raylm" in name}
    assert links == {
        f"airflow_provider_raylm.links.raylm.{link}Link" for link in ("RayJob", "ServeApplication", "Output")
    }


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE"])
def test_what_a_reader_looks_for_is_there(name):
    """At the top."""
    assert (REPOSITORY / name).stat().st_size > 200
