"""The package as it is shipped: its wheel, in an Airflow that has nothing else."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from airflow_provider_raylm import __version__
from airflow_provider_raylm.get_provider_info import get_provider_info
from tests.conftest import DAGS, REPOSITORY

UV = REPOSITORY / ".venv/tools/bin/uv"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment with the wheel and what it asks for; return its folder of programs."""
    folder = tmp_path_factory.mktemp("bare")
    environ = {**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}

    def uv(*arguments):
        done = subprocess.run([UV, *arguments], cwd=REPOSITORY, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    uv("build", "--quiet", "--wheel", "--out-dir", str(folder))
    uv("venv", "--quiet", "--python", sys.executable, str(folder / "venv"))
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    install = ["pip", "install", "--quiet", "--compile-bytecode", "--constraint", "constraints.txt"]
    uv(*install, "--python", str(python), str(wheel))
    return python.parent


def airflow(bare, *arguments):
    """Run a program of that environment, with an Airflow home of its own; return what it prints."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    environ |= {"AIRFLOW_HOME": str(bare.parent / "airflow"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    environ["AIRFLOW__CORE__DAGS_FOLDER"] = str(DAGS)
    # The program, with -P: nothing of the repository may stand in for what the wheel lacks.
    command = [bare / "python", "-P", *arguments]
    done = subprocess.run(command, cwd=bare, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_dag_imports_without_ray(bare):
    """Neither Ray nor vLLM came along."""
    libraries = Path(sysconfig.get_path("purelib", vars={"base": str(bare.parent)}))
    assert not [name for name in ("ray", "vllm", "torch") if (libraries / name).exists()]

    code = f"""
from airflow.dag_processing.dagbag import DagBag
bag = DagBag({str(DAGS)!r})
assert not bag.import_errors, bag.import_errors
print(len(bag.dags))
"""
    assert int(airflow(bare, "-c", code).split()[-1]) == len(list(DAGS.glob("*.py")))


@pytest.mark.parametrize(
    ("listing", "shown"),
    [
        ("list", f"airflow-provider-raylm | .* | {__version__}"),
        ("hooks", "raylm .*RayLMHook"),
        ("links", "airflow_provider_raylm.links.raylm.ServeApplicationLink"),
        ("triggers", "airflow_provider_raylm.triggers.raylm"),
    ],
)
def test_airflow_lists_what_the_provider_has(bare, listing, shown):
    """As `airflow providers ...` tells its user."""
    listed = airflow(bare, "-m", "airflow", "providers", listing, "--output", "plain")
    assert re.search(shown.replace(" | ", r"\s+"), listed), listed


def test_airflow_knows_all_that_the_provider_declares(bare):
    """Key by key."""
    printed = airflow(bare, "-m", "airflow", "providers", "get", "airflow-provider-raylm", "--full", "--output", "json")
    (known,) = json.loads(printed.splitlines()[-1])

    declared = get_provider_info()
    assert set(known) >= set(declared)
    # Airflow prints true as "True", and cuts the full stop off the description.
    for key in set(declared) - {"description", "connection-types"}:
        assert known[key] == declared[key], key
    (form,), (declared_form,) = known["connection-types"], declared["connection-types"]
    assert form["conn-fields"].keys() == declared_form["conn-fields"].keys()
