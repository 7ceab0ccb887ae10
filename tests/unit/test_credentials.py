"""Credentials for the storage: from Airflow's connections to fsspec's options, and to the job."""

import json
import sys

import pytest
from airflow.sdk import DAG, Connection, ObjectStoragePath

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.credentials import said_in_extra, storage_of
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.hooks.raylm import extra_of
from airflow_provider_raylm.operators.raylm import DeployEngineOperator
from airflow_provider_raylm.testing import FakeRayJobs
from airflow_provider_raylm.wire import handed, taken
from tests.unit.test_authoring import run


@pytest.fixture
def connect(monkeypatch):
    def connect(name, **fields):
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(fields))
        return name

    return connect


AWS = {"conn_type": "aws", "login": "AKIA", "password": "s3cr3t"}
GOOGLE = {"conn_type": "google_cloud_platform"}


@pytest.mark.parametrize(
    ("fields", "protocols", "options"),
    [
        (AWS, "s3 s3a", {"key": "AKIA", "secret": "s3cr3t"}),
        ({"conn_type": "aws"}, "s3 s3a", {}),
        (
            {
                **AWS,
                "extra": {
                    "aws_session_token": "t",
                    "region_name": "eu-west-1",
                    "service_config": {"s3": {"endpoint_url": "http://minio:9000"}},
                },
            },
            "s3 s3a",
            {
                "key": "AKIA",
                "secret": "s3cr3t",
                "token": "t",
                "endpoint_url": "http://minio:9000",
                "client_kwargs": {"region_name": "eu-west-1"},
            },
        ),
        (
            {**AWS, "extra": {"endpoint_url": "http://minio:9000"}},
            "s3 s3a",
            {"key": "AKIA", "secret": "s3cr3t", "endpoint_url": "http://minio:9000"},
        ),
        (
            {**GOOGLE, "extra": {"project": "p", "keyfile_dict": '{"private_key": "k"}'}},
            "gs gcs",
            {"project": "p", "token": {"private_key": "k"}},
        ),
        (
            {"conn_type": "wasb", "login": "account", "password": "k"},
            "abfs abfss az",
            {"account_name": "account", "account_key": "k"},
        ),
        (
            {
                "conn_type": "adls",
                "host": "https://account.blob.core.windows.net",
                "login": "app",
                "password": "s",
                "extra": {"tenant_id": "t"},
            },
            "abfs abfss az",
            {"account_name": "account", "tenant_id": "t", "client_id": "app", "client_secret": "s"},
        ),
    ],
)
def test_a_connection_becomes_options(connect, fields, protocols, options):
    """For all names of its protocol."""
    connect("store", **fields)
    assert storage_of("store", {}) == dict.fromkeys(protocols.split(), options)


def test_a_key_file_is_read_on_the_worker(connect, tmp_path):
    """The cluster has no such file."""
    (tmp_path / "key.json").write_text('{"private_key": "k"}')
    connect("store", conn_type="google_cloud_platform", extra={"key_path": str(tmp_path / "key.json")})

    assert storage_of(["store"], {})["gs"] == {"token": {"private_key": "k"}}


def test_options_go_over_a_connection(connect):
    """Of several kinds of storage, each its own."""
    connect("in", **AWS)
    connect("out", conn_type="wasb", login="account", password="k")
    found = storage_of(["in", "out"], {"s3": {"secret": "other"}, "http": {"client_kwargs": {}}})

    assert found["s3"] == {"key": "AKIA", "secret": "other"}
    assert set(found) == {"s3", "s3a", "abfs", "abfss", "az", "http"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"conn_type": "ssh"}, "'store' is a connection of type 'ssh'; those to storage are aws, google_cloud"),
        ({**AWS, "extra": {"role_arn": "r"}}, r"'store': extra\.role_arn is not honoured; known are aws_session_token"),
        (
            {**AWS, "extra": {"external_id": "x", "role_arn": "r"}},
            r"extra\.role_arn is not .* Leave storage_conn_id out",
        ),
        ({**AWS, "extra": {"service_config": {"sts": {}}}}, r"extra\.service_config\.sts is not honoured"),
        ({**AWS, "extra": {"service_config": "{}"}}, r"extra\.service_config: expected an object"),
        ({**AWS, "extra": {"host": "http://minio:9000"}}, r"extra\.host is not .* Name .* in extra\.endpoint_url"),
        ({**AWS, "host": "http://minio:9000"}, r"'store': host is not honoured\. Name .* in extra\.endpoint_url"),
        ({**AWS, "login": ""}, r"'store': give login and password"),
        ({**GOOGLE, "extra": {"keyfile_dict": "s3cr3t"}}, r"'store': extra\.keyfile_dict: expected the JSON text of"),
        ({**GOOGLE, "extra": {"keyfile_dict": "{s3cr3t"}}, r"'store': extra\.keyfile_dict: expected the JSON text of"),
        ({**GOOGLE, "extra": {"key_path": sys.executable}}, r"'store': extra\.key_path: expected the JSON text of"),
        ({"conn_type": "wasb", "host": "http://azurite:10000/dev"}, r"host 'http://azurite.* extra\.connection_string"),
        ({"conn_type": "google_cloud_platform", "extra": {"key_path": "/none"}}, r"extra\.key_path: .*No such file"),
        ({"conn_type": "wasb", "extra": {"workload_identity_tenant_id": "x"}}, "workload_identity_tenant_id is not"),
    ],
)
def test_what_a_connection_says_is_honoured_or_refused(connect, fields, words):
    """By name; no value is shown."""
    connect("store", **fields)
    with pytest.raises(SpecError, match=words) as refused:
        storage_of("store", {})
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize("read", [said_in_extra, extra_of])
@pytest.mark.parametrize("extra", ["{s3cr3t", '["s3cr3t"]'])
def test_an_extra_that_is_no_object_is_refused(read, extra):
    """Airflow takes it for an empty one, or on 3.1 for no connection."""
    with pytest.raises(SpecError, match="The connection 'it': its extra is not the JSON text of an object") as refused:
        read(Connection(conn_id="it", conn_type="aws", extra=extra))
    assert "s3cr3t" not in str(refused.value)


def test_two_connections_of_one_kind(connect):
    """A process has one identity for each."""
    connect("a", **AWS)
    connect("b", **AWS)
    with pytest.raises(SpecError, match="'b' is a second connection for s3://"):
        storage_of(["a", "b"], {})


BATCH = {"source": "s3://in", "prompt": "${text}"}


def test_tasks_hand_them_to_their_own_jobs(airflow_db, connect):
    """And to nobody else: not to the engine's, and not in what they say of themselves."""
    connect("store", **AWS)
    fake = FakeRayJobs()
    with DAG("handed", schedule=None, params={"conns": ["store"], "none": None}) as dag:
        with shared_engine("e", model="m", storage_conn_id="{{ 'store' }}") as engine:
            engine.infer("one", output="s3://out/one", **BATCH)
            engine.infer("two", output="s3://out/two", storage_options={"s3": {"anon": True}}, **BATCH)
            engine.infer("none", output="s3://out/none", storage_conn_id=(), **BATCH)
            engine.infer("text", output="s3://out/t", storage_conn_id="{{ params.conns | tojson }}", **BATCH)
            engine.infer("null", output="s3://out/n", storage_conn_id="{{ params.none | tojson }}", **BATCH)
    assert set(run(dag, fake).values()) == {"success"}
    seen = {request.metadata["task_id"]: request.storage.get("s3") for request in fake.submitted}

    own = {"key": "AKIA", "secret": "s3cr3t"}
    assert {name: seen[name] for name in ("one", "two", "text")} == {
        "one": own,
        "two": {**own, "anon": True},
        "text": own,
    }
    assert [seen[name] for name in ("deploy_e", "none", "null", "teardown_e")] == [None] * 4
    assert not any("s3cr3t" in request.wire() + repr(request) for request in fake.submitted)


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ({"storage_options": {"key": "AKIA"}}, r"storage_options\.key: expected a protocol with its options"),
        ({"storage_options": {"s3://": {"anon": True}}}, r"storage_options\.s3://: expected a protocol with its"),
        ({"storage_options": {"s3": {"session": object()}}}, r"storage_options\.s3: only JSON values"),
        ({"storage_options": '{"s3": {}}'}, r"storage_options: expected a dict of .* got str; .*json\.loads"),
        ({"storage_options": "{{ params.o }}"}, r"storage_options: expected a dict"),
        (
            {"storage_options": {"s3": {"key": "{{ conn.store.login }}", "token": None}}},
            r"storage_options\.s3: it has a Jinja template, and is not rendered.*storage_conn_id",
        ),
        ({"storage_conn_id": {"s3": "store"}}, r"storage_conn_id: expected the id of a connection, or a list of them"),
        ({"storage_conn_id": ""}, r"storage_conn_id: expected the id of a connection"),
        ({"storage_conn_id": '["a", 1]'}, r"storage_conn_id: expected the id of a connection"),
        ({"source": ObjectStoragePath("s3://in", anon=True)}, r"The path s3://in/? has options of its own \(anon\)"),
    ],
)
def test_what_a_job_cannot_take_over_is_refused(storage, words):
    """When the DAG is parsed, of a mapped task, too."""
    fields = {"prompt": "${text}", "source": "s3://in", **storage}
    with DAG("d", schedule=None), shared_engine("e", model="m") as engine:
        with pytest.raises(SpecError, match=words):
            engine.infer("a", output="s3://out/a", **fields)
        with pytest.raises(SpecError, match=words):
            engine.infer.partial("b", **fields).expand(output=["s3://out/b"])


def test_a_path_of_an_engine_names_no_connection():
    """It would be handed to nobody."""
    model = ObjectStoragePath("s3://store@models/m")
    with DAG("d", schedule=None):
        with pytest.raises(SpecError, match=r"EngineSpec: a path names the connection 'store', .*secret_env"):
            DeployEngineOperator(task_id="deploy", engine={"name": "e", "model": model})


def test_what_is_handed_over_arrives():
    """And says nothing of itself at its beginning."""
    storage = {"s3": {"secret": "s3cr3t"}}
    assert taken(handed(storage)) == storage
