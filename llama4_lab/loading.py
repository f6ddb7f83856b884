"""Less waiting: imports without garbage collection, and compiled code that a thread loads."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 2.0  # seconds; to load compiled code takes less, to compile it takes more


@contextmanager
def importing() -> Iterator[None]:
    """Import without looking for garbage, of which imports make none, in a quarter less time.

    What is there after the first import of torch, a quarter of a million objects that stay, is
    never looked through again: that would take 0.2 seconds, in the middle of anything.
    """
    was_enabled, is_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
        if is_first:  # else there may be tensors, which must not stay
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


class Loading:
    """Work that begins when it is first asked for; a failure is told to whoever waits."""

    def __init__(self, what: str, work: Callable[[], None]):
        self._work = work
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._is_done = threading.Event()
        self._timer: threading.Timer | None = None

    def put_off(self, seconds: float) -> None:
        """Begin after so many seconds, unless it is put off again; until then nobody waits."""
        with self._lock:
            if self._thread.ident is not None:
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(seconds, self._begins)
            self._timer.daemon = True
            self._timer.start()

    def is_done(self) -> bool:
        """Whether the code can be called.

        The first who asks waits a little for it, unless it was put off.
        """
        if not self._is_done.is_set() and self._timer is None and self._begins():
            self._thread.join(_PATIENCE)
        return self._is_done.is_set()

    def wait(self) -> None:
        """Wait until it is there.

        Raises:
            RuntimeError: it could not be made.
        """
        self._begins()
        self._thread.join()
        if self._error is not None:
            raise RuntimeError(f"{self._thread.name} failed: {self._error}") from self._error

    def _begins(self) -> bool:
        """Start the work; False if it was started before."""
        with self._lock:
            if self._thread.ident is not None:
                return False
            self._thread.start()
            return True

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # a daemon's traceback would only puzzle
            self._error = error
        else:
            self._is_done.set()
