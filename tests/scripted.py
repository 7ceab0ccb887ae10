"""An engine made of a function, and a task on it without Ray: the real plan, reader, stage and output."""

import asyncio
import json

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.cluster.batch.loop import drained
from airflow_provider_raylm.cluster.batch.report import Tally
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer
from airflow_provider_raylm.cluster.batch.task import answer_blocks, answer_source
from airflow_provider_raylm.cluster.batch.window import Window
from airflow_provider_raylm.specs import EngineRef, Labels, Lease

REF = EngineRef(
    application="raylm-e-0",
    deployment="engine",
    model="m",
    fingerprint="engine",
    labels=Labels(installation="i", dag_id="d", run_id="r", engine="e"),
    lease=Lease(),
)


def shouts(fields, prompts):
    """Answer with the prompt in capitals; refuse what starts with "bad"."""
    return [
        Refusal("invalid_request", "refused") if prompt.startswith("bad") else Answer(prompt.upper(), "stop", 2, 3)
        for prompt in prompts
    ]


def asking(ask):
    """Return a way to the engine that a function of (fields, contents) is."""

    async def asked(question, requests, near=None):
        contents = [request.content for request in requests]
        return await asyncio.to_thread(ask, json.loads(question)["fields"], contents)

    return asked


def attempt(spec, ask=shouts, at_a_time=2, said=None, ref=REF, tally=None, **kwargs):
    """Run a task once, as a job does, and return its report; *tally* is left with what it counted."""
    answerer = BlockAnswerer(spec, EngineTraits.of(ref), asking(ask))
    say = said.append if said is not None else lambda line: None

    def blocks(work):
        block_rows = work.plan.block_rows
        return drained(lambda: answer_blocks(work, answerer, Window(at_a_time * block_rows, block_rows)))

    return answer_source(spec, ref, blocks, say, tally or Tally(), **kwargs)
