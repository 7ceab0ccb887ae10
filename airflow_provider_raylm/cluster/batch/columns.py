"""What the files of a task have to agree on before a row of them is asked: columns, types, ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch import json_text
from airflow_provider_raylm.cluster.batch.formats import ids_of, plain, samples
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID, Contents, File, Fragment, Reading
from airflow_provider_raylm.cluster.batch.ids import find_repeated, is_bytes
from airflow_provider_raylm.cluster.batch.rows.values import exact, missing_columns
from airflow_provider_raylm.cluster.batch.storage import REQUESTS_AT_A_TIME, reading
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import RESERVED_PREFIX, BatchSpec


def one_schema(spec: BatchSpec, fragments: Sequence[Fragment], contents: Sequence[Contents]) -> pa.Schema:
    """Return the columns that the task needs, each with the one type that holds what all files have of it.

    Raises:
        BatchError: there is none.
    """
    wanted = _wanted(spec)
    types: dict[str, pa.Field] = {}
    origin: dict[str, Fragment] = {}
    for schema, told, fragment in _distinct(fragments, contents):
        for field in [*plain(schema), *(pa.field(name, pa.string()) for name, _ in told)]:
            before = types.get(field.name)
            if field.name.startswith(RESERVED_PREFIX) or (wanted is not None and field.name not in wanted):
                continue
            if before is None:
                types[field.name], origin[field.name] = field, fragment
            elif not before.type.equals(field.type):
                types[field.name] = _common(before, field, fragment, origin[field.name])
    # Null is what JSON files say of a column in which no row has a value.
    return pa.schema([pa.field(field.name, json_text.column_type(field.type)) for field in types.values()])


def _distinct(fragments: Sequence[Fragment], contents: Sequence[Contents]) -> Iterator[tuple[Any, Any, Fragment]]:
    """Yield each schema once, with the columns of the path, and a fragment that has them."""
    seen: set[tuple[pa.Schema, tuple[str, ...]]] = set()
    for fragment, found in zip(fragments, contents, strict=True):
        key = (found.schema, tuple(name for name, _ in fragment.partition))
        if key not in seen:
            seen.add(key)
            yield found.schema, fragment.partition, fragment


def _common(before: pa.Field, field: pa.Field, fragment: Fragment, origin: Fragment) -> pa.Field:
    from_json = [one.file.format == "jsonl" for one in (origin, fragment)]
    if all(from_json):
        return field.with_type(json_text.common(before.type, field.type))
    try:
        return _promoted(before, field)
    except pa.ArrowException:
        # What JSON says can always be text, as it is written; bytes cannot.
        if any(from_json) and not any(map(is_bytes, (before.type, field.type))):
            return field.with_type(pa.string())
        raise BatchError(
            f"the column {field.name!r} is of type {before.type} in {origin.file.uri} and of type {field.type} in "
            f"{fragment.file.uri}; no one type holds both. Leave it out (columns=), or ask the files apart."
        ) from None


def _promoted(before: pa.Field, field: pa.Field) -> pa.Field:
    kinds = (before.type, field.type)
    if any(map(pa.types.is_decimal, kinds)) and any(map(pa.types.is_floating, kinds)):
        # Arrow would make them doubles, which lack a decimal's last digits.
        raise pa.ArrowTypeError("no type holds decimals and doubles")
    return pa.unify_schemas([pa.schema([before]), pa.schema([field])], promote_options="permissive").field(0)


def check_values(how: Reading, fragments: Sequence[Fragment], contents: Sequence[Contents], schema: pa.Schema) -> None:
    """Check that values fit where a column has another type over all files than in one of them.

    Raises:
        BatchError: one does not; the text names the column and the file.
    """
    # Thousands of files share few schemas, each one object.
    schemas = {id(found.schema): found.schema for found in contents}
    by_schema = {key: _doubtful(own, schema) for key, own in schemas.items()}
    doubtful = [
        (fragment.file, *fields)
        for fragment, found in zip(fragments, contents, strict=True)
        for fields in by_schema[id(found.schema)]
    ]

    def check(of: tuple[File, pa.Field, pa.Field]) -> None:
        file, here, everywhere = of
        with reading(file.uri, file.format):
            for column in samples(file, how, here):
                cast(column, everywhere)

    with ThreadPoolExecutor(REQUESTS_AT_A_TIME, thread_name_prefix="raylm-fit") as pool:
        list(pool.map(check, doubtful))


def _doubtful(own: pa.Schema, common: pa.Schema) -> list[tuple[pa.Field, pa.Field]]:
    """Return the fields of which values may not fit, as a file has them and as all have them."""
    pairs = [(field, common.field(field.name)) for field in plain(own) if field.name in common.names]
    return [(here, everywhere) for here, everywhere in pairs if not _always_fits(here.type, everywhere.type)]


def _always_fits(own: pa.DataType, common: pa.DataType) -> bool:
    """Return whether no value of a type can fail in the wider one, so that it need not be looked at."""
    if own.equals(common):
        return True
    if pa.types.is_integer(own):
        # Of integers with 64 bits some need 19 digits, of which Arrow's decimals leave 18.
        return pa.types.is_string(common) or bool(own.bit_width <= min(common.bit_width // 2, 32))
    if pa.types.is_list(own) and pa.types.is_list(common):
        return _always_fits(own.value_type, common.value_type)
    # Arrow's own choice for text, bytes, decimals and fractions is wide enough.
    wide = any(is_it(common) for is_it in (pa.types.is_string, pa.types.is_large_string, is_bytes, pa.types.is_decimal))
    return bool(pa.types.is_null(own) or pa.types.is_floating(own) or wide)


def cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """Return a column in the type that holds what all files have of it.

    Raises:
        ValueError: a value does not fit into it.
    """
    if pa.types.is_string(field.type) and pa.types.is_nested(column.type):
        # Beside JSON, of which each row keeps its own text.
        return pa.chunked_array([[json_text.as_text(value) for value in exact(column).to_pylist()]], field.type)
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise ValueError(
            f"the column {field.name!r} is {column.type} here and {field.type} with what other files have of it: "
            f"{error}. Leave it out (columns=), or ask the files apart."
        ) from error


def check_columns(
    spec: BatchSpec, fragments: Sequence[Fragment], contents: Sequence[Contents], schema: pa.Schema
) -> None:
    """Check that every file has the columns that the spec names, and none that an answer would take the place of.

    Raises:
        BatchError: otherwise; the text names the column and the file.
    """
    named = {*(spec.columns or ()), *([spec.id_column] if spec.id_column else [])}
    for has, told, fragment in _distinct(fragments, contents):
        own = [name for name in (*has.names, *(name for name, _ in told)) if not name.startswith(RESERVED_PREFIX)]
        if not has.names and fragment.rows == 0:
            continue
        missing = missing_columns(spec.all_steps, own) if spec.preprocess is None else []
        # A JSON object may leave out what is null.
        lacking = [*missing, *sorted(named - {*own, ROW_ID})]
        if fragment.file.format == "jsonl":
            lacking = [name for name in lacking if name not in schema.names]
        if lacking:
            where = f" ({fragment.file.uri})" if len(fragments) > 1 else ""
            raise BatchError(
                f"the source has no column {', '.join(map(repr, dict.fromkeys(lacking)))}; it has "
                f"{', '.join(own) or 'none'}{where}"
            )
    kept = set(spec.columns if spec.columns is not None else schema.names)
    taken = [one for step in spec.all_steps for one in step.output_columns if one in kept & set(schema.names)]
    if taken:
        where = next(f.file.uri for f, c in zip(fragments, contents, strict=True) if taken[0] in _names(f, c))
        raise BatchError(
            f"output_column {taken[0]!r} is a column of the source ({where}), which is never overwritten. Choose "
            "another output_column, or leave that column out with columns=."
        )


def _names(fragment: Fragment, found: Contents) -> list[str]:
    return [*found.schema.names, *(name for name, _ in fragment.partition)]


def _wanted(spec: BatchSpec) -> set[str] | None:
    """Return the columns to read; None for all, which is what a row function may look at."""
    if spec.columns is None or spec.preprocess is not None or spec.postprocess is not None:
        return None
    return {*spec.columns, *(name for step in spec.all_steps for name in step.columns_used)}


def check_ids(
    spec: BatchSpec, how: Reading, fragments: Sequence[Fragment], contents: Sequence[Contents], twice: set[int]
) -> None:
    """Check that no two rows have one id, as far as ids come from a column.

    Args:
        spec: the task.
        how: how files are read.
        fragments: the files.
        contents: what the look at each told.
        twice: hashes of ids that were met more than once.

    Raises:
        BatchError: two rows share an id; the text names it.
    """
    with_ids = [(f, c) for f, c in zip(fragments, contents, strict=True) if f.has_ids]
    every = (texts for f, c in with_ids for texts in ids_of(f.file, how, c.schema))
    if twice:
        repeated = find_repeated(twice, every)
    elif with_ids and len(with_ids) < len(fragments):
        repeated = next((one for texts in every for one in texts.to_pylist() if _is_made(one, fragments)), None)
    else:
        return
    if repeated is not None:
        raise BatchError(
            f"ids of the column {spec.id_column or ROW_ID!r} stand on several rows, {repeated!r} for one. Ids must be "
            "unique: read each row once, or name another id_column. (Outputs of two tasks over one source carry the "
            "same ids.)"
        )


def _is_made(one: str, fragments: Sequence[Fragment]) -> bool:
    """Return whether a row of a file without ids gets this one."""
    match = re.fullmatch(r"(\d{5,})-(\d{9,})", one)
    if match is None or int(match[1]) >= len(fragments):
        return False
    fragment = fragments[int(match[1])]
    return not fragment.has_ids and (fragment.rows is None or int(match[2]) < fragment.rows)
