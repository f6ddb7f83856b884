"""Compiled code that a thread of its own loads, or compiles first, so that nobody has to wait."""

import threading
from collections.abc import Callable

_PATIENCE = 2.0  # seconds; to load compiled code takes less, to compile it takes more


class Loading:
    """Work that begins when it is first asked for; a failure is told to whoever waits."""

    def __init__(self, what: str, work: Callable[[], None]):
        self._work = work
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._is_done = threading.Event()

    def is_done(self) -> bool:
        """Whether the code can be called; the first who asks waits a little for it."""
        if not self._is_done.is_set() and self._begins():
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
