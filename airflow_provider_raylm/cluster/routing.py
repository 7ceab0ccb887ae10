"""Which replica a call goes to: the one with the fewest rows in flight, or one that has what its rows begin with.

Serve counts requests, of two replicas at a time; blocks differ in rows, and it is rows that an engine works on. The
class runs wherever a handle is, and Serve brings it there by value: this module imports nothing of this package.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

# The tasks keep twice as many rows in flight as the engines work on. A replica with less than half of the others'
# rows is about to have too few to be busy, which costs more than to compute a prefix once more.
IMBALANCE = 2
# Names and where they went; one takes about 300 bytes.
HOMES_KEPT = 10_000
# A choice that Serve has not carried out after that time counts no longer: the call was cancelled.
CHOICE_KEPT_S = 60.0
_NUMBER = "#"


def numbered(number: int) -> str:
    """Return the name of the replica with that number, in the order of their ids: the same one for all callers.

    There may be fewer replicas than that; it is taken modulo their number.
    """
    return f"{_NUMBER}{number}"


class RowsRouter(RequestRouter):
    """Sends a block to the replica with the fewest rows in flight, and one that has a name to where the name is.

    A block is a call with the keyword argument ``rows``, their number. With ``near``, a name, it goes to the
    replica that the name went to before, or to the one that it numbers, unless that has more than twice as many rows
    as the one with the fewest. Other calls go to any replica that is well.

    What this handle has sent counts. What others have sent is known to Serve in calls and late, up to 10 s, so it only
    decides between replicas that have as many rows of ours: when every caller spreads its rows, all are spread.
    """

    # Serve asks a replica that it has not heard of for 10 s for the length of its queue, and takes the next one if it
    # does not answer within 0.1 s: on a busy machine that would be chance.
    queue_len_response_deadline_s = 1.0

    def initialize_state(self) -> None:
        """Begin with nothing in flight."""
        self._calls: dict[str, tuple[ReplicaID, int]] = {}
        self._chosen: dict[str, float] = {}
        self._rows_at: Counter[ReplicaID] = Counter()
        self._homes: OrderedDict[str, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the one to be taken first; Serve takes the next if it cannot have one."""
        now = self._get_curr_time_s()
        self._forget_choices(now - CHOICE_KEPT_S)
        rows = _argument(pending_request, "rows") or 0
        order = random.sample(candidate_replicas, len(candidate_replicas))
        order.sort(key=lambda replica: self._load(replica.replica_id))
        home = self._home(_argument(pending_request, "near"), order)
        if home is not None:
            least = self._rows_at[order[0].replica_id]
            if self._rows_at[home.replica_id] + rows <= IMBALANCE * (least + rows):
                order.remove(home)
                order.insert(0, home)
        if pending_request is not None:
            # Serve's word for: wait a little when all of these are full.
            pending_request.routing_context.should_backoff = True
            if order:
                # Others are placed before this one is sent.
                self._place(pending_request, order[0].replica_id)
                self._chosen[pending_request.metadata.internal_request_id] = now
        return [[replica] for replica in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Count the rows where they really went. A short call may have ended before."""
        request_id = pending_request.metadata.internal_request_id
        if self._chosen.pop(request_id, None) is not None:
            self._place(pending_request, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count the rows no longer, unless they went elsewhere after all."""
        if self._calls.get(internal_request_id, (None,))[0] == replica_id:
            self._forget(internal_request_id)

    def _load(self, replica_id: ReplicaID) -> tuple[int, int]:
        return self._rows_at[replica_id], self.replica_queue_len_cache.get(replica_id) or 0

    def _home(self, near: str | None, replicas: list[RunningReplica]) -> RunningReplica | None:
        if near is None or not replicas:
            return None
        if near.startswith(_NUMBER) and near[1:].isdecimal():
            by_id = sorted(replicas, key=lambda replica: replica.replica_id.unique_id)
            return by_id[int(near[1:]) % len(by_id)]
        home = self._homes.get(near)
        return next((replica for replica in replicas if replica.replica_id == home), None)

    def _place(self, pending_request: PendingRequest, replica_id: ReplicaID) -> None:
        request_id = pending_request.metadata.internal_request_id
        self._forget(request_id)
        rows = _argument(pending_request, "rows") or 0
        self._calls[request_id] = replica_id, rows
        self._rows_at[replica_id] += rows
        near = _argument(pending_request, "near")
        if near is not None:
            self._homes[near] = replica_id
            self._homes.move_to_end(near)
            if len(self._homes) > HOMES_KEPT:
                self._homes.popitem(last=False)

    def _forget(self, request_id: str) -> None:
        self._chosen.pop(request_id, None)
        if request_id in self._calls:
            replica_id, rows = self._calls.pop(request_id)
            self._rows_at[replica_id] -= rows
            if not self._rows_at[replica_id]:
                del self._rows_at[replica_id]

    def _forget_choices(self, before: float) -> None:
        for request_id in [request_id for request_id, since in self._chosen.items() if since < before]:
            self._forget(request_id)


def _argument(pending_request: PendingRequest | None, name: str) -> Any:
    return None if pending_request is None else pending_request.kwargs.get(name)
