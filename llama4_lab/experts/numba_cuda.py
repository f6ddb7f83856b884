"""The counting sort as three CUDA kernels in Python: histogram, scan, scatter.

A GPU sorts tokens by expert without a comparison: count them, add the counts up, put each token
where its expert's places begin. `sort` equals `llama4_lab.experts.sort`; it exists to be read, and
to be compared with torch's argsort. The histogram is also the experts' load.

``NUMBA_ENABLE_CUDASIM=1``, set before numba is imported, runs it on the CPU.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false
# (numba's stubs describe what it compiles, not what Python sees)

import torch
from jaxtyping import Int
from numba import config, cuda, int32
from torch import Tensor

THREADS = 128  # of a block; as many experts fit


@cuda.jit
def histogram(expert, counts):
    """Count the slots of each expert in each block of slots: ``counts[block, expert]``."""
    own = cuda.shared.array(THREADS, int32)
    thread, block = cuda.threadIdx.x, cuda.blockIdx.x
    own[thread] = 0
    cuda.syncthreads()
    slot = block * THREADS + thread
    if slot < expert.size:
        cuda.atomic.add(own, expert[slot], 1)
    cuda.syncthreads()
    if thread < counts.shape[1]:
        counts[block, thread] = own[thread]


@cuda.jit
def scan(counts, offsets):
    """Turn counts into places: the slots of block i for expert e begin at ``counts[i, e]``."""
    total = cuda.shared.array(THREADS, int32)
    expert, num_experts = cuda.threadIdx.x, counts.shape[1]
    load = 0
    if expert < num_experts:
        for block in range(counts.shape[0]):
            here = counts[block, expert]
            counts[block, expert] = load
            load += here
    total[expert] = load
    cuda.syncthreads()
    begin = 0
    for before in range(expert):
        begin += total[before]
    if expert < num_experts:
        for block in range(counts.shape[0]):
            counts[block, expert] += begin
        offsets[expert] = begin
        if expert == num_experts - 1:
            offsets[num_experts] = begin + load


@cuda.jit
def scatter(expert, begins, order):
    """Put each slot behind those of its block that chose the same expert and come earlier."""
    chosen = cuda.shared.array(THREADS, int32)
    thread, block = cuda.threadIdx.x, cuda.blockIdx.x
    slot = block * THREADS + thread
    if slot < expert.size:
        chosen[thread] = expert[slot]
    cuda.syncthreads()
    if slot < expert.size:
        rank = 0
        for earlier in range(thread):
            if chosen[earlier] == chosen[thread]:
                rank += 1
        order[begins[block, chosen[thread]] + rank] = slot


def sort(
    expert: Int[Tensor, "n topk"], num_experts: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " ends"]]:
    """Order the token slots by expert, stably, as `llama4_lab.experts.sort` does, in int32.

    The kernels run on torch's current stream, and nothing waits for them.

    Raises:
        ValueError: more experts than a block has threads, or a tensor that is not on a GPU.
    """
    if num_experts > THREADS:
        raise ValueError(f"{num_experts} experts are more than this sort takes: {THREADS}")
    simulated = bool(config.ENABLE_CUDASIM)
    if not (expert.is_cuda or simulated):
        raise ValueError(
            f"this sort runs on a GPU, and these indices are on {expert.device}: use "
            "llama4_lab.experts.sort, or set NUMBA_ENABLE_CUDASIM=1 to simulate a GPU"
        )
    flat = expert.flatten().int()
    blocks = -(-len(flat) // THREADS)
    counts = flat.new_empty(blocks, num_experts)
    offsets, order = flat.new_empty(num_experts + 1), torch.empty_like(flat)
    stream = 0
    if not simulated:
        stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
    slots, begins, ends, out = (
        x.numpy() if simulated else cuda.as_cuda_array(x) for x in (flat, counts, offsets, order)
    )
    histogram[blocks, THREADS, stream](slots, begins)
    scan[1, THREADS, stream](begins, ends)
    scatter[blocks, THREADS, stream](slots, begins, out)
    return order, offsets
