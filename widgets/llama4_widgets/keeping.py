"""What of a lab is kept, with what it was made with."""

import datetime
import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from llama4_lab import edits as E
from llama4_lab.analysis.routing import routing_of
from llama4_lab.checkpoint.quantised import packable
from llama4_lab.model import Llama4
from llama4_lab.packed import Packed
from llama4_lab.prompt.images import open_picture
from llama4_widgets.moment import Moment
from llama4_widgets.recording import Recording

_HASHED = 1 << 26  # numbers; of larger models every n-th


def record(prompt: Any, moment: Moment, states: Mapping[str, Any], beside: str = "") -> Recording:
    """Return what views show of a moment, their states; `beside` says what else stands there.

    `prompt` is what was asked for: a text or messages.
    """
    config = moment.model.config
    about = {
        "prompt": prompt,
        "tokens": moment.tokens,
        "ids": moment.prompt.input_ids[0].tolist(),
        "edits": E.dumps(moment.edits),
        "beside": beside,
        "boxes": [list(box) for box in moment.boxes],
        "model": model_facts(moment.model),
        "config": config.to_dict(),
        "versions": {name: version(name) for name in ("llama4-lab", "torch")},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    routing = {}
    if config.routed_layers:
        found = vars(moment.edited(routing_of))
        routing = {name: np.asarray(found[name]) for name in found if name != "tokens"}
    pictures = [open_picture(picture) for picture in moment.pictures]
    return Recording(about, dict(states), routing, pictures)


def model_facts(model: Llama4) -> dict[str, str]:
    """Return a model's name and a hash of its numbers: of all, or of every n-th if there are many.

    Experts that stay on disk are not read for it, and `of` says so.
    """
    named = {weight.data_ptr(): (name, weight) for name, weight in model.state_dict().items()}
    weights = dict(named.values())  # tied ones once
    total = sum(weight.numel() for weight in weights.values())
    step = -(-total // _HASHED)
    digest = hashlib.sha256()
    for name, weight in weights.items():
        part = weight.detach().flatten()[::step].cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(part.view(torch.uint8).numpy().data)
    file = getattr(model.tokenizer, "file", None)
    multiplied = (getattr(module, part) for module, part in packable(model).values())
    packed = sorted({weight.kind for weight in multiplied if isinstance(weight, Packed)})
    kinds = packed or sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})
    of = f"all {total:,} numbers" if step == 1 else f"every {step}th of {total:,} numbers"
    of += "" if model.expert_memory is None else ", experts on disk left out"
    name = f"{file.parent.name if file else 'unnamed'} ({', '.join(kinds)})"
    return {"name": name, "sha256": digest.hexdigest(), "of": of}
