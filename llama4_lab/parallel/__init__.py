"""One model on several GPUs, or processes: tensor parallelism over a device mesh.

Every rank (process) runs the same lines and sees the same tokens and residual stream. It holds its
attention heads, its slice of every MLP, of the experts either a slice of each (``"sliced"``) or
some of them whole (``"placed"``), and its part of the read-out's vocabulary; norms, routers, the
embeddings and the vision encoder are whole. What a block adds to the residual stream is a sum over
the ranks: one all-reduce after attention, and one after the feed-forward part, where the routed and
the shared expert are added first (Shoeybi et al. 2019, "Megatron-LM", section 3).

Traces and edits see whole values: a watched value that lies on several ranks is gathered, and each
rank goes on with its part of what the edits return. `ranks` says how weights and values are
divided, `forward` how a model's forward pass then runs; ``docs/parallel.md`` has the first steps.
"""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama4_lab import checkpoint
from llama4_lab.checkpoint.files import map_tensor
from llama4_lab.checkpoint.huggingface import CONFIG, HuggingFaceFolder
from llama4_lab.checkpoint.shipped import find
from llama4_lab.config import Llama4Config
from llama4_lab.experts.mapped import Mapped
from llama4_lab.model import Llama4
from llama4_lab.model.random import seed_parameter
from llama4_lab.parallel.forward import join
from llama4_lab.parallel.ranks import Ranks

PATIENCE = timedelta(minutes=5)  # how long a rank waits for the others before it gives up


def start(device: str | None = None) -> DeviceMesh:
    """Join the processes that torchrun, or `engines`, started, and return the mesh of them all.

    Each takes a GPU of its own and NCCL, or without any GPU in the machine the CPU and gloo;
    `device` ("cuda" or "cpu") chooses instead.

    Raises:
        RuntimeError: this process was not started as one of several.
        ValueError: more processes than GPUs.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise RuntimeError(
            f"{missing[0]} is not set, so this process has no others to join: start the script "
            "with `torchrun --nproc-per-node 2 script.py`, or from a notebook with "
            "llama4_lab.parallel.engines(2)"
        )
    size, gpus = int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = device or ("cuda" if gpus else "cpu")
    if device == "cuda":
        if here > gpus:
            raise ValueError(
                f"{here} processes need as many GPUs and this machine has {gpus}: start {gpus} "
                'processes, or choose start(device="cpu")'
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    return init_device_mesh(device, (size,), mesh_dim_names=("ranks",))


def stop() -> None:
    """Wait for the other processes and part from them: the last line of a script.

    A process that ends without it is often aborted, after its last line, by gloo's threads that
    still wait for the others; with it that is rare.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def engines(count: int) -> Any:
    """Start processes for a notebook and return ipyparallel's view of them, ready for ``%%px``.

    Cells under ``%%px`` run on all of them; `start` there returns their mesh.

    Raises:
        ImportError: ipyparallel is not installed.
    """
    try:
        import ipyparallel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "several processes in a notebook need ipyparallel: `pip install ipyparallel`, or write "
            "a script and start it with torchrun"
        ) from error
    client = ipyparallel.Cluster(n=count).start_and_connect_sync()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank, engine in enumerate(client):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in own.items()}
        engine.execute(f"import os; os.environ.update({variables})", block=True)
    view = client[:]
    view.block = True  # ``%%px`` waits, and shows what the ranks print
    view.activate()
    return view


def load(
    name_or_folder: str | Path,
    mesh: DeviceMesh,
    *,
    experts: str = "sliced",
    dtype: torch.dtype | None = None,
    text_only: bool = False,
    max_tiles: int = 16,
) -> Llama4:
    """Load each rank's part of a Hugging Face checkpoint or a converted one, onto its device.

    Files are mapped and only the part is read, so that no rank ever holds the whole; of another
    program's codes each rank makes one weight, or a layer's experts, at a time. `experts` is that
    of `parallelise`, the other options are those of `llama4_lab.load`.

    Raises:
        ValueError: as `parallelise`; or a checkpoint of Meta's format, whose files are cut
            already, or of GGUF.
        FileNotFoundError, NotADirectoryError, ValueError: as `llama4_lab.load`.
    """
    folder = find(name_or_folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} lacks {CONFIG}: ranks read Hugging Face's format only; a checkpoint of "
            "Meta's or a file of GGUF is converted with `llama4-lab convert`"
        )
    model = checkpoint.load(
        name_or_folder, device="meta", dtype=dtype, text_only=text_only, max_tiles=max_tiles
    )
    ranks = Ranks(mesh, model.config, experts)
    source = HuggingFaceFolder.open(folder, text_only)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, stored in source.tensors.items():
        ranks.take(model, name, source.as_ours(name, map_tensor(stored)))
    for made in source.parts:
        for name, whole in source.read({made: shapes[made]}, torch.device("cpu"), dtype):
            ranks.take(model, name, whole)
    return join(model, ranks)


def random(
    config: Llama4Config,
    mesh: DeviceMesh,
    seed: int = 0,
    *,
    experts: str = "sliced",
    dtype: torch.dtype = torch.float32,
) -> Llama4:
    """Return each rank's part of what ``llama4_lab.random(config, seed)`` makes on such a device.

    Every parameter is drawn whole, one at a time, so that the parts are of one model.

    Raises:
        ValueError: as `parallelise`.
    """
    with torch.device("meta"):
        model = Llama4(config).to(dtype)
    model.tie_weights()
    ranks = Ranks(mesh, config, experts)
    generator = torch.Generator(ranks.device).manual_seed(seed)
    for name, parameter in dict(model.named_parameters()).items():
        whole = torch.empty(parameter.shape, dtype=dtype, device=ranks.device)
        seed_parameter(name, whole, config, generator)
        ranks.take(model, name, whole)
    return join(model, ranks)


def parallelise(model: Llama4, mesh: DeviceMesh, *, experts: str = "sliced") -> Llama4:
    """Keep this rank's part of a model that every rank holds whole, and return it.

    Args:
        experts: "sliced": each rank runs every token through a slice of its experts, which makes
            the time of one token shortest; "placed": each rank holds num_local_experts / ranks
            whole experts and runs the tokens that chose them, so that uneven routing makes the
            others wait.

    Raises:
        ValueError: heads, widths, experts or the vocabulary cannot be divided among so many ranks;
            or the model is divided already.
    """
    if model.ranks.size > 1:
        raise ValueError(
            f"this model is divided among {model.ranks.size} ranks already: load it anew"
        )
    if any(isinstance(vars(module).get("down_proj"), Mapped) for module in model.modules()):
        raise ValueError(
            "this model's experts stay in their files, which ranks cannot divide: load it with "
            "llama4_lab.parallel.load"
        )
    ranks = Ranks(mesh, model.config, experts)
    for name, whole in [*model.named_parameters(), *model.named_buffers()]:
        ranks.take(model, name, whole.detach())
    return join(model, ranks)
