"""The deployment that answers blocks of rows: Ray's own LLM server plus one method.

One handle call per row costs more than a small model's answer. Inside, every row is an ordinary vLLM request
(``questions``), so the engine batches. Which rows are inside is not the blocks' affair: all rows of all callers wait in
one place (``admission``).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.constants import ENV_VARS_TO_PROPAGATE
from ray.serve.llm.deployment import LLMServer

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch.exchange import Part, unpacked
from airflow_provider_raylm.cluster.engine.llm import hang_timeout, llm_config
from airflow_provider_raylm.cluster.replica import adapters, secret_env
from airflow_provider_raylm.cluster.replica.admission import Admission, Door
from airflow_provider_raylm.cluster.replica.callers import Callers
from airflow_provider_raylm.cluster.replica.questions import Questions
from airflow_provider_raylm.cluster.replica.serving import in_parts
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.specs import EngineSpec

_ERROR_LINE = re.compile(r"\b(\w*(?:Error|Exception): .+)")


class NodeStart(CallbackBase):
    """What Ray does on the engine's nodes before the engine starts: download the model, and load its configuration.

    Takes two keyword arguments: ``secret_env``, the EngineSpec's, and ``download``, False for a model that lies on a
    path of the cluster. Ray would start a process on every node, which imports vLLM, to find that there is nothing to
    download.
    """

    async def on_before_node_init(self) -> None:
        """Let Ray's helpers read the secrets themselves, and leave out a download of nothing."""
        self.ctx.run_init_node = self.kwargs["download"]
        # Ray copies the values of HF_TOKEN and its like into the helpers' runtime_env, which its state API shows.
        shown = {
            name: value
            for name, value in (self.ctx.runtime_env or {}).get("env_vars", {}).items()
            if name not in ENV_VARS_TO_PROPAGATE
        }
        env_vars = {**shown, **secret_env.loaded_by_workers(self.kwargs["secret_env"])}
        self.ctx.runtime_env = {**(self.ctx.runtime_env or {}), "env_vars": env_vars}


class BlockLLMServer(LLMServer):
    """An LLM server whose unit of work is a block of requests."""

    async def __init__(self, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the engine.

        Args:
            spec: the EngineSpec as JSON values.

        Raises:
            EngineError: it did not start; the text carries vLLM's own reason.
        """
        engine = EngineSpec.model_validate(spec)
        # vLLM's processes inherit it; Ray would show an environment of its own to whoever looks at the replica.
        secret_env.load(engine.secret_env)
        log_starts = _log_sizes()
        self._callers = Callers()
        self._copies = TemporaryDirectory(prefix="raylm-adapters-")
        try:
            places = await asyncio.to_thread(adapters.fetch, engine.adapters, self._copies.name)
            await super().__init__(llm_config(engine, await asyncio.to_thread(adapters.engine_kwargs, places)))
            await adapters.load(self.engine._oai_models, places)
            if "max_cpu_loras" not in engine.engine_kwargs:
                # vLLM has all of them in memory: a replica that is killed leaves nothing on its node.
                self._copies.cleanup()
        except Exception as error:
            reason = _reason(error)
            if "engine core" in reason.lower():
                # vLLM's engine process dies with its reason printed, not raised.
                reason = _last_error(log_starts) or reason
            raise EngineError(reason) from None
        tasks = await self.engine._engine_client.get_supported_tasks()
        self._admission = Admission(self._config.scheduler_config.max_num_seqs)
        self._questions = Questions(self.engine, self.ping, tasks, self._admission.fit)
        self._hang_timeout = hang_timeout(engine)
        self._replica = serve.get_replica_context().replica_id.unique_id

    @property
    def _config(self) -> Any:
        """Return the engine's configuration as vLLM has it."""
        return self.engine._engine_client.vllm_config

    async def about(self) -> dict[str, Any]:
        """Return what a task has to know of this replica.

        ``version`` is this package's, ``replica`` the replica's id, ``capacity`` how many requests the engine works on
        at a time at most (vLLM's ``max_num_seqs``), ``cache_tokens`` how many tokens its cache of keys and values
        holds, ``vector_size`` how many numbers an embedding has, and ``tasks`` the outputs of the tasks that have rows
        here.
        """
        cache = self._config.cache_config
        caches = cache.enable_prefix_caching and cache.num_gpu_blocks
        return {
            "version": __version__,
            "replica": self._replica,
            "capacity": int(self._config.scheduler_config.max_num_seqs),
            "cache_tokens": cache.num_gpu_blocks * cache.block_size if caches else 0,
            "vector_size": int(self._config.model_config.embedding_size),
            "tasks": self._admission.tasks,
        }

    async def ping(self) -> None:
        """Return when the engine's scheduler has answered; vLLM's own health check only sees a process that is gone.

        Raises:
            EngineError: the engine is dead.
        """
        try:
            await self.engine._engine_client.is_sleeping()
        except Exception as error:
            raise EngineError(_reason(error)) from None

    async def check_health(self) -> None:
        """Let Serve replace this replica when its engine is dead, or has hung for as long as the spec allows.

        What its rows and callers wait for will not come then: they are told at once, so that they can go elsewhere and
        nothing keeps the replica from its end.
        """
        # One that has ended stays so, also when its engine should wake up.
        self._admission.require_open()
        try:
            async with asyncio.timeout(self._hang_timeout):
                await super().check_health()
                await self.ping()
        except TimeoutError:
            self._admission.end(EngineError(f"the engine has not answered for {self._hang_timeout:g} s"))
            raise
        except Exception as error:
            self._admission.end(EngineError(_reason(error)))
            raise

    async def run_block(
        self,
        *pieces: bytes,
        question: str,
        rows: int,
        task: str,
        timeout: float | None,
        caller: Any = None,
        alone: bool = False,
        near: str | None = None,
    ) -> AsyncIterator[Part]:
        """Answer requests, in parts as the answers come.

        A row that was refused, or ran out of its time, is a ``Refusal``. Cancelling the call aborts what is still
        running, and so does the caller's death.

        Args:
            *pieces: what is each row's own, ``packed``.
            question: what the requests share, as JSON text with the kind of question it is.
            rows: how many requests there are; the request router's affair.
            task: whose rows they are; the engine's places are shared between tasks, not between rows.
            timeout: seconds that a row may be in the engine; None for as long as it gets tokens.
            caller: handle of the actor that waits for the answers.
            alone: answer them while nobody else's rows are in the engine; if it fails then, it is their doing.
            near: what the block should be answered near to; the request router's affair.

        Raises:
            EngineError: the engine failed in a way that is not one row's fault.
            BatchError: it refuses what the requests share.
        """
        with self._callers.waiting(caller), self._admission.block(task, alone) as door:
            block = await self._questions.rows(question, unpacked(pieces), timeout)
            door = partial(self._proven, door) if alone else door
            async with aclosing(in_parts(self._replica, block, self._admission, door)) as parts:
                try:
                    async for part in parts:
                        yield part
                except EngineError as error:
                    if self.engine._engine_client.errored:
                        # Rows that still wait have had no part in its death, and no engine to wait for.
                        self._admission.end(error)
                    raise

    @asynccontextmanager
    async def _proven(self, door: Door, entered: Callable[[], None]) -> AsyncIterator[None]:
        """Enter an engine that is well: whoever was inside before may have killed it, which is not this row's doing."""
        async with door(_nothing):
            await self.ping()
            entered()
            yield

    async def __del__(self) -> None:
        """End the engine's processes; Serve calls this when the replica stops in good order."""
        client = getattr(getattr(self, "engine", None), "_engine_client", None)
        if client is not None:
            client.shutdown()
        if hasattr(self, "_copies"):
            self._copies.cleanup()
        await super().__del__()


def _nothing() -> None:
    """Take no note."""


def _reason(error: BaseException) -> str:
    """Return the innermost sentence of a nested failure."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _own_logs() -> list[Path]:
    """Return the files that this process's output goes to; its children inherit them."""
    found = (Path(os.readlink(f"/proc/self/fd/{fd}")) for fd in (1, 2) if os.path.exists(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.is_file()]


def _log_sizes() -> dict[Path, int]:
    return {path: path.stat().st_size for path in _own_logs()}


def _last_error(since: dict[Path, int]) -> str | None:
    """Return the first error that was printed since the given sizes, other than the one that wraps it."""
    for path, start in since.items():
        with path.open("rb") as log:
            log.seek(start)
            text = log.read(1 << 20).decode(errors="replace")
        causes = [m for m in _ERROR_LINE.findall(text) if "engine core" not in m.lower()]
        if causes:
            return str(causes[0])
    return None
