"""What stands in for the bench's process; light, because each test starts one."""

import os
import signal
import time


def well(pickled, names, out):
    for name in ["rates", *names]:
        out.send(("row", f"a row of {name}"))
        out.send(("done", None))


def dies(pickled, names, out):
    """Run all but "decode", where the process is killed after its first row."""
    for name in ["rates", *names]:
        out.send(("row", f"a row of {name}"))
        if name == "decode":
            os._exit(7)
        out.send(("done", None))


def hangs(pickled, names, out):
    for name in ["rates", *names]:
        if name == "decode":
            time.sleep(60)
        out.send(("row", f"a row of {name}"))
        out.send(("done", None))


def fails(pickled, names, out):
    """Lose the device in "build", and a small thing in "decode"."""
    for name in ["rates", *names]:
        if name == "build":
            out.send(("broken", "illegal address"))
            return
        if name == "decode":
            out.send(("failed", "out of memory"))
            continue
        out.send(("row", f"a row of {name}"))
        out.send(("done", None))


def tells_what_interrupts_do(pickled, names, out):
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    for _ in ["rates", *names]:
        out.send(("row", f"interrupts are ignored: {ignored}"))
        out.send(("done", None))


def has_no_rates(pickled, names, out):
    out.send(("failed", "no such device"))


def fails_at_once(pickled, names, out):
    for name in ["rates", *names]:
        out.send(("failed", "out of memory") if name == "decode" else ("done", None))
