"""Checkpoints in our own layout: which weights are packed, and what config.json says of them.

Routed experts lie as we hold them, not transposed. A packed weight is two tensors of the file,
``NAME_codes`` and ``NAME_scales``, laid out as `llama4_lab.packed` describes. config.json has
``"quantization_config": {"method": "llama4_lab", "kind": "int4", "group_size": 128}``, or the kind
"none" where nothing is packed.

transformers 5 opens a folder whose ``quant_method`` it does not know, with a warning and seeded
weights. Without that key it stops with an error, and so does it at the shapes of experts that are
not transposed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.checkpoint.files import PROGRAMS
from llama4_lab.experts.mapped import Mapped
from llama4_lab.model import Llama4
from llama4_lab.model.linear import Linear, Packable
from llama4_lab.model.text import Experts
from llama4_lab.packed import GROUP, KINDS, Packed, empty, pack

METHOD = "llama4_lab"
PLAIN = {"method": METHOD, "kind": "none"}  # what config.json says where nothing is packed
OF_PACKED = ("_codes", "_scales")  # what the names of a packed weight's tensors end in
_VISION = ("vision_model.", "multi_modal_projector.")


@dataclass(frozen=True)
class Quantisation:
    """How weights are packed: a row whose length `group_size` does not divide has smaller groups.

    The group of such a row is the largest power of two that divides it. fp8 has a scale a row.
    """

    kind: str
    group_size: int = GROUP

    def empty(self, shape: tuple[int, ...], device: torch.device | str) -> Packed:
        """Return room for a weight of this shape."""
        return empty(shape, self.kind, self.group(shape[-1]), device)

    def pack(self, weight: Tensor) -> Packed:
        return pack(weight, self.kind, self.group(weight.shape[-1]))

    def group(self, k: int) -> int:
        return min(self.group_size, k & -k)

    def to_dict(self) -> dict[str, Any]:
        return {"method": METHOD, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], path: Path) -> "Quantisation | None":
        """Read config.json's ``quantization_config``; None if nothing is packed.

        Raises:
            ValueError: another program's, or one that says what no file of ours does.
        """
        method = raw.get("method", raw.get("quant_method"))
        if method != METHOD:
            raise ValueError(
                f"{path}: quant_method {method!r}: of quantised files those of {PROGRAMS} are "
                "read; convert the bfloat16 checkpoint with `llama4-lab convert --quantize`"
            )
        kind, group = raw.get("kind"), raw.get("group_size", GROUP)
        if kind == PLAIN["kind"]:
            return None
        if kind not in KINDS:
            raise ValueError(f"{path}: kind {kind!r} of quantised weights is not {_one_of(KINDS)}")
        if not isinstance(group, int) or group < 1 or group & (group - 1):
            raise ValueError(f"{path}: group_size {group!r} is not a power of two")
        return cls(kind, group)


def _one_of(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}"


@runtime_checkable
class Source(Protocol):
    """A folder of plain weights."""

    def pieces(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]: ...


def packable(model: Llama4) -> dict[str, tuple[Packable, str]]:
    """Return the weights that quantisation packs: modules and names there, by full name.

    They are the text decoder's linears. Routers decide by small differences and are small;
    embeddings are looked up, not multiplied with; and the vision encoder has 1% of the weights.
    """
    tied = model.config.tie_word_embeddings
    found = {}
    for path, module in model.named_modules():
        if path.startswith(_VISION) or (tied and path == "lm_head"):
            continue
        if isinstance(module, Linear):
            found[f"{path}.weight"] = module, "weight"
        elif isinstance(module, Experts):
            for name in ("gate_up_proj", "down_proj"):
                found[f"{path}.{name}"] = module, name
    return found


def declare(model: Llama4, quantisation: Quantisation) -> list[str]:
    """Turn the weights of a model on the meta device into packed ones; return their names.

    Experts that stay in a file are left as they are.

    Raises:
        ValueError: rows that cannot be packed so.
    """
    check_rows(model, quantisation)
    names = []
    for name, (module, part) in packable(model).items():
        if not isinstance(weight := getattr(module, part), Mapped):
            module.put(part, quantisation.empty(tuple(weight.shape), "meta"))
            names.append(name)
    return names


def check_rows(model: Llama4, quantisation: Quantisation) -> None:
    """Refuse weights whose rows are odd where two go into a byte."""
    for name, (module, part) in packable(model).items():
        width = getattr(module, part).shape[-1]
        if quantisation.kind == "int4" and width % 2:
            raise ValueError(
                f"{name} has rows of {width} weights, and int4 packs two to a byte: choose int8 or "
                "fp8"
            )


def read_packed(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str],
    quantisation: Quantisation,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yield codes and scales of weights that are packed while they are read.

    Routed experts come one by one: no more than one matrix is in memory unpacked.
    """
    for name in tqdm(names, desc=f"quantising to {quantisation.kind}", unit="tensor", delay=2):
        whole = of_packed(name, quantisation.empty(shapes[name], device))
        start = 0
        for rows in source.pieces(name, shapes):
            for part, packed in of_packed(name, quantisation.pack(rows.to(device))).items():
                whole[part].flatten(0, -2)[start : start + len(rows)] = packed
            start += len(rows)
        yield from whole.items()


def of_packed(name: str, weight: Packed) -> dict[str, Tensor]:
    """Return the two tensors that stand for a weight."""
    return dict(
        zip((name + part for part in OF_PACKED), (weight.codes, weight.scales), strict=True)
    )


def require_plain(model: Llama4, what: str) -> None:
    """Refuse to change weights that are no parameters.

    Raises:
        ValueError: some weights are packed, or in a file.
    """
    for name, (module, part) in packable(model).items():
        if part not in module._parameters:
            weight = getattr(module, part)
            held = weight.kind if isinstance(weight, Packed) else "in a file"
            raise ValueError(
                f"{what} takes plain weights in memory, but {name} is {held}: load the model "
                "without quantize and experts"
            )


def require_whole(model: Llama4, what: str) -> None:
    """Refuse to read weights of which other processes hold parts.

    Raises:
        ValueError: the model is divided among ranks.
    """
    if (size := model.ranks.size) > 1:
        raise ValueError(
            f"{what} reads weights, of which this rank holds one part of {size}: load the model "
            "whole on one device"
        )


def quantisation_of(model: Llama4) -> Quantisation | None:
    """Return how a model's weights are packed; None if they are not.

    Raises:
        ValueError: some are and some are not, or in different ways.
    """
    weights = {name: getattr(module, part) for name, (module, part) in packable(model).items()}
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, Packed)}
    if not packed:
        return None
    first = cast(Packed, next(iter(packed.values())))
    for name in weights:
        if name not in packed or packed[name].kind != first.kind:
            how = f"packed as {packed[name].kind}" if name in packed else "not packed"
            raise ValueError(
                f"{name} is {how} but {next(iter(packed))} is {first.kind}: a checkpoint has one "
                "kind of weights; quantise all of them with load(..., quantize=...)"
            )
    usual = Quantisation(first.kind)
    if first.kind == "fp8" or all(w.group == usual.group(w.shape[-1]) for w in packed.values()):
        return usual
    return Quantisation(first.kind, max(weight.group for weight in packed.values()))
