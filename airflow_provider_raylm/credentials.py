"""From Airflow connections to options of fsspec's file systems, which a job takes over to reach source and output.

Read from the connections' fields alone: no provider of Amazon, Google or Microsoft has to be installed. What a field
says that is not honoured here is refused: a job would reach another storage, or none, in the middle of the night.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from airflow.sdk import BaseHook, Connection

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.templates import is_deferred
from airflow_provider_raylm.specs import read_json_text

Options = dict[str, Any]


def storage_of(conn_ids: str | Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return fsspec's options by protocol.

    Args:
        conn_ids: Airflow connections, of different kinds.
        options: by protocol; they go over what the connections say.

    Raises:
        SpecError: a connection of another kind, two of one kind, or a field that is not honoured.
    """
    found: dict[str, Options] = {}
    for conn_id in [conn_ids] if isinstance(conn_ids, str) else conn_ids:
        connection = BaseHook.get_connection(conn_id)
        kind = connection.conn_type or ""
        if kind not in _KINDS:
            raise SpecError(
                f"storage_conn_id: {conn_id!r} is a connection of type {kind!r}; those to storage are "
                f"{', '.join(_KINDS)}. For another, give storage_options."
            )
        protocols, read = _KINDS[kind]
        if protocols[0] in found:
            raise SpecError(f"storage_conn_id: {conn_id!r} is a second connection for {protocols[0]}://; give one.")
        found |= dict.fromkeys(protocols, read(connection))
    for protocol, own in options.items():
        found[protocol] = {**found.get(protocol, {}), **own}
    return found


def check_options(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse options that a job cannot take over.

    Raises:
        SpecError: they are not by protocol, no JSON, or have a Jinja template, which nobody renders: what is rendered,
            Airflow shows.
    """
    if not isinstance(options, Mapping):
        raise SpecError(
            f"storage_options: expected a dict of protocols with their options, got {type(options).__name__}; "
            "JSON text becomes one with json.loads"
        )
    for protocol, own in options.items():
        if not isinstance(own, Mapping) or not re.fullmatch("[a-z][a-z0-9+.-]*", str(protocol)):
            raise SpecError(
                f"storage_options.{protocol}: expected a protocol with its options, such as "
                '{"s3": {"endpoint_url": "https://..."}}'
            )
        try:
            text = json.dumps(dict(own))
        except TypeError:
            raise SpecError(f"storage_options.{protocol}: only JSON values travel to the cluster") from None
        if is_deferred(text):
            raise SpecError(
                f"storage_options.{protocol}: it has a Jinja template, and is not rendered, because Airflow shows what "
                "is. Name a connection (storage_conn_id), which a template may choose."
            )


def said_in_extra(connection: Any) -> dict[str, Any]:
    """Return what a connection's extra says. Airflow takes one that it cannot read for an empty one.

    Raises:
        SpecError: it is no JSON of an object.
    """
    try:
        is_object = isinstance(json.loads(connection.extra or "{}"), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise SpecError(f"The connection {connection.conn_id!r}: its extra is not the JSON text of an object.")
    extra: dict[str, Any] = connection.extra_dejson
    return extra


def _aws(connection: Connection) -> Options:
    if connection.host:
        raise SpecError(f"storage_conn_id: {connection.conn_id!r}: host is not honoured. {_INSTEAD['host']}.")
    if bool(connection.login) != bool(connection.password):
        raise SpecError(f"storage_conn_id: {connection.conn_id!r}: give login and password (the key and its secret).")
    extra = _extra(connection, {"aws_session_token", "region_name", "endpoint_url", "service_config", "verify"})
    service = extra.get("service_config") or {}
    _only(connection, "extra.service_config", service, {"s3"})
    s3 = service.get("s3") or {}
    _only(connection, "extra.service_config.s3", s3, {"endpoint_url", "bucket_name"})
    client = {"region_name": extra.get("region_name"), "verify": extra.get("verify")}
    return _given(
        key=connection.login,
        secret=connection.password,
        token=extra.get("aws_session_token"),
        endpoint_url=s3.get("endpoint_url") or extra.get("endpoint_url"),
        client_kwargs=_given(**client),
    )


def _google(connection: Connection) -> Options:
    # The form always has num_retries, which is of Airflow's own calls.
    extra = _extra(connection, {"project", "keyfile_dict", "key_path", "num_retries"})
    field, key = "extra.keyfile_dict", extra.get("keyfile_dict")
    if extra.get("key_path"):
        field, key = "extra.key_path", _read(connection, extra["key_path"])
    if key is not None and not isinstance(key := read_json_text(key), Mapping):
        raise SpecError(
            f"storage_conn_id: {connection.conn_id!r}: {field}: expected the JSON text of a service account's key, as "
            "Google hands it out."
        )
    return _given(project=extra.get("project"), token=key)


def _read(connection: Connection, path: str) -> str:
    try:
        return Path(path).read_text()
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise SpecError(f"storage_conn_id: {connection.conn_id!r}: extra.key_path: {error}") from None


def _azure(connection: Connection) -> Options:
    extra = _extra(connection, {"connection_string", "sas_token", "tenant_id", "account_name"})
    # With a tenant, login and password are an application's, and the account is the host's first part.
    named = "" if extra.get("connection_string") else _account_in(connection)
    account = extra.get("account_name") or named
    if extra.get("tenant_id"):
        return _given(
            account_name=account,
            tenant_id=extra["tenant_id"],
            client_id=connection.login,
            client_secret=connection.password,
        )
    return _given(
        account_name=account or connection.login,
        account_key=connection.password,
        connection_string=extra.get("connection_string"),
        sas_token=extra.get("sas_token"),
    )


def _account_in(connection: Connection) -> str:
    """Return the storage account that the host names: alone, or in its address at Azure."""
    host = (connection.host or "").strip()
    found = _AZURE_HOST.fullmatch(host)
    if host and not found:
        raise SpecError(
            f"storage_conn_id: {connection.conn_id!r}: host {host!r} is not honoured, only an account's name or its "
            "https://<account>.blob.core.windows.net. For another place, give extra.connection_string, or "
            "storage_options."
        )
    return found["account"] if found else ""


_AZURE_HOST = re.compile(r"(https://)?(?P<account>[a-z0-9-]+)(\.(blob|dfs)\.core\.windows\.net)?/?", re.I)
_KINDS: Mapping[str, tuple[tuple[str, ...], Callable[[Connection], Options]]] = {
    "aws": (("s3", "s3a"), _aws),
    "google_cloud_platform": (("gs", "gcs"), _google),
    "wasb": (("abfs", "abfss", "az"), _azure),
    "adls": (("abfs", "abfss", "az"), _azure),
}
# What people give instead, where a field stands for a role.
_INSTEAD = {
    "role_arn": "A role's keys end within the hour, in the middle of a task. Leave storage_conn_id out and give the "
    "cluster's nodes that role, or put the keys of a user into the connection's login and password",
    "host": "Name the storage's address in extra.endpoint_url",
    "aws_access_key_id": "Put it into the connection's login",
    "aws_secret_access_key": "Put it into the connection's password",
}


def _extra(connection: Connection, known: set[str]) -> dict[str, Any]:
    # The form stores a field that was left empty as null or as nothing.
    given = {name: value for name, value in said_in_extra(connection).items() if value not in (None, "", {})}
    _only(connection, "extra", given, known)
    return given


def _only(connection: Connection, where: str, given: Any, known: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise SpecError(f"storage_conn_id: {connection.conn_id!r}: {where}: expected an object.")
    unknown = sorted({*given} - known, key=lambda name: (name not in _INSTEAD, name))
    if unknown:
        instead = _INSTEAD.get(unknown[0], "Give the job credentials of its own, or the cluster's nodes an identity")
        raise SpecError(
            f"storage_conn_id: {connection.conn_id!r}: {where}.{unknown[0]} is not honoured; known are "
            f"{', '.join(sorted(known))}. {instead}."
        )


def _given(**options: Any) -> Options:
    return {name: value for name, value in options.items() if value not in (None, "", {})}
