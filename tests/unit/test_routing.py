"""Which replica a call goes to: Serve's own routing loop, with replicas that only say how long their queue is."""

import asyncio
import subprocess
import sys
from collections import Counter
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from airflow_provider_raylm.cluster import routing
from airflow_provider_raylm.cluster.routing import RowsRouter, numbered

DEPLOYMENT = DeploymentID(name="engine", app_name="app")
NUMBERS = count()


class Replica:
    """What the router knows of a replica."""

    max_ongoing_requests = 100

    def __init__(self, name):
        self.replica_id = ReplicaID(name, deployment_id=DEPLOYMENT)
        self.queue = 0

    async def get_queue_len(self, *, deadline_s):
        return self.queue


class Calls:
    """A router, and calls that it has sent. It does with the router what Serve's own ``AsyncioRouter`` does."""

    def __init__(self, names="abc", clock=lambda: 0.0):
        self.router = RowsRouter(
            DEPLOYMENT,
            DeploymentHandleSource.UNKNOWN,
            use_replica_queue_len_cache=True,
            get_curr_time_s=clock,
            prefer_local_node_routing=True,
        )
        self.router.initialize_state()
        self.sent = {}
        self.run(*names)

    def run(self, *names):
        """Let these replicas run; those that did keep what they have."""
        known = {replica_id.unique_id: replica for replica_id, replica in self.router.curr_replicas.items()}
        self.router.update_replicas([known.get(name) or Replica(name) for name in names])

    async def let_queue(self, name, length):
        """Let a replica have so many calls, and Serve know it."""
        await asyncio.sleep(0.01)  # Serve asks a new replica once
        replica = next(one for one in self.router.curr_replicas.values() if one.replica_id.unique_id == name)
        replica.queue = length
        self.router.on_new_queue_len_info(replica.replica_id, length)

    async def send(self, rows=None, near=None, **kwargs):
        """Send a call and return (the replica it went to, its id)."""
        if rows is not None:
            kwargs |= {"rows": rows, "near": near}
        request = pending(kwargs)
        replica = await self.router._choose_replica_for_request(request)
        self.router.on_send_request(replica.replica_id)
        await asyncio.sleep(0)
        length = self.router.replica_queue_len_cache.get(replica.replica_id)
        self.router.on_new_queue_len_info(replica.replica_id, length)
        self.router.on_request_routed(request, replica.replica_id, None)
        request_id = request.metadata.internal_request_id
        self.sent[request_id] = replica.replica_id
        return replica.replica_id.unique_id, request_id

    def end(self, request_id):
        """Let a call end, one way or the other."""
        replica_id = self.sent.pop(request_id)
        self.router.on_request_completed(replica_id, request_id)
        self.router.decrement_queue_len_cache(replica_id)

    def rows(self):
        return {replica_id.unique_id: rows for replica_id, rows in self.router._rows_at.items()}


def pending(kwargs):
    return PendingRequest(args=[], kwargs=kwargs, metadata=RequestMetadata("r", f"call-{next(NUMBERS)}"))


async def test_blocks_go_where_the_fewest_rows_are():
    """By rows, not by calls."""
    calls = Calls("ab")
    first, big = await calls.send(100)
    second = [(await calls.send(20))[0] for _ in range(4)]
    calls.end(big)

    assert second == [{"a": "b", "b": "a"}[first]] * 4
    assert (await calls.send(1))[0] == first


async def test_blocks_that_come_at_once_spread():
    """Each counts from when it was chosen, not from when its replica has it."""
    calls = Calls("abcd")
    sent = await asyncio.gather(*(calls.send(10) for _ in range(40)))

    assert Counter(replica for replica, _ in sent) == dict.fromkeys("abcd", 10)


async def test_ties_are_broken_at_random():
    """Many callers must not all begin with the same replica."""
    firsts = {(await Calls("abc").send(1))[0] for _ in range(60)}

    assert firsts == set("abc")


async def test_what_others_sent_decides_between_equals():
    """As far as Serve knows; it may be wrong, so it never outweighs rows of ours."""
    calls = Calls("abc")
    await calls.let_queue("a", 3)
    await calls.let_queue("c", 90)

    assert [(await calls.send(5))[0] for _ in range(4)] == ["b", "a", "c", "b"]


async def test_a_name_goes_where_it_went_before():
    """The later steps of a block, though another replica has fewer rows by now."""
    calls = Calls("abc")
    homes = {near: await calls.send(10, near) for near in "xyz"}
    for _, request_id in homes.values():
        calls.end(request_id)
    await calls.send(10, "other")
    again = {near: (await calls.send(10, near))[0] for near in "xyz"}

    assert again == {near: replica for near, (replica, _) in homes.items()}


async def test_a_name_moves_when_its_replica_would_keep_another_idle():
    """From there on it is at home where it went; the cache is there now."""
    calls = Calls("ab")
    home, _ = await calls.send(10, "x")
    assert (await calls.send(10, "x"))[0] == home
    moved, _ = await calls.send(10, "x")

    assert moved != home
    assert (await calls.send(10, "x"))[0] == moved


async def test_a_name_whose_replica_is_gone_finds_another():
    calls = Calls("ab")
    home, _ = await calls.send(10, "x")
    other = {"a": "b", "b": "a"}[home]
    calls.run(other, "c")
    await calls.send(100)
    new, _ = await calls.send(10, "x")

    assert new in {other, "c"}
    assert (await calls.send(1, "x"))[0] == new


async def test_a_number_is_the_same_replica_for_all_callers():
    """Whatever each of them has sent before, and in whichever order it has heard of the replicas."""
    mine, theirs = Calls("abc"), Calls("cab")
    await theirs.send(1)
    for calls in (mine, theirs):
        assert [(await calls.send(1, numbered(i)))[0] for i in range(3)] == ["a", "b", "c"]


async def test_names_are_forgotten_in_the_end(monkeypatch):
    """The one that was used longest ago."""
    monkeypatch.setattr(routing, "HOMES_KEPT", 2)
    calls = Calls("a")
    for near in ("x", "y", "x", "z"):
        await calls.send(1, near)

    assert list(calls.router._homes) == ["x", "z"]


async def test_new_replicas_get_work_at_once():
    """Rows with a name, too: their replica has more than twice as many."""
    calls = Calls("a")
    for _ in range(4):
        await calls.send(10, "x")
    calls.run("a", "b")

    assert [(await calls.send(10, near))[0] for near in (None, "x", None)] == ["b", "b", "b"]


async def test_other_calls_need_no_rows():
    """Ping and about are called without requests; a full replica is passed over."""
    calls = Calls("ab")
    await calls.let_queue("a", Replica.max_ongoing_requests)

    assert {(await calls.send())[0] for _ in range(20)} == {"b"}


async def test_a_call_that_was_cancelled_before_it_was_sent_is_forgotten():
    """While all replicas are full; its rows are nowhere."""
    now = 0.0
    calls = Calls("a", lambda: now)
    await calls.let_queue("a", Replica.max_ongoing_requests)
    waiting = asyncio.create_task(calls.send(10))
    await asyncio.sleep(0.05)
    waiting.cancel()
    assert calls.rows() == {"a": 10}
    await calls.let_queue("a", 0)
    now += routing.CHOICE_KEPT_S + 1
    await calls.send(3)

    assert calls.rows() == {"a": 3}


async def test_a_call_that_ends_before_serve_has_said_that_it_was_sent_leaves_nothing():
    calls = Calls("a")
    request = pending({"rows": 5, "near": None})
    replica = await calls.router._choose_replica_for_request(request)
    calls.router.on_request_completed(replica.replica_id, request.metadata.internal_request_id)
    calls.router.on_request_routed(request, replica.replica_id, None)

    assert calls.rows() == {}
    assert not calls.router._calls


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 50), st.sampled_from([None, "x", "y", numbered(1), numbered(7)])),
        st.tuples(st.just("end"), st.integers(0, 5), st.none()),
        st.tuples(st.just("run"), st.sampled_from(["ab", "abc", "bcd", "d"]), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_every_call_gets_the_replica_that_was_chosen_for_it(events):
    """Whatever comes, goes and fails: a call goes to a replica that runs, and the counts are those of what is sent."""

    async def play():
        calls = Calls("ab")
        rows_of = {}
        for event, value, more in events:
            if event == "send":
                replica, request_id = await calls.send(value, more)
                assert replica in {replica_id.unique_id for replica_id in calls.router.curr_replicas}
                rows_of[request_id] = replica, value
            elif event == "end" and len(calls.sent) > value:
                request_id = list(calls.sent)[value]
                calls.end(request_id)
                del rows_of[request_id]
            elif event == "run":
                calls.run(*value)
            expected = Counter()
            for replica, rows in rows_of.values():
                expected[replica] += rows
            assert calls.rows() == expected

    asyncio.run(play())


def test_it_travels_without_this_package():
    """Serve's controller, and a caller with another version of this package, read it; vllm is not imported."""
    config = RequestRouterConfig(request_router_class=f"{routing.__name__}.{RowsRouter.__name__}")
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("airflow_provider_raylm", "vllm", "airflow"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import pickle
print(pickle.loads({config.get_serialized_request_router_cls()!r}).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.strip() == "RowsRouter", done.stderr[-2000:]
