"""Rows that begin alike go to one replica, when the beginnings of all are too many for the cache of each. No Ray.

An engine keeps the keys and values of what it has read, as much as its cache holds, and of a row that begins like one
before computes only the rest. Replicas do not share their caches: when rows go anywhere, each replica has to keep all
beginnings. When every beginning has its replica, each keeps a part.
"""

from __future__ import annotations

import asyncio
import zlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from airflow_provider_raylm.cluster.batch.exchange import Content, Outcome, Request
from airflow_provider_raylm.cluster.batch.recovery import Ask
from airflow_provider_raylm.cluster.routing import numbered

# The usual rule for English. Where a token is shorter, text is longer than it seems, and this acts later than it could.
CHARACTERS_PER_TOKEN = 4
# By so many characters after what all rows share, beginnings are told apart: 64 tokens, four blocks of vLLM's cache.
# Rows that share less gain little.
TOLD_APART_BY = 256
# What all rows share is looked for so far.
LOOKED_AT = 16_384
# The share of rows that have to gain, of the last few thousand. A block of several calls costs a little more than one.
GAINING = 1 / 8
ROWS_REMEMBERED = 8_192
# One takes about 150 bytes.
BEGINNINGS_KEPT = 50_000


class Beginnings:
    """Tells beginnings of rows apart, and what it would gain to give each its replica.

    A row gains when one with the same beginning has been asked before, so long ago that a cache through which all rows
    pass has lost it, but not one through which only a replica's share of them passes. Time is counted in tokens.
    """

    def __init__(self) -> None:
        self._shared: str | None = None
        self._asked: dict[int, float] = {}
        self._tokens = 0.0
        self._rows = 0
        self._gained = 0
        self._gaining = False

    def gaining(self, requests: Sequence[Request], replicas: int, cache_tokens: int) -> tuple[bool, list[int]]:
        """Return whether enough rows gain, these and those before; and what each of these begins with, as a number."""
        texts = [_text(request.content) for request in requests]
        skip = self._after_shared(texts)
        asked = self._asked
        tokens = self._tokens
        farthest = replicas * cache_tokens
        keys = []
        for text in texts:
            beginning = text[skip : skip + TOLD_APART_BY].encode(errors="surrogatepass")
            # The same in every process, which Python's own hash is not. Two that are mistaken for one share a replica.
            key = zlib.crc32(beginning)
            keys.append(key)
            before = asked.pop(key, None)
            if before is not None and cache_tokens < tokens - before <= farthest:
                self._gained += 1
            asked[key] = tokens
            tokens += len(text) / CHARACTERS_PER_TOKEN
        self._tokens = tokens
        while len(asked) > BEGINNINGS_KEPT:
            # The one that was asked longest ago: a dictionary keeps the order in which keys were added.
            del asked[next(iter(asked))]
        self._rows += len(texts)
        # Once on, it goes off at half of that, or it would switch to and fro.
        self._gaining = self._gained >= self._rows * (GAINING / 2 if self._gaining else GAINING)
        if self._rows > ROWS_REMEMBERED:
            self._rows //= 2
            self._gained //= 2
        return self._gaining, keys

    def _after_shared(self, texts: list[str]) -> int:
        """Return how many characters all rows share, these and those before.

        They get fewer with a row that begins otherwise; then what was known of beginnings is worth nothing.
        """
        # What the first and the last in the alphabet share, all others do.
        here = _common(min(texts)[:LOOKED_AT], max(texts)[:LOOKED_AT])
        if self._shared is None:
            self._shared = here
        elif not here.startswith(self._shared):
            self._shared = _common(here, self._shared)
            self._asked.clear()
            self._rows = self._gained = 0
            self._gaining = False
        return len(self._shared)


def by_prefix(ask: Ask, replicas: Callable[[], int], cache_tokens: Callable[[], int]) -> Ask:
    """Return a function that asks rows with a common beginning of one replica, where that gains something.

    It does when several replicas run, when beginnings come again, and when those that come in between do not fit into
    one replica's cache. Then a block is asked in one call per replica at most, side by side. Otherwise, and when the
    caller says where the block should go, it is asked as it is.

    Args:
        ask: the way to the engine.
        replicas: returns how many run.
        cache_tokens: returns how many tokens a replica keeps; 0 when it keeps none, or it is not known.
    """
    beginnings = Beginnings()

    async def ask_apart(question: str, requests: Sequence[Request], near: str | None = None) -> list[Outcome]:
        running, kept = replicas(), cache_tokens()
        if near is not None or running < 2 or not kept or not requests:
            return await ask(question, requests, near)
        gaining, keys = beginnings.gaining(requests, running, kept)
        if not gaining:
            return await ask(question, requests, None)
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, key in enumerate(keys):
            rows_of[bucket(key, running)].append(row)
        answers = await _together(
            ask(question, [requests[row] for row in rows], numbered(number)) for number, rows in rows_of.items()
        )
        outcomes: dict[int, Outcome] = {}
        for rows, got in zip(rows_of.values(), answers, strict=True):
            outcomes.update(zip(rows, got, strict=True))
        return [outcomes[row] for row in range(len(requests))]

    return ask_apart


async def _together(calls: Any) -> list[Any]:
    """Return what all calls return; the first error ends the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def bucket(key: int, buckets: int) -> int:
    """Return a key's bucket; of one more bucket, all others keep their keys but for what goes to the new one.

    Lamping and Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm" (2014).
    """
    here, there = 0, 0
    while there < buckets:
        here = there
        key = (key * 2862933555777941757 + 1) & 0xFFFFFFFFFFFFFFFF
        there = int((here + 1) * ((1 << 31) / ((key >> 33) + 1)))
    return here


def _text(content: Content) -> str:
    """Return a prompt or a conversation as text that begins as what the engine reads does."""
    if isinstance(content, str):
        return content
    return "\0".join([f"{message['role']}\0{message['content']}" for message in content])


def _common(one: str, other: str) -> str:
    """Return what two texts begin with."""
    lengths = range(min(len(one), len(other)) + 1)
    return one[: bisect_left(lengths, True, key=lambda length: one[:length] != other[:length]) - 1]
