"""Long work in slices, between which the page stays alive and can say Cancel."""

import asyncio
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from IPython.core.getipython import get_ipython

from llama4_widgets.board import Board
from llama4_widgets.view import STOPPED, View, button

T = TypeVar("T")
_SLICE = 0.05  # seconds from one look at the page to the next
_interrupts = 0  # of the kernel, between its cells
_begun: list[int] = []  # how many there were before each `stoppable` block that is under way


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop of a kernel, which serves a page between two pieces of work; else None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def interrupts() -> int:
    """Return how often the kernel was interrupted between its cells, and hear of the next one.

    JupyterLab's stop button sends a signal, which a kernel takes to end its cell, and ignores
    between cells; what people do in a view has a thread of its own, which no signal reaches.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        kernel.io_loop.add_callback(_listen)  # in the main thread, as signals want it
    return _interrupts


def _listen() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # no cell came first
        signal.signal(signal.SIGINT, _hear)


def _hear(*_: Any) -> None:
    global _interrupts
    _interrupts += 1


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt if the kernel was interrupted since the outermost such block began.

    One thread at a time may be inside.
    """
    _begun.append(_begun[0] if _begun else interrupts())
    try:
        if _interrupts != _begun[0]:
            raise KeyboardInterrupt
        yield
    finally:
        _begun.pop()


@contextmanager
def watched(board: Board) -> Iterator[Callable[[], None]]:
    """Give a function that raises KeyboardInterrupt if the kernel was interrupted since the start.

    It ends the block, and the board says so: a task that let it out would take its loop with it.
    """
    before = interrupts()

    def look() -> None:
        if interrupts() != before:
            raise KeyboardInterrupt

    try:
        yield look
    except KeyboardInterrupt:
        board.summary = STOPPED


class Work:
    """A button that begins work which comes in `steps`, and a button that cancels it.

    The view's board says what each step yields, and why the work failed if it did. The view is
    drawn when all is done, and not after a cancel or an interrupt; its next moment cancels, too.
    """

    def __init__(self, view: View, name: str, steps: Callable[[], Generator[str, None, None]]):
        self._view, self._steps = view, steps
        view.observe(lambda _: self.cancel(), "moment")
        self._task: asyncio.Task[None] | None = None
        self.begin = button(name, None, self._start, button_style="primary")
        self.stop = button("Cancel", None, self._stop, disabled=True)

    def start(self) -> None:
        """Begin anew; in a kernel this returns at once, in a script when all is done."""
        self.cancel()
        if loop := running_loop():
            self._task = loop.create_task(self._work())
        else:  # a script, without anybody to wait for
            asyncio.run(self._work())

    def cancel(self) -> None:
        """Stop what is under way."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _start(self) -> None:
        self.stop.disabled = False
        self.stop.focus()  # the other is going to be disabled, and would lose it
        self.start()

    def _stop(self) -> None:
        self.cancel()
        self.begin.disabled = False
        self.begin.focus()

    async def _work(self) -> None:
        self.begin.disabled, self.stop.disabled = True, False
        steps, heard, board = self._steps(), 0.0, self._view.board
        try:
            with watched(board) as look:
                for said in steps:
                    if time.monotonic() - heard > _SLICE:
                        board.busy = f"{said} …"
                        await asyncio.sleep(0.005)  # lets the kernel hear of a click on Cancel
                        heard = time.monotonic()
                    look()
                self._view.refresh()
        except (ValueError, RuntimeError) as error:
            board.problem = str(error)
        finally:
            steps.close()
            board.busy = ""
            self.begin.disabled, self.stop.disabled = False, True


class Cancelled(BaseException):
    """Nobody waits for the work any more."""


def sliced(work: Callable[[Callable[[str], None]], T]) -> Generator[str, None, T]:
    """Do ``work(pause)`` up to its next `pause` at each step, which yields what the pause says.

    The work's result is the generator's. It has a thread of its own, which only moves while a step
    waits for it: two never run at once. Closing the generator ends it at the pause where it stands.

    >>> list(sliced(lambda pause: [pause(word) for word in ("half", "all")]))
    ['half', 'all']
    """
    told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    goes: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def pause(said: str) -> None:
        told.put(("pause", said))
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
            yield value
            goes.put(True)
    finally:
        goes.put(False)
        thread.join()
