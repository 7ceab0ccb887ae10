"""Only one job of a cluster at a time: a name that is held until the body is over, or the job has died.

The holder is written into Ray's key-value store, where one of several writers wins; whether it lives is told by a
placement group of its job, which Ray removes with the job. Neither needs a process, as an actor would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray._raylet import PlacementGroupID
from ray.experimental import internal_kv
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

PERIOD_S = 1.0
# The processes of a job that died may write for a moment longer.
END_S = 2.0

_SPACE = b"raylm-locks"


@contextmanager
def held(name: str, on_wait: Callable[[float], None]) -> Iterator[None]:
    """Hold *name* while the body runs.

    Args:
        name: of the lock, on the whole cluster.
        on_wait: called with the seconds waited so far, once a second while another job holds it; what it raises ends
            the wait.
    """
    # A byte of memory fits anywhere: nothing is reserved, and no node is added for it.
    witness = placement_group([{"memory": 1}])
    me = witness.id.hex().encode()
    started = time.monotonic()
    waited = False
    try:
        while (holder := _take(name, me)) is not None:
            on_wait(time.monotonic() - started)
            waited = True
            if not _lives(holder):
                # Whoever finds a dead holder opens the next turn; of several who do, one gets it.
                _give(name, holder)
            time.sleep(PERIOD_S)
        if waited:
            time.sleep(END_S)
        yield
    finally:
        _give(name, me)
        remove_placement_group(witness)


def _take(name: str, me: bytes) -> bytes | None:
    """Take the lock and return None, or return who holds it."""
    number = _turn(name)
    if not internal_kv._internal_kv_put(_key(name, number), me, overwrite=False, namespace=_SPACE):
        # The key of a turn that was over already had been cleaned away meanwhile.
        return None if _turn(name) == number else b""
    holder = internal_kv._internal_kv_get(_key(name, number), namespace=_SPACE)
    return None if holder == me else holder or b""


def _give(name: str, holder: bytes) -> None:
    """End the turn of *holder*, if it is still its turn."""
    number = _turn(name)
    if internal_kv._internal_kv_get(_key(name, number), namespace=_SPACE) != holder:
        return
    # Each turn has a key of its own, written once: nobody can end a turn that is not this one.
    internal_kv._internal_kv_put(_key(name, number, b"over"), holder, overwrite=False, namespace=_SPACE)
    if number:
        for ended in (_key(name, number - 1), _key(name, number - 1, b"over")):
            internal_kv._internal_kv_del(ended, namespace=_SPACE)


def _turn(name: str) -> int:
    """Return the number of the turn that is on or comes next."""
    over = internal_kv._internal_kv_list(f"{name}/over/".encode(), namespace=_SPACE)
    return max((int(key.rpartition(b"/")[2]) for key in over), default=-1) + 1


def _key(name: str, number: int, of: bytes = b"turn") -> bytes:
    return b"/".join([name.encode(), of, str(number).encode()])


def _lives(holder: bytes) -> bool:
    if not holder:
        return True
    group = PlacementGroup(PlacementGroupID.from_hex(holder.decode()))
    return placement_group_table(group).get("state") not in (None, "REMOVED")
