"""Measures what loading a checkpoint takes, in a process of its own."""

import subprocess
import sys

_CODE = """
import sys, torch
from pathlib import Path
from llama4_lab.checkpoint import load

def kilobytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

torch.ones(512, 512) @ torch.ones(512, 512)  # the threads and buffers of the first product
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = kilobytes("VmRSS")
model = load(sys.argv[1], quantize=sys.argv[2] or None)
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.detach().view(torch.uint8).view(-1)[::1024].sum()  # every page of what is mapped
print((kilobytes("VmHWM") - before) * 1024)
"""


def peak_of_loading(folder, quantize=""):
    """Return the most bytes that are resident while a model is loaded and every page of it read."""
    command = [sys.executable, "-c", _CODE, str(folder), quantize]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
