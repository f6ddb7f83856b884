"""Long work that somebody else's code does, in slices between which the page stays alive."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class Cancelled(BaseException):
    """Nobody waits for the work any more."""


def sliced(work: Callable[[Callable[[], None]], T]) -> Generator[None, None, T]:
    """Do ``work(pause)`` up to its next `pause` at each step; its result is the generator's.

    The work has a thread of its own, which only moves while a step waits for it: two never run at
    once. Closing the generator ends the work at the pause where it stands.

    >>> steps = sliced(lambda pause: [pause() for _ in range(2)])
    >>> len(list(steps))
    2
    """
    told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    goes: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def pause() -> None:
        told.put(("pause", None))
        if not goes.get():
            raise Cancelled

    def run() -> None:
        try:
            told.put(("done", work(pause)))
        except BaseException as error:
            told.put(("failed", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            what, value = told.get()
            if what == "failed":
                raise value
            if what == "done":
                return value
            yield
            goes.put(True)
    finally:
        goes.put(False)
        thread.join()
