"""``@task.raylm``: an inference task whose BatchSpec a function returns when the task runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import DecoratedOperator, TaskDecorator, task_decorator_factory
from airflow.sdk.definitions.context import context_merge

from airflow_provider_raylm.compat import determine_kwargs
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.checks import FIELDS
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.operators.retries import no_retries_in_vain
from airflow_provider_raylm.specs import BatchSpec, with_new_names

if TYPE_CHECKING:
    from airflow.sdk import Context


class RayLMDecoratedOperator(DecoratedOperator, BatchInferenceOperator):
    """Answers the rows that a function's BatchSpec tells.

    Args:
        python_callable: returns a BatchSpec or a dict with its fields.
        batch: fields of the BatchSpec that the function need not return; what it returns goes over them. Strings in it
            may be Jinja templates.
        render_returned: whether strings in what the function returns are Jinja templates, too. A template reads
            connections and variables: only for a function that returns nothing of a run's conf, params or XComs.
        **kwargs: as BatchInferenceOperator's, and what TaskFlow gives the function.
    """

    custom_operator_name = "@task.raylm"
    # What the function returned is known only when it has run.
    overwrite_rtif_after_execution = True
    rendered_as_the_dag_says = tuple(DecoratedOperator.template_fields)
    template_fields = (*DecoratedOperator.template_fields, *BatchInferenceOperator.template_fields)
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **DecoratedOperator.template_fields_renderers,
        **BatchInferenceOperator.template_fields_renderers,
    }

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        batch: BatchSpec | Mapping[str, Any] | None = None,
        render_returned: bool = False,
        **kwargs: Any,
    ) -> None:
        # The function may return any field.
        unknown: dict[str, Any] = dict.fromkeys(FIELDS)
        super().__init__(python_callable=python_callable, batch={**unknown, **_fields_of(batch or {})}, **kwargs)
        self.batch = {name: one for name, one in self.batch.items() if one is not None}
        self.render_returned = render_returned

    def settle(self, context: Context) -> None:
        """Call the function, and put what it returns over the fields of its batch.

        Raises:
            SpecError: the function returned something else, or what it returned does not fit.
        """
        context_merge(context, self.op_kwargs)
        kwargs = determine_kwargs(self.python_callable, self.op_args, context)
        returned = self.python_callable(*self.op_args, **kwargs)
        if not isinstance(returned, BatchSpec | Mapping):
            raise SpecError(
                f"@task.raylm: {self.task_id} returned {type(returned).__name__}, not a BatchSpec or a dict"
            )
        fields = _fields_of(returned)
        # Airflow has rendered the fields of `batch`; rendered again, what a run's conf put there would be a template.
        if self.render_returned:
            fields = self.render_template(fields, context, self.text_env())
        self.batch = {**self.batch, **fields}

    def execute(self, context: Context) -> dict[str, Any]:
        """Call the function, then do as BatchInferenceOperator.

        Raises:
            SpecError: the function returned something else, or what it returned does not fit.
        """
        with no_retries_in_vain(self.gone_for_good):
            self.settle(context)
        result: dict[str, Any] = super().execute(context)
        return result


def _fields_of(batch: Any) -> Mapping[str, Any]:
    """Return fields of a BatchSpec, by today's names.

    Raises:
        SpecError: *batch* is neither a BatchSpec nor a dict.
    """
    if isinstance(batch, BatchSpec):
        batch = batch.model_dump(mode="json", exclude_unset=True)
    if not isinstance(batch, Mapping):
        raise SpecError(
            f"@task.raylm: batch: expected a dict of BatchSpec's fields, got {type(batch).__name__}. What another task "
            "returns is taken as an argument of the function, which returns it."
        )
    return with_new_names(BatchSpec, batch)


def raylm_task(python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> TaskDecorator:
    """Make an inference task of a function; see RayLMDecoratedOperator.

    What it returns is a report: one XCom, whatever type the function that makes the spec declares.
    """
    kwargs.setdefault("multiple_outputs", False)
    return task_decorator_factory(
        python_callable=python_callable, decorated_operator_class=RayLMDecoratedOperator, **kwargs
    )
