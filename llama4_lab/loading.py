"""Less waiting: imports without garbage collection or on demand, and compiled code that a thread
loads."""

import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

_PATIENCE = 2.0  # seconds; to load compiled code takes less


@contextmanager
def importing() -> Iterator[None]:
    """Import without looking for garbage: imports make none, and it takes a fifth of their time.

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


def on_demand(package: str) -> Callable[[str], ModuleType]:
    """Return a package's ``__getattr__``, which imports a module of it when it is first named."""

    def find(name: str) -> ModuleType:
        module = f"{package}.{name}"
        if name.startswith("_") or importlib.util.find_spec(module) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(module)

    return find


class Loading:
    """Work that begins when it is first asked for; a failure is told to whoever waits.

    While a thread compiles, all others wait for Python: an edit of the lab takes up to 1.8 seconds
    instead of less than 0.3. So what is not compiled yet, as `is_kept` says, is compiled and
    written to disk by another process, which asks the `LOADING` of the module of `work`.
    """

    def __init__(
        self, what: str, work: Callable[[], None], is_kept: Callable[[], bool] | None = None
    ):
        self._work = work
        self._is_kept = is_kept
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._is_done = threading.Event()
        self._is_settled = threading.Event()  # done, failed, or to be compiled, which takes long
        self._rest = self._due = 0.0  # seconds

    def put_off(self, seconds: float) -> None:
        """Begin only after so many seconds without a request, and let nobody wait meanwhile."""
        self._rest = seconds

    def is_done(self) -> bool:
        """Whether the code can be called.

        The first who asks waits a little for it, unless it was put off or has to be compiled.
        """
        if not self._is_done.is_set():
            self._due = time.monotonic() + self._rest
            if self._begins() and not self._rest:
                self._is_settled.wait(_PATIENCE)
        return self._is_done.is_set()

    def wait(self) -> None:
        """Wait until it is there.

        Raises:
            RuntimeError: it could not be made.
        """
        self.put_off(0)
        self._due = 0.0
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

    def work(self) -> None:
        """Do the work now, at low priority; the process that was started for it calls this."""
        with suppress(AttributeError, OSError):  # no such thing on Windows
            os.nice(10)
        self._work()

    def _run(self) -> None:
        while (left := self._due - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        try:
            if self._is_kept is not None and not self._is_kept():
                self._is_settled.set()
                self._compile_elsewhere()
            self._work()
        except BaseException as error:  # a daemon's traceback would only puzzle
            self._error = error
        else:
            self._is_done.set()
        finally:
            self._is_settled.set()

    def _compile_elsewhere(self) -> None:
        """Let another process do it; what that cannot do, or keep, is done here."""
        code = f"from {self._work.__module__} import LOADING; LOADING.work()"
        with suppress(OSError):
            subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupted cell, or script, does not interrupt it
            )
