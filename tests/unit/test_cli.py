"""What the commands `raylm engines` and `raylm quarantine` show and do, and that Airflow has the same ones."""

import io
import json
import time
from unittest.mock import patch

import pytest

from airflow_provider_raylm.cli import engines
from airflow_provider_raylm.cli.console import choice, cut, duration, last_line, safe
from airflow_provider_raylm.cli.main import main
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.polling import Unreachable
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.testing import FakeRayJobs
from tests.airflows import AIRFLOW


def deploy(fake, run_id, engine="reviewer", dag_id="nightly"):
    labels = {"installation": "tests", "dag_id": dag_id, "run_id": run_id, "engine": engine}
    payload = {"engine": {"name": engine, "model": "org/model"}, "labels": labels, "replace": False}
    assert fake.submit(JobRequest(f"deploy-{run_id}-{engine}", "deploy", payload))
    return next(reversed(fake.engines))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", "raylm://ray-head")
    fake = FakeRayJobs()
    with fake.installed():
        yield fake


@pytest.fixture
def two_clusters(fake, monkeypatch):
    """A second connection, to a cluster that does not answer."""

    def connect(hook):
        if hook.raylm_conn_id == "raylm_far":
            raise Unreachable("http://far:8265 does not answer.")
        return fake

    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_FAR", "raylm://far")
    monkeypatch.setenv("AIRFLOW_CONN_SOMETHING_ELSE", "aws://")
    with patch.object(RayLMHook, "get_conn", connect):
        yield fake


def test_engines_are_listed_with_their_owners(fake, airflow_db, capsys):
    """Whose they are, in which state, and since when."""
    application = deploy(fake, "manual__1")
    fake._engines[application].deployed_at = time.time() - 7_300

    assert main(["engines"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert tuple(header.split()) == engines.COLUMNS
    assert row.split() == [
        *("raylm_default", application, "nightly", "manual__1", "org/model", "RUNNING", "1/1"),
        *("2", "h", "1", "min"),
    ]


def test_a_silent_cluster_hides_no_other(two_clusters, airflow_db, capsys):
    """Its connection is named, and the exit status tells scripts."""
    application = deploy(two_clusters, "manual__1")

    assert main(["engines"]) == 1
    out, err = capsys.readouterr()
    assert application in out
    assert err == "raylm_far: http://far:8265 does not answer.\n"


def test_connections_of_the_database_are_looked_at(fake, airflow_db, monkeypatch, capsys):
    """Those of another type are not; one that is named is the only one."""
    from airflow.models.connection import Connection  # noqa: TID251 - the SDK stores none
    from airflow.utils.session import create_session

    monkeypatch.delenv("AIRFLOW_CONN_RAYLM_DEFAULT")
    kept = [
        Connection(conn_id="raylm_kept", conn_type="raylm", host="h"),
        Connection(conn_id="other", conn_type="http"),
    ]
    with create_session() as session:
        session.add_all(kept)
    try:
        deploy(fake, "manual__1")
        assert main(["engines"]) == 0
        assert "raylm_kept" in capsys.readouterr().out
        assert main(["engines", "--conn", "named", "--conn", "named"]) == 0
        shown = capsys.readouterr().out
    finally:
        with create_session() as session:
            for one in kept:
                session.delete(session.merge(one))
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["named"]


def test_a_connection_of_the_database_leads_to_its_cluster(airflow_db, monkeypatch, capsys):
    """Its address and token, as Airflow's own commands read them; and one that is not there is an error."""
    from airflow.models.connection import Connection  # noqa: TID251 - the SDK stores none
    from airflow.utils.session import create_session

    from tests.unit.test_ray_jobs import dashboard

    monkeypatch.delenv("AIRFLOW_CONN_RAYLM_DEFAULT", raising=False)
    with dashboard(body=json.dumps({"applications": {}})) as (url, seen):
        kept = Connection(conn_id="raylm_kept", conn_type="raylm", host=url, password="t0ken")
        with create_session() as session:
            session.add(kept)
        try:
            assert main(["engines"]) == 0
            assert main(["engines", "--conn", "raylm_kept", "--conn", "nowhere"]) == 1
        finally:
            with create_session() as session:
                session.delete(session.merge(kept))
    out, err = capsys.readouterr()
    assert out == "no engines\n" * 2
    assert err.startswith("nowhere: ")
    assert {headers["Authorization"] for headers in seen} == {"Bearer t0ken"}


def test_a_local_cluster_is_not_started_to_be_asked(monkeypatch, airflow_db, capsys):
    """Listing engines begins nothing."""
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", "raylm://local")
    monkeypatch.setattr("airflow_provider_raylm.local.is_up", lambda port: False)
    monkeypatch.setattr("airflow_provider_raylm.local.start", lambda *args: pytest.fail("it was started"))

    assert main(["engines"]) == 1
    assert "no Ray head runs on this machine" in capsys.readouterr().err


def test_no_engines_and_no_connection(fake, airflow_db, monkeypatch, capsys):
    assert main(["engines"]) == 0
    assert capsys.readouterr().out == "no engines\n"
    monkeypatch.delenv("AIRFLOW_CONN_RAYLM_DEFAULT")
    assert main(["engines"]) == 1
    assert "--conn CONN_ID" in capsys.readouterr().err


@pytest.mark.parametrize("by_name", [True, False])
def test_an_engine_is_stopped(fake, airflow_db, capsys, by_name):
    """By its name or its application, by the teardown that tasks run, which does not cut work off unasked."""
    application, other = deploy(fake, "manual__1"), deploy(fake, "manual__1", "other")

    assert main(["engines", "stop", "reviewer" if by_name else application, "--yes"]) == 0
    request = fake.submitted[-1]
    assert (request.verb, request.payload["on_busy"]) == ("teardown", "fail")
    assert list(fake.engines) == [other]
    assert f"{application} is gone" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_an_engine_is_stopped_when_somebody_agrees(fake, airflow_db, monkeypatch, capsys, answer, left):
    """Nothing is torn down by a slip, or by an end of input."""
    deploy(fake, "manual__1")
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)

    assert main(["engines", "stop", "reviewer"]) == left
    assert len(fake.engines) == left
    assert "nightly" in capsys.readouterr().out


def test_nobody_is_asked_where_nobody_is(fake, airflow_db, monkeypatch, capsys):
    deploy(fake, "manual__1")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))

    assert main(["engines", "stop", "reviewer"]) == 1
    assert "say --yes" in capsys.readouterr().err
    assert len(fake.engines) == 1


def test_a_name_that_several_engines_have(two_clusters, airflow_db, capsys):
    """Or none: nothing is stopped, and what there is is told."""
    applications = [deploy(two_clusters, f"manual__{number}") for number in (1, 2)]

    assert main(["engines", "stop", "reviewer", "--yes"]) == 1
    assert "2 engines are named 'reviewer'" in (err := capsys.readouterr().err)
    assert all(one in err for one in applications)
    assert main(["engines", "stop", "nobody", "--yes"]) == 1
    assert "no engine named 'nobody'" in (err := capsys.readouterr().err)
    assert "raylm_far did not answer" in err
    assert len(two_clusters.engines) == 2


def test_one_application_on_two_clusters_is_two_engines(airflow_db, monkeypatch, capsys):
    """As after a connection has moved: neither is torn down in place of the other."""
    clusters = {"raylm_a": FakeRayJobs(), "raylm_b": FakeRayJobs()}
    for conn_id, cluster in clusters.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", "raylm://h")
        application = deploy(cluster, "manual__1")
    monkeypatch.setattr(RayLMHook, "get_conn", lambda hook: clusters[hook.raylm_conn_id])

    assert main(["engines", "stop", application, "--yes"]) == 1
    assert f"{application} (--conn raylm_a), {application} (--conn raylm_b)" in capsys.readouterr().err
    assert main(["engines", "stop", application, "--yes", "--conn", "raylm_b"]) == 0
    assert [len(cluster.engines) for cluster in clusters.values()] == [1, 0]


def test_a_teardown_that_fails_is_an_error(fake, airflow_db, capsys):
    """In the words of the cluster."""
    deploy(fake, "manual__1")
    fake.fail("", EngineError("raylm-reviewer-1 is at work on s3://out."))

    assert main(["engines", "stop", "reviewer", "--yes"]) == 1
    assert capsys.readouterr().err.endswith("raylm-reviewer-1 is at work on s3://out.\n")


def test_a_command_that_is_interrupted_stops_its_job(fake, monkeypatch):
    """A job that nobody waits for does not go on."""
    from airflow_provider_raylm.cli import jobs as cli_jobs

    fake.pend("")
    monkeypatch.setattr(cli_jobs, "POLL_INTERVAL_S", 0.01)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("airflow_provider_raylm.following.decide", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cli_jobs.run_verb(fake, "teardown", {"application": "raylm-e"}, timeout=60)
    assert fake._stopped == {fake.submitted[0].submission_id}


@pytest.mark.skipif(AIRFLOW < (3, 2), reason="3.1 knows no commands of providers")
def test_airflow_has_the_same_commands(fake, airflow_db, capsys):
    """`airflow raylm …` parses and does what `raylm …` does."""
    from airflow.cli import cli_parser

    parsed = cli_parser.get_parser().parse_args(["raylm", "engines", "--conn", "raylm_default"])
    with pytest.raises(SystemExit) as ended:
        parsed.func(parsed)
    assert ended.value.code == 0
    assert capsys.readouterr().out == "no engines\n"
    stop = cli_parser.get_parser().parse_args(["raylm", "engines", "--conn", "a", "stop", "e", "--yes"])
    assert (stop.action, stop.name, stop.conn, stop.yes) == ("stop", "e", ["a"], True)


def test_text_of_rows_moves_no_cursor():
    """Answers and messages are anybody's text."""
    assert safe("a\x1b[2Jb\tc\nd\x07é\u202e") == "a\ufffd[2Jb    c\nd\ufffdé\ufffd"
    # Spaces of other widths are spaces, and what words are joined with is part of them.
    words = "10\N{NO-BREAK SPACE}000\N{IDEOGRAPHIC SPACE}\u06cc\N{ZERO WIDTH NON-JOINER}\u062f"
    assert safe(words) == "10 000 \u06cc\N{ZERO WIDTH NON-JOINER}\u062f"
    assert cut("one\ntwo  three", 9) == "one two …"
    assert [duration(one) for one in (5, 120, 3_700, 90_000)] == ["5 s", "2 min", "1 h 1 min", "1 d 1 h"]


def test_the_nearest_names_are_offered_first():
    """Of hundreds only some; and a file of DAGs that fails may fail without a word."""
    assert choice("nigthly", ["a", "nightly", "b"]) == "nightly, a, b"
    assert choice("dag_7", (f"dag_{number}" for number in range(500))).startswith("dag_7, dag_")
    assert choice("x", map(str, range(500))).endswith(" and 490 more")
    assert choice("x", []) == "none"
    assert [last_line(one) for one in ("Trace\nValueError: x\n", " ")] == ["ValueError: x", "no reason is told"]


def test_an_engine_has_one_line(fake, airflow_db, capsys):
    """Where another program reads it, however long its names are, and whatever is in them."""
    deploy(fake, "manual__1\nraylm_default raylm-forged-0123456789", dag_id="nightly_" * 30)

    assert main(["engines"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert "nightly_" * 30 in row


def test_an_error_moves_no_cursor(fake, airflow_db, capsys):
    """It may quote what a cluster or a proxy before it says."""
    deploy(fake, "manual__1")
    fake.fail("", EngineError("\x1b]0;title\x07gone"))

    assert main(["engines", "stop", "reviewer", "--yes"]) == 1
    assert capsys.readouterr().err.endswith("\ufffd]0;title\ufffdgone\n")


def test_a_terminal_of_another_encoding_shows_what_it_can(fake, airflow_db, monkeypatch):
    """The rest is a question mark: the rows have been paid for."""
    deploy(fake, "größe")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))

    assert main(["engines"]) == 0
    assert b"gr??e" in written.getvalue()


def test_the_worker_without_pyarrow_is_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("airflow_provider_raylm.cli.quarantine.find_spec", lambda name: None)

    assert main(["quarantine", "/tmp"]) == 1
    assert "pip install pyarrow" in capsys.readouterr().err
