"""Equal requests are asked once. No Ray, no vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Sequence

from airflow_provider_raylm.cluster.batch.exchange import Outcome, Refusal, Request
from airflow_provider_raylm.cluster.batch.recovery import Ask

# Of answers that are kept for rows to come: a hundred thousand of a sentence each, or some ten thousand embeddings.
KEPT_BYTES = 100_000_000
_ENTRY_BYTES = 300


def once(ask: Ask, keep: int = KEPT_BYTES) -> Ask:
    """Return a function that asks equal requests once and gives each of them the one answer, as a value of its own.

    A request that is in flight for another block is waited for. Of what was answered the last *keep* bytes are
    remembered.
    """
    flying: dict[bytes, asyncio.Future[bytes]] = {}
    kept: OrderedDict[bytes, bytes] = OrderedDict()
    held = 0

    def remember(key: bytes, outcome: bytes) -> None:
        nonlocal held
        kept[key] = outcome
        held += len(outcome) + _ENTRY_BYTES
        while held > keep:
            held -= len(kept.popitem(last=False)[1]) + _ENTRY_BYTES

    async def ask_new(question: str, requests: Sequence[Request], near: str | None = None) -> list[Outcome]:
        answers: list[bytes | asyncio.Future[bytes]] = []
        new: dict[bytes, Request] = {}
        for request in requests:
            key = _key(question, request)
            if key not in kept and key not in flying:
                flying[key] = asyncio.get_running_loop().create_future()
                new[key] = request
            answers.append(kept.get(key) or flying[key])
        # Own requests first: whoever waits for another block has none of its own left to ask.
        try:
            got = await ask(question, list(new.values()), near) if new else []
        except BaseException as error:
            for key in new:
                answer = flying.pop(key)
                answer.set_exception(error)
                # Perhaps nobody else waits for it.
                answer.exception()
            raise
        for key, outcome in zip(new, got, strict=True):
            packed_outcome = pickle.dumps(outcome, protocol=5)
            flying.pop(key).set_result(packed_outcome)
            # The engine's haste or rest is not the question's: after a time-out the next equal row is asked again.
            if not (isinstance(outcome, Refusal) and outcome.reason == "timeout"):
                remember(key, packed_outcome)
        # Each unpacked anew: what an answer keeps is a list, which a row function may change.
        return [pickle.loads(one if isinstance(one, bytes) else await one) for one in answers]  # noqa: S301  # made here

    return ask_new


def _key(question: str, request: Request) -> bytes:
    """Return what equal requests alone have; a row's turns may hold what JSON has no value for."""
    text = json.dumps([question, request], default=lambda value: pickle.dumps(value).hex())
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
