"""One inference task for each of several sources, or of any other field: what ``engine.infer.partial`` maps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.checks import (
    FIELDS,
    known_batches,
    known_output,
    renderable,
    require_kinds,
    require_own_outputs,
    require_storage,
)
from airflow_provider_raylm.operators.places import assets_of
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.specs import BatchSpec, RuntimeEnv, with_new_names

if TYPE_CHECKING:
    from airflow.sdk import XComArg
    from airflow.sdk.definitions.mappedoperator import MappedOperator


class MappedFieldsOperator(BatchInferenceOperator):
    """A BatchInferenceOperator that takes BatchSpec's fields one by one, too, so that Airflow can map each.

    Args:
        fields: several of them; they go over those in ``batch``.
        **kwargs: BatchSpec's fields, which go over both, and BatchInferenceOperator's arguments.
    """

    custom_operator_name = "BatchInferenceOperator"

    def __init__(self, *, batch: Mapping[str, Any], fields: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs = dict(with_new_names(BatchSpec, kwargs))
        own = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        super().__init__(batch={**batch, **with_new_names(BatchSpec, fields or {}), **own}, **kwargs)

    # Airflow maps what a signature names, and looks at it when the class is made.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(one for one in inspect.signature(__init__).parameters.values() if one.kind is not one.VAR_KEYWORD),
            *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in FIELDS),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )


class PartialInference:
    """An inference task that lacks the fields over which it will be mapped.

    Args:
        task_id: the task's id.
        batch: fields of BatchSpec that are the same for all.
        arguments: BatchInferenceOperator's other arguments.
    """

    def __init__(self, task_id: str, batch: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        self._task_id = task_id
        self._batch = batch
        inlets, outlets = assets_of(batch)
        given = {"inlets": inlets or None, "outlets": outlets or None}
        arguments = {**{name: one for name, one in given.items() if one}, **arguments}
        require_storage(arguments.get("storage_conn_id"), arguments.get("storage_options"))
        renderable(RuntimeEnv, arguments.get("runtime_env"))
        self._partial = MappedFieldsOperator.partial(task_id=task_id, batch=dict(batch), **arguments)

    def expand(self, **mapped: Any) -> MappedOperator:
        """Make a task for each value, or each combination of values: a list, or what an earlier task returns.

        Raises:
            SpecError: a field that is known when the DAG is parsed is bad, or all would have one output.
        """
        mapped = dict(with_new_names(BatchSpec, mapped))
        self._require_new(mapped)
        if "output" not in mapped:
            self._require_open_output()
        elif len(mapped) > 1:
            raise SpecError(
                f"batch.output: expand combines each output with each value of {', '.join({*mapped} - {'output'})}, so "
                "that several tasks would have one. Pair them: expand_kwargs([{...}, ...])."
            )
        return self._checked(self._partial.expand(**mapped))

    def expand_kwargs(self, mapped: Sequence[Mapping[str, Any]] | XComArg) -> MappedOperator:
        """Make a task for each dict of fields: a list of them, or what an earlier task returns.

        Raises:
            SpecError: a field that is known when the DAG is parsed is bad, or all would have one output.
        """
        if not isinstance(mapped, Sequence):
            self._require_open_output()
            return self._checked(self._partial.expand_kwargs(mapped))
        mapped = [with_new_names(BatchSpec, one) for one in mapped]
        for one in mapped:
            self._require_new(one)
        # As Airflow leaves templates in such dicts alone, but not in those within them.
        return self._checked(self._partial.expand_kwargs([_with_fields_together(one) for one in mapped]))

    def _require_new(self, mapped: Iterable[str]) -> None:
        twice = sorted({*mapped} & {*self._batch} - {"output_column"})
        if twice:
            raise SpecError(f"{self._task_id}: {twice[0]} is given to partial, too")

    def _require_open_output(self) -> None:
        output = known_output(self._batch)
        if output is not None:
            raise SpecError(
                f"batch.output: {output} would be the output of every task that {self._task_id} is mapped to. Map it, "
                "too, or put {{ ti.map_index }} into it."
            )

    def _checked(self, task: MappedOperator) -> MappedOperator:
        for batch in known_batches(task):
            renderable(BatchSpec, batch)
            require_kinds(batch, task.partial_kwargs.get("engine"))
        require_own_outputs(task)
        return task


def _with_fields_together(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: one for name, one in kwargs.items() if name in FIELDS}
    return {**{name: one for name, one in kwargs.items() if name not in fields}, "fields": fields}
