"""What the pages promise: each promise stands where it is said to stand, and has a test; numbers are the specs' own."""

import ast
import inspect
import json
import re
import tomllib

import pytest

from airflow_provider_raylm import polling, ray_jobs, sealing, specs
from airflow_provider_raylm.cli import chosen
from airflow_provider_raylm.cluster.batch import loop, preview, report, task, window
from airflow_provider_raylm.cluster.batch.rows import images
from airflow_provider_raylm.hooks.raylm import Extra
from airflow_provider_raylm.operators.raylm import (
    BatchInferenceOperator,
    DeployEngineOperator,
    TeardownEngineOperator,
)
from airflow_provider_raylm.plugins import watching
from airflow_provider_raylm.specs.reports import FAILED_ROWS
from tests.conftest import DAGS, REPOSITORY
from tests.unit.test_docs import DOCS, PACKAGE, PAGES, name_of

CLAIMS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in (DOCS / "claims.md").read_text().splitlines()
    if "`tests/" in line and line.startswith("| ")
]
SAID = re.compile(r"(?:\[[^]]+\]\(([\w-]+\.md)\)|`(\w+\.md)`): “([^”]+)”")
WORDS = {"a": 1, "two": 2, "three": 3, "five": 5, "six": 6, "eight": 8, "ten": 10, "fifteen": 15, "thirty": 30}
SECONDS = {"s": 1, "second": 1, "min": 60, "minute": 60, "hour": 3600, "day": 86400}
# Its default depends on the hardware, so the field has none: this is the one with GPUs.
HANG_S = int(re.search(r"default (\d+)", specs.EngineSpec.model_fields["hang_timeout"].description)[1])


def plain(text):
    """Return a text as it is read: where its lines end does not matter."""
    return " ".join(text.split())


def test_the_table_is_one():
    """Of claims with words and tests, none of them twice."""
    assert len(CLAIMS) >= 40
    assert all(len(cells) == 3 for cells in CLAIMS)
    assert len({claim for claim, _, _ in CLAIMS}) == len(CLAIMS)
    for _, said, held in CLAIMS:
        assert plain("; ".join(match[0] for match in SAID.finditer(said))) == said
        assert re.fullmatch(r"(`tests/[\w/]+\.py::\w+`(, |$))+", held)


@pytest.mark.parametrize(("claim", "said", "held"), CLAIMS, ids=[claim for claim, _, _ in CLAIMS])
def test_a_claim_is_made_and_held(claim, said, held):
    """Its words are on the pages, wherever their lines end; its tests are in the files that are named."""
    for page, at_the_top, words in SAID.findall(said):
        path = DOCS / page if page else REPOSITORY / at_the_top
        assert words in plain(path.read_text()), f"{path.name} does not say: {words}"
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held):
        tree = ast.parse((REPOSITORY / file).read_text())
        there = {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in there, f"{file} has no {name}"


def defaults(heading):
    """Return field and default, as written, of the table below a heading of the page on specs."""
    section = re.split(rf"^## {re.escape(heading)}$", (DOCS / "specs.md").read_text(), flags=re.M)[1]
    section = re.split(r"^##? ", section, flags=re.M)[0]
    return re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*?) ?\|", section.replace("| |", "| - |"), re.M)


@pytest.mark.parametrize(
    "spec", ["EngineSpec", "Lease", "Step", "BatchSpec", "RuntimeEnv", "EngineRef", "BatchReport", "TeardownReport"]
)
def test_defaults_in_tables_are_those_of_specs(spec):
    """Numbers, truth values, names, and what has none or must be given; words like "the model's" are for people."""
    fields = getattr(specs, spec).model_fields
    told = defaults(spec)
    assert told
    for name, written in told:
        field = fields[name]
        default = field.get_default(call_default_factory=True)
        if written == "required":
            assert field.is_required(), name
        elif written == "none":
            assert default in (None, ()), name
        elif written in ("true", "false"):
            assert default is (written == "true"), name
        elif re.fullmatch(r"[\d.]+", written):
            assert default == float(written), name
        elif literal := re.fullmatch(r"`(\{\}|\[\]|[\w-]+)`", written):
            text = literal[1]
            assert default == (json.loads(text) if text == "{}" else () if text == "[]" else text), name


def test_defaults_of_operators_and_connections_are_those_of_the_code():
    """As their tables have them."""
    page = (DOCS / "operators.md").read_text()
    for operator in (DeployEngineOperator, BatchInferenceOperator, TeardownEngineOperator):
        for name, one in inspect.signature(operator.__init__).parameters.items():
            told = re.findall(rf"^\| `{name}` \| `?([\w.]+)`? \|", page, re.M)
            if one.default not in (inspect.Parameter.empty, None) and told:
                assert str(one.default) in (told[0], f"{told[0]}.0"), name
    for name, written in re.findall(
        r"^\|[^|]+\| extra `(\w+)` \|.*\| ([^|]+) \|$", (DOCS / "connection.md").read_text(), re.M
    ):
        default = Extra.model_fields[name].get_default(call_default_factory=True)
        if number := re.match(r"\d+", written):
            assert default == float(number[0]), name
        elif written in ("true", "false"):
            assert default is (written == "true"), name


def known():
    """Return the numbers that are defaults, by the field's name."""
    fields = {
        name: field.default
        for spec in (specs.EngineSpec, specs.BatchSpec, specs.Lease)
        for name, field in spec.model_fields.items()
    }
    told = [inspect.signature(one.__init__).parameters for one in (DeployEngineOperator, TeardownEngineOperator)]
    arguments = {name: one.default for parameters in told for name, one in parameters.items()}
    return {
        name: value
        for name, value in (arguments | fields | {"hang_timeout": HANG_S}).items()
        if isinstance(value, int | float) and value >= 1
    }


def test_defaults_in_sentences_are_those_of_the_code():
    """Where a page names a field and at once a number: `engine_timeout`, 15 minutes."""
    found = []
    numbers = known()
    units = "|".join(sorted((f"{unit}s?" for unit in SECONDS), key=len, reverse=True))
    number = re.compile(rf"`(?:lease\.)?(\w+)`(?:, | \(| is )(\d[\d,]*|{'|'.join(WORDS)})(?: ({units}))?(?![\w%])")
    for page in PAGES:
        for name, written, unit in number.findall(plain(page.read_text())):
            if name in numbers and (unit or written[0].isdigit()):
                value = WORDS.get(written) or int(written.replace(",", ""))
                found.append((name, page))
                assert value * SECONDS.get(unit.rstrip("s") or unit, 1) == numbers[name], (name_of(page), name, written)
    assert {name for name, _ in found} >= {"idle_timeout", "max_lifetime", "engine_timeout", "block_rows", "max_tokens"}


def test_blocks_have_as_many_rows_as_pages_say():
    """In rows of tables and in sentences that name no field."""
    said = [
        int(rows)
        for page in PAGES
        for rows in re.findall(r"(?:block of|blocks? having|blocks of|\| block \|) (\d+) rows", plain(page.read_text()))
        if page.name in ("faults.md", "how-it-works.md", "recipes.md")
    ]
    assert len(said) >= 4
    assert set(said) == {specs.BatchSpec.model_fields["block_rows"].default}


@pytest.mark.parametrize(
    ("value", "number", "page", "words"),
    [
        (polling.OUTAGE_LIMIT_S, 300, "faults.md", "| a silent dashboard | five minutes;"),
        (polling.OUTAGE_LIMIT_S, 300, "how-it-works.md", "the task bears five minutes of it"),
        (ray_jobs._MAX_REQUEST_BYTES, 120_000, "specs.md", "must fit into 120,000 bytes"),
        (sealing.PAD_BYTES, 128 << 10, "security.md", "makes 128 KiB of random bytes"),
        (chosen.LEASE.idle_timeout, 600, "cli.md", "its lease ends it after ten idle minutes"),
        (preview.MOST_ROWS, 100, "cli.md", "asks the first rows of a task, at most 100"),
        (preview.TEXT_CHARACTERS, 1000, "cli.md", "above 1,000 characters they are cut in any case"),
        (preview.SPREAD, 10, "cli.md", "comes from ten blocks with equal distances"),
        (images.AT_A_TIME, 16, "questions.md", "16 of a block at a time"),
        (images.DOWNLOAD_S, 120, "questions.md", "not complete within two minutes"),
        (loop.THREADS, 32, "how-it-works.md", "row functions, reading and writing have 32"),
        (task.REPLICAS_PER_STAGE, 8, "how-it-works.md", "More than eight replicas have more than one stage"),
        (window.LEAST_BLOCKS, 6, "how-it-works.md", "at least six blocks per replica"),
        (window.BYTES_AT_WORK, 128 << 20, "how-it-works.md", "and 128 MiB of their rows"),
        (FAILED_ROWS, 5, "engines-page.md", "the first five rows of this attempt that failed"),
        (report._TEXT_BYTES, 200, "security.md", "200 bytes of each"),
        (watching.KEPT_S, 3, "engines-page.md", "looked at every three seconds at most"),
        (watching.TAILS, 40, "engines-page.md", "the end of the log of each job at work, 40 of them at most"),
        (watching.REQUEST_S, 5, "engines-page.md", "A request has five seconds"),
    ],
)
def test_bounds_are_those_of_the_code(value, number, page, words):
    """Those that no field has."""
    assert value == number
    assert words in plain((DOCS / page).read_text())


@pytest.mark.parametrize("spec", ["EngineSpec", "BatchSpec"])
def test_what_a_fingerprint_leaves_out_is_told(spec):
    """All of it, and nothing else."""
    page = plain((DOCS / "specs.md").read_text())
    whose = {"EngineSpec": "The engine's", "BatchSpec": "The task's"}[spec]
    sentence = re.search(rf"{whose} fingerprint covers all fields but ([^.;]*?)(?:, of those|[.;])", page)[1]
    assert set(re.findall(r"`(\w+)`", sentence)) == getattr(specs, spec).not_identity


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_every_example_is_named(page):
    """And no other."""
    text = (REPOSITORY / page).read_text()
    named = set(re.findall(r"`(\w+\.py)`", text))
    assert named == {path.name for path in DAGS.glob("*.py")}


@pytest.mark.parametrize("page", sorted((DOCS / "decisions").glob("*.md")), ids=name_of)
def test_modules_that_decisions_name_exist(page):
    """Below the package, or from the top."""
    places = (REPOSITORY, PACKAGE)
    for path in re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", page.read_text()):
        assert any((place / path).exists() for place in places) or list(PACKAGE.rglob(path)), path


def test_versions_are_those_that_the_package_asks_for():
    """Of Airflow and Python."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "apache-airflow>=3.1,<4" in project["dependencies"]
    assert project["requires-python"] == ">=3.11"
