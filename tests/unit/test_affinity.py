"""Rows that begin alike, and the one case in which they are sent apart from others."""

import asyncio
import math
import random
import time
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_raylm.cluster.batch import affinity
from airflow_provider_raylm.cluster.batch.affinity import Beginnings, bucket, by_prefix
from airflow_provider_raylm.cluster.batch.exchange import Answer, Request
from airflow_provider_raylm.cluster.routing import numbered

CHANCE = random.Random(7)
INSTRUCTIONS = [f"{i:04} " + "".join(CHANCE.choices("abcdefgh ", k=1_600)) for i in range(400)]
TOKENS = 400 * 400


class Engine:
    """Remembers its calls, and answers a row with itself."""

    def __init__(self):
        self.calls = []

    async def __call__(self, question, requests, near=None):
        contents = [request.content for request in requests]
        self.calls.append((contents, near))
        await asyncio.sleep(0)
        return [Answer(str(content), "stop", 1, 1) for content in contents]

    @property
    def names(self):
        return {near for _, near in self.calls}


def rows(count, instructions=INSTRUCTIONS, before="Task: ", order=CHANCE.choice):
    """Rows that begin with one of the instructions each."""
    return [f"{before}{order(instructions)}\nrow {i} of its own" for i in range(count)]


def ask_all(contents, replicas=2, cache_tokens=TOKENS // 2, block=256, engine=None, near=None):
    """Ask all rows in blocks through by_prefix, check that each has its own answer, and return the engine."""
    engine = engine or Engine()
    ask = by_prefix(engine, lambda: replicas, lambda: cache_tokens)

    async def run():
        for start in range(0, len(contents), block):
            part = contents[start : start + block]
            answers = await ask("{}", list(map(Request, part)), near)
            assert [answer.value for answer in answers] == [str(content) for content in part]

    asyncio.run(run())
    return engine


def instruction(content):
    """The number of a row's instruction."""
    text = content if isinstance(content, str) else content[-1]["content"]
    return int(text.removeprefix("Task: ")[:4])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("replicas", [2, 5])
def test_an_instruction_has_its_replica(replicas, chat):
    """Also in later blocks; a block is one call per replica at most, and each has about its share."""
    contents = rows(6_000)
    if chat:
        system = {"role": "system", "content": "You are helpful."}
        contents = [[system, {"role": "user", "content": content}] for content in contents]
    engine = ask_all(contents, replicas, TOKENS // replicas)
    apart = [(contents, near) for contents, near in engine.calls if near is not None]
    homes = defaultdict(set)
    sizes = defaultdict(int)
    for contents, near in apart:
        sizes[near] += len(contents)
        for content in contents:
            homes[instruction(content)].add(near)

    assert len(apart) <= replicas * math.ceil(6_000 / 256)
    assert sum(sizes.values()) > 4_000
    assert set(sizes) == {numbered(number) for number in range(replicas)}
    assert all(len(names) == 1 for names in homes.values())
    assert max(sizes.values()) < 1.4 * sum(sizes.values()) / replicas


SORTED = sorted(rows(6_000))
NEVER_TWICE = [f"Task: {i} " + "".join(CHANCE.choices("abc", k=400)) for i in range(6_000)]


@pytest.mark.parametrize(
    ("contents", "replicas", "cache_tokens", "near"),
    [
        pytest.param(rows(6_000), 1, TOKENS // 2, None, id="one replica"),
        pytest.param(rows(6_000), 2, TOKENS * 2, None, id="all instructions fit into one cache"),
        pytest.param(rows(6_000, INSTRUCTIONS[:3]), 2, TOKENS // 2, None, id="few instructions"),
        pytest.param(rows(6_000, INSTRUCTIONS[:1]), 2, 1_000, None, id="one instruction"),
        pytest.param(NEVER_TWICE, 2, TOKENS // 2, None, id="nothing comes again"),
        pytest.param(SORTED, 2, TOKENS // 2, None, id="in order of their instructions"),
        pytest.param(rows(6_000), 2, 0, None, id="no cache"),
        pytest.param(rows(6_000), 2, 1_000, None, id="too many for all caches together"),
        pytest.param(rows(6_000), 2, TOKENS // 2, "block 7", id="a block of several steps"),
    ],
)
def test_blocks_are_asked_as_they_are(contents, replicas, cache_tokens, near):
    """In one call, to wherever the caller says."""
    engine = ask_all(contents, replicas, cache_tokens, near=near)

    assert engine.names == {near}
    assert [len(contents) for contents, _ in engine.calls] == [min(256, 6_000 - i) for i in range(0, 6_000, 256)]


def test_it_ends_when_there_is_nothing_to_gain_any_more():
    """After a few thousand rows of another kind."""
    engine = ask_all(rows(6_000) + NEVER_TWICE * 4)

    assert numbered(0) in engine.names
    assert engine.calls[-1][1] is None


def test_what_all_rows_share_is_no_instruction():
    """However long it is, and though a first block of one instruction makes it look longer."""
    engine = ask_all(
        rows(256, INSTRUCTIONS[:1], before="x" * 3_000) + rows(8_000, before="x" * 3_000), cache_tokens=400_000
    )

    assert engine.names == {None, numbered(0), numbered(1)}


def test_an_error_ends_the_other_calls():
    """And is raised as it is."""
    begun, ended = [], []

    async def fails(question, requests, near):
        if near is None:
            return [Answer("", "stop", 1, 1)] * len(requests)
        begun.append(near)
        try:
            await asyncio.sleep(0 if len(begun) == 2 else 60)
        finally:
            ended.append(near)
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        _ask(fails, rows(6_000))
    assert len(begun) == 2
    assert sorted(begun) == sorted(ended)


def _ask(engine, contents):
    ask = by_prefix(engine, lambda: 2, lambda: TOKENS // 2)

    async def run():
        for start in range(0, len(contents), 256):
            await ask("{}", list(map(Request, contents[start : start + 256])), None)

    asyncio.run(run())


TEXTS = st.lists(st.sampled_from(["", "a", "ab", "abc" * 40, "abd" * 40, "é", "\ud800", "x" * 300]), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=8), st.lists(st.integers(1, 5), min_size=1), st.sampled_from([0, 1, 60, 1_000]))
def test_every_row_has_its_own_answer(blocks, replicas, cache_tokens):
    """In order, whatever rows there are and however many replicas come and go."""
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(affinity, "TOLD_APART_BY", 2)
        patched.setattr(affinity, "GAINING", 0)
        engine = Engine()
        count = iter(replicas * len(blocks))
        ask = by_prefix(engine, lambda: next(count, 1), lambda: cache_tokens)

        async def run():
            for contents in blocks:
                got = await ask("{}", list(map(Request, contents)), None)
                assert [answer.value for answer in got] == contents

        asyncio.run(run())
    assert sum(len(contents) for contents, _ in engine.calls) == sum(map(len, blocks))


ANY = st.text(max_size=40)


@given(ANY, st.lists(st.tuples(st.sampled_from("AB"), ANY), min_size=2), st.data())
def test_the_same_beginning_is_the_same_key(before, rows_, data):
    """In whichever block it comes, and in no other's place, once rows with both have been seen."""
    requests = [Request(before + kind * affinity.TOLD_APART_BY + own) for kind, own in [("A", ""), ("B", ""), *rows_]]
    cut = data.draw(st.integers(2, len(requests)))
    beginnings = Beginnings()
    keys = [key for part in (requests[:cut], requests[cut:]) if part for key in beginnings.gaining(part, 2, 100)[1]]

    assert [key == keys[0] for key in keys] == [True, False, *(kind == "A" for kind, _ in rows_)]


@given(st.integers(0, 2**64 - 1), st.integers(1, 64))
def test_a_replica_more_takes_from_all(key, buckets):
    """A key stays where it is, or goes to the new one."""
    assert bucket(key, buckets + 1) in {bucket(key, buckets), buckets}
    assert 0 <= bucket(key, buckets) < buckets


def test_memory_has_a_bound(monkeypatch):
    """Of beginnings, the ones that were asked last are kept."""
    monkeypatch.setattr(affinity, "BEGINNINGS_KEPT", 100)
    beginnings = Beginnings()
    for start in range(0, 1_000, 50):
        beginnings.gaining(list(map(Request, NEVER_TWICE[start : start + 50])), 2, 10_000)

    assert len(beginnings._asked) == 100


def test_looking_costs_little():
    """Less than 5 microseconds a row; nothing where there is one replica."""
    requests = list(map(Request, rows(20_000)))
    beginnings = Beginnings()
    took = []
    for start in range(0, len(requests), 256):
        begun = time.perf_counter()
        beginnings.gaining(requests[start : start + 256], 2, TOKENS * 2)
        took.append((time.perf_counter() - begun) / 256)

    # Of many, the one that was disturbed least: the machine may be busy.
    assert sorted(took)[len(took) // 4] < 5e-6
