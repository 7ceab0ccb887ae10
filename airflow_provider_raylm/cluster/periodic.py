"""A promise that is kept again and again in a thread: whatever goes wrong once, the next time comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress


class Periodic:
    """Calls a function every so many seconds in a thread of its own, whatever the function raises.

    A trouble is said when it begins or another kind of error takes its place, and when it is over: not each time.

    Args:
        name: of the thread.
        what: is done, for the lines: "renewing the lease".
        period: seconds before the first call, and between the end of a call and the next.
        act: what to do.
        say: receives the lines.
    """

    def __init__(
        self, name: str, what: str, period: float, act: Callable[[], object], say: Callable[[str], object]
    ) -> None:
        self._what = what
        self._period = period
        self._act = act
        self._say = say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Call no more, and wait *timeout* seconds at most for a call that is in flight."""
        self._over.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        trouble: type[BaseException] | None = None
        while not self._over.wait(self._period):
            try:
                self._act()
            except BaseException as error:  # Whatever it is: who depends on the promise is not there to catch it.
                if type(error) is not trouble:
                    self._tell(f"{self._what} fails, and is tried every {self._period:g} s: {_show(error)}")
                trouble = type(error)
            else:
                if trouble is not None:
                    self._tell(f"{self._what} succeeds again")
                trouble = None

    def _tell(self, line: str) -> None:
        with suppress(Exception):
            self._say(line)


def _show(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
