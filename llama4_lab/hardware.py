"""GPUs for plans: what each holds, and how fast it can read, multiply and talk to another one.

Rates are what a program can reach: the data sheet's, times the share that was measured on one H200
(a copy reached 4.3 of 4.8 TB/s, a large bfloat16 product 788 of 989 TFLOP/s). For every other entry
the share is an assumption; `llama4-lab bench` measures the GPU at hand.
"""

from dataclasses import dataclass

READ_SHARE = 4.3 / 4.8
MATRIX_SHARE = 788 / 989


@dataclass(frozen=True)
class GPU:
    """One GPU with the rates that it reaches."""

    name: str
    memory: float  # bytes, as its driver reports them
    bandwidth: float  # bytes per second, reading
    bf16: float  # FLOP/s of large dense products
    fp8: float  # likewise; bf16's where there are no fp8 units and codes have to be unpacked
    link: float = 0.0  # bytes per second to another GPU, in one direction


def _sheet(
    name: str, mebibytes: int, terabytes: float, bf16: float, fp8: float, link: float
) -> GPU:
    """Return the GPU of a data sheet: TB/s, dense TFLOP/s (no sparsity), and GB/s of its link."""
    bf16, fp8 = bf16 * 1e12 * MATRIX_SHARE, fp8 * 1e12 * MATRIX_SHARE
    return GPU(name, mebibytes * 2.0**20, terabytes * 1e12 * READ_SHARE, bf16, fp8, link * 1e9)


GPUS: dict[str, GPU] = {
    # NVIDIA A100 80GB SXM data sheet; no fp8 units; NVLink 600 GB/s both ways.
    "a100": _sheet("A100 80 GB", 81920, 2.039, 312, 312, 300),
    # NVIDIA H100 SXM data sheet; NVLink 900 GB/s both ways.
    "h100": _sheet("H100 80 GB", 81559, 3.35, 989, 1979, 450),
    # NVIDIA H200 SXM data sheet; the GPU whose rates were measured.
    "h200": _sheet("H200 141 GB", 143771, 4.8, 989, 1979, 450),
    # NVIDIA HGX B200 data sheet; bandwidth by its bus of 7680 bits at 3996 MHz.
    "b200": _sheet("B200 180 GB", 183359, 7.67, 2250, 4500, 900),
    # AMD Instinct MI300X data sheet; seven links of 64 GB/s each way.
    "mi300x": _sheet("MI300X 192 GB", 196592, 5.3, 1307, 2615, 448),
    # NVIDIA L40S data sheet; PCIe 4 x16.
    "l40s": _sheet("L40S 48 GB", 46068, 0.864, 362, 733, 32),
    # NVIDIA Ada white paper, products accumulated in float32; PCIe 4 x16.
    "rtx4090": _sheet("RTX 4090 24 GB", 24564, 1.008, 165, 330, 32),
    # NVIDIA RTX PRO Blackwell white paper, accumulated in float32; PCIe 5 x16.
    "rtxpro6000": _sheet("RTX PRO 6000 96 GB", 97887, 1.792, 504, 1008, 64),
}


def find_gpu(name: str) -> GPU:
    """Return a GPU by its key in `GPUS`; case, spaces, hyphens and underscores do not matter.

    >>> find_gpu("RTX 4090").name
    'RTX 4090 24 GB'

    Raises:
        ValueError: a name that is not there.
    """
    key = "".join(letter for letter in name.lower() if letter.isalnum())
    if key not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; choose {', '.join(GPUS)}")
    return GPUS[key]
