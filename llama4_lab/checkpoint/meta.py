"""Meta's folders: ``params.json`` and a ``consolidated.*.pth`` for each model-parallel rank.

Most matrices are cut along one axis into as many parts as there are files; `rules` says which
axis, and how a part lies in its file. Read `llama4_lab.checkpoint.params` for the config.

Of a checkpoint in fp8 the matrices of routed experts are codes, each row of a part with a scale of
its own in ``fp8_scales_{rank}.pt`` (models/llama4/scripts/quantize.py of Meta's llama-models). They
become plain weights when they are read.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from llama4_lab.checkpoint.files import (
    PIECE,
    Stored,
    check,
    check_one_dtype,
    describing,
    fill,
    first_of,
    list_pth,
    map_pth,
    read_json,
)
from llama4_lab.checkpoint.params import config_from_params
from llama4_lab.config import Llama4Config

PARAMS = "params.json"


@dataclass(frozen=True)
class Rule:
    """Where the numbers of one of Meta's tensors belong, in the language of einops.

    `whole` names our tensor's axes; ``(r x)`` is cut into one part for each file, and without r
    all files hold the same. `piece` is how a file holds its part. Where one of Meta's tensors
    holds several of ours, their pieces follow each other along the first axis. `half` says that
    ours is filled only in the first (0) or second (1) half of its last axis but one.
    """

    theirs: str
    ours: tuple[str, ...]
    whole: str
    piece: str
    half: int | None = None

    def under(self, their_prefix: str, our_prefix: str) -> "Rule":
        """Put prefixes before the names."""
        ours = tuple(our_prefix + name for name in self.ours)
        return replace(self, theirs=their_prefix + self.theirs, ours=ours)

    def expected(self, ours: Sequence[Tensor], num_files: int) -> tuple[int, ...]:
        """Return the shape of Meta's tensor in each file, given ours (on the meta device).

        Raises:
            ValueError: one of ours cannot be cut into so many equal parts.
        """
        try:
            pieces = [self._piece_shape(self._part(tensor, 0, num_files)) for tensor in ours]
        except EinopsError as error:
            raise ValueError(
                f"{self.theirs} cannot be cut into {num_files} equal parts, one for each file"
            ) from error
        return (sum(piece[0] for piece in pieces), *pieces[0][1:])

    def fill(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], scales: Sequence[Tensor] = ()
    ) -> None:
        """Copy Meta's tensor into ours; `theirs` has what each file holds, a stack of codes if
        there are scales ``[e, out]``, one a file.
        """
        is_cut = "(r " in self.whole
        for rank, held in enumerate(theirs if is_cut else theirs[:1]):
            parts = [self._part(tensor, rank, len(theirs)) for tensor in ours]
            rows = [self._piece_shape(part)[0] for part in parts]
            for part, piece in zip(parts, held.split(rows), strict=True):
                sizes = dict(zip(self._axes.split(), part.shape, strict=True))
                laid = rearrange(piece, f"{self.piece} -> {self._axes}", **sizes)
                if not scales:
                    fill(part, laid)
                    continue
                for matrix, codes, scale in zip(part, laid, scales[rank], strict=True):
                    fill(matrix, codes.float() * scale[:, None])

    def scales(self, ours: Tensor, num_files: int) -> tuple[int, ...]:
        """Return the shape of a stack's scales in each file: one for each row of a matrix."""
        return tuple(self._part(ours, 0, num_files).shape[:2])

    @property
    def _axes(self) -> str:
        return re.sub(r"\(r (\w+)\)", r"\1", self.whole)

    def _part(self, ours: Tensor, rank: int, num_files: int) -> Tensor:
        """View what one file fills of our tensor."""
        if self.half is not None:
            ours = ours.chunk(2, dim=-2)[self.half]
        if "(r " not in self.whole:
            return ours
        return rearrange(ours, f"{self.whole} -> r {self._axes}", r=num_files)[rank]

    def _piece_shape(self, part: Tensor) -> torch.Size:
        return rearrange(part.to("meta"), f"{self._axes} -> {self.piece}").shape


def _same(theirs: str, ours: str, axes: str = "x") -> Rule:
    return Rule(theirs, (ours,), axes, axes)


def _rows(theirs: str, *ours: str) -> Rule:
    return Rule(theirs, ours, "(r o) i", "o i")


def _columns(theirs: str, ours: str) -> Rule:
    return Rule(theirs, (ours,), "o (r i)", "o i")


def _row_linear(theirs: str, ours: str) -> tuple[Rule, ...]:
    bias = Rule(f"{theirs}.bias", (f"{ours}.bias",), "(r o)", "o")
    return _rows(f"{theirs}.weight", f"{ours}.weight"), bias


def _column_linear(theirs: str, ours: str) -> tuple[Rule, ...]:
    bias = _same(f"{theirs}.bias", f"{ours}.bias")
    return _columns(f"{theirs}.weight", f"{ours}.weight"), bias


def _layernorm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(_same(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias"))


_EXPERTS = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}
_TEXT = (
    _rows("tok_embeddings.weight", "embed_tokens.weight"),
    _same("norm.weight", "norm.weight"),
    _rows("output.weight", "lm_head.weight"),
)
_ATTENTION = (
    _same("attention.wqkv.layer_norm_weight", "input_layernorm.weight"),
    _rows(
        "attention.wqkv.weight",
        *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    _columns("attention.wo.weight", "self_attn.o_proj.weight"),
)
_DENSE = (
    _same("feed_forward.mlp.layer_norm_weight", "post_attention_layernorm.weight"),
    _rows(
        "feed_forward.mlp.fc1_weight",
        *("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"),
    ),
    _columns("feed_forward.mlp.fc2_weight", "feed_forward.down_proj.weight"),
)
_MOE = (
    _same("feed_forward.norm.weight", "post_attention_layernorm.weight"),
    Rule("feed_forward.router_DE", ("feed_forward.router.weight",), "e d", "d e"),
    *(
        Rule(
            f"feed_forward.experts.{theirs}",
            ("feed_forward.experts.gate_up_proj",),
            *("e (r f) d", "(e d) f"),
            half=half,
        )
        for half, theirs in enumerate((_EXPERTS["w1"], _EXPERTS["w3"]))
    ),
    Rule(
        f"feed_forward.experts.{_EXPERTS['w2']}",
        ("feed_forward.experts.down_proj",),
        *("e d (r f)", "(e f) d"),
    ),
    _rows("feed_forward.w_in_shared_FD.weight", "feed_forward.shared_expert.gate_proj.weight"),
    _rows("feed_forward.w_swiglu_FD.weight", "feed_forward.shared_expert.up_proj.weight"),
    _columns("feed_forward.w_out_shared_DF.weight", "feed_forward.shared_expert.down_proj.weight"),
)
_VISION = (
    _rows("vision_encoder.conv1._linear.weight", "patch_embedding.linear.weight"),
    _same("vision_encoder.class_embedding", "class_embedding"),
    _same("vision_encoder.positional_embedding_vlm", "positional_embedding_vlm", "slots x"),
    *_layernorm("vision_encoder.ln_pre", "layernorm_pre"),
    *_layernorm("vision_encoder.ln_post", "layernorm_post"),
    _rows("vision_adapter.mlp.c_fc.weight", "vision_adapter.mlp.fc1.weight"),
    _columns("vision_adapter.mlp.c_proj.weight", "vision_adapter.mlp.fc2.weight"),
)
_VISION_LAYER = (
    *_layernorm("ln_1", "input_layernorm"),
    *_row_linear("attn.wq", "self_attn.q_proj"),
    *_row_linear("attn.wk", "self_attn.k_proj"),
    *_row_linear("attn.wv", "self_attn.v_proj"),
    *_column_linear("attn.wo", "self_attn.o_proj"),
    *_layernorm("ln_2", "post_attention_layernorm"),
    *_row_linear("mlp.c_fc", "mlp.fc1"),
    *_column_linear("mlp.c_proj", "mlp.fc2"),
)
_PROJECTOR = _rows("vision_projection.weight", "multi_modal_projector.linear_1.weight")


def rules(config: Llama4Config) -> Iterator[list[Rule]]:
    """Yield the rules of all tensors: those of the vision encoder, of each layer, of the rest."""

    def under(their_prefix: str, our_prefix: str, rules: Sequence[Rule]) -> list[Rule]:
        return [rule.under(their_prefix, our_prefix) for rule in rules]

    if config.vision_config is not None:
        vision = under("vision_embeddings.", "vision_model.", _VISION)
        blocks = "vision_embeddings.vision_encoder.transformer.resblocks."
        for i in range(config.vision_config.num_hidden_layers):
            vision += under(f"{blocks}{i}.", f"vision_model.model.layers.{i}.", _VISION_LAYER)
        yield [*vision, _PROJECTOR]
    for i in range(config.num_hidden_layers):
        feed_forward = _MOE if config.is_moe(i) else _DENSE
        yield under(f"layers.{i}.", f"layers.{i}.", _ATTENTION + feed_forward)
    yield list(_TEXT)


# ---- folders

_VISION_PREFIXES = ("vision_embeddings.", "vision_projection.")
_OF_THE_TRAINER = re.compile(
    r"rope\.freqs|.*(_extra_state|(running|global)_gate_stats_3E|expert_activation_DE)"
)


@dataclass(frozen=True)
class MetaFolder:
    """A folder whose files have been listed but not read."""

    config: Llama4Config
    files: list[Path]
    tensors: list[dict[str, Stored]]  # of each file, under Meta's names
    scales: list[dict[str, Stored]]  # of the same weights, for each file that holds codes
    quantisation = None  # the weights are plain, or become so
    is_coded = False

    @classmethod
    def open(cls, folder: Path, text_only: bool = False) -> "MetaFolder":
        """Read the config and the headers of all files.

        Raises:
            FileNotFoundError, ValueError: files missing or broken, or another model.
        """
        params = read_json(folder / PARAMS)
        with describing(folder / PARAMS):
            config = config_from_params(params)
        files = _files(folder)
        tensors = [
            {name: t for name, t in list_pth(file).items() if not _OF_THE_TRAINER.fullmatch(name)}
            for file in files
        ]
        if text_only:
            tensors = [
                {name: t for name, t in held.items() if not name.startswith(_VISION_PREFIXES)}
                for held in tensors
            ]
            config = config.replace(vision_config=None)
        return cls(config, files, tensors, _scales(folder, tensors))

    def check(self, ours: Mapping[str, Tensor]) -> None:
        """Compare the headers with our tensors' shapes.

        Raises:
            ValueError: with the first tensor that does not fit.
        """
        first, *others = self.tensors
        for held in others:
            for name in first:
                if name in held and held[name].shape != first[name].shape:
                    raise ValueError(
                        f"{held[name].file}: {name} is {list(held[name].shape)} but "
                        f"{list(first[name].shape)} in {first[name].file.name}: the files are not "
                        "parts of one checkpoint"
                    )
        expected, scales = {}, {}
        coded = _coded(first)
        with describing(self.files[0].parent):
            for rule in chain.from_iterable(rules(self.config)):
                whole = [ours[name].to("meta") for name in rule.ours]
                expected[rule.theirs] = rule.expected(whole, len(self.files))
                if rule.theirs in coded:
                    scales[rule.theirs] = rule.scales(whole[0], len(self.files))
        config = f"{PARAMS} with {len(self.files)} file{'s' * (len(self.files) > 1)}"
        codes = dict.fromkeys(coded, torch.float8_e4m3fn)
        for file, held in zip(self.files, self.tensors, strict=True):
            check(held, expected, listing=file, config=config, dtypes=codes)
        for rank, held in enumerate(self.scales):
            file = self.files[rank]
            check(held, scales, listing=_scales_file(file.parent, rank), config=file.name)

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters named, each copied once; `dtype` None keeps the files' one.

        The files are mapped anew for each layer: no page of a copied tensor stays in memory.
        """
        if dtype is None:
            dtype = self.dtype
        for group in rules(self.config):
            used = [rule for rule in group if rule.ours[0] in shapes]  # and so are its others
            if not used:
                continue
            mapped = [map_pth(file) for file in self.files]
            names = dict.fromkeys(name for rule in used for name in rule.ours)
            ours = {name: torch.empty(shapes[name], dtype=dtype, device=device) for name in names}
            for rule in used:
                rule.fill(
                    [ours[name] for name in rule.ours],
                    [held[rule.theirs] for held in mapped],
                    self._scales_of(rule),
                )
            yield from ours.items()

    def _scales_of(self, rule: Rule) -> list[Tensor]:
        """Read what a rule's codes are multiplied with, in each file."""
        found = [held[rule.theirs] for held in self.scales if rule.theirs in held]
        return [map_pth(stored.file)[stored.name] for stored in found]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights that are no codes.

        Raises:
            ValueError: there are two.
        """
        coded = _coded(self.tensors[0])
        plain = [t for held in self.tensors for name, t in held.items() if name not in coded]
        return check_one_dtype(plain)

    def pieces(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
        """Yield a weight, or those of a stack's experts, put together from all files.

        The files are mapped anew before more than 64 million weights of them are in memory.
        """
        of_name = [rule for group in rules(self.config) for rule in group if name in rule.ours]
        if len(shapes[name]) != 3:
            (rule,) = of_name
            ours = [torch.empty(shapes[each], dtype=self.dtype) for each in rule.ours]
            rule.fill(ours, [map_pth(file)[rule.theirs] for file in self.files])
            yield ours[rule.ours.index(name)]
            return
        num_experts, *matrix = shapes[name]
        at_once = max(1, PIECE // math.prod(matrix))
        scales = {rule: self._scales_of(rule) for rule in of_name}
        mapped: list[dict[str, Tensor]] = []
        for expert in range(num_experts):
            if expert % at_once == 0:
                mapped = [map_pth(file) for file in self.files]
            alone = torch.empty(1, *matrix, dtype=self.dtype)  # a stack of one
            for rule in of_name:  # one for gates, one for ups
                rule.fill(
                    [alone],
                    [held[rule.theirs].chunk(num_experts)[expert] for held in mapped],
                    [held[expert : expert + 1] for held in scales[rule]],
                )
            yield alone[0]


def _coded(tensors: Mapping[str, Stored]) -> list[str]:
    """Name the routed experts' matrices that are codes."""
    return [
        name
        for name, stored in tensors.items()
        if ".experts." in name and stored.dtype == torch.float8_e4m3fn
    ]


def _scales_file(folder: Path, rank: int) -> Path:
    return folder / f"fp8_scales_{rank}.pt"


def _scales(folder: Path, tensors: Sequence[Mapping[str, Stored]]) -> list[dict[str, Stored]]:
    """List the scales of each file's codes, under the names of the weights.

    Raises:
        FileNotFoundError: a file holds codes, and its scales are missing.
    """

    def weight(name: str) -> str:  # by Meta's writer it is that, by its reader one of a module
        return re.sub(r"(?<=\.experts\.)w[123]$", lambda module: _EXPERTS[module[0]], name)

    found = []
    for rank, held in enumerate(tensors):
        if not (coded := _coded(held)):
            continue
        file = _scales_file(folder, rank)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: it has the scales of what {held[coded[0]].file.name} holds in "
                f"8 bits, {first_of(coded)}"
            )
        found.append({weight(name): scales for name, scales in list_pth(file).items()})
    return found


def _files(folder: Path) -> list[Path]:
    """List the files in the order of their ranks."""
    ranks = {
        int(match[1]): file
        for file in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", file.name))
    }
    if not ranks:
        raise FileNotFoundError(
            f"{folder} has no weights: it needs consolidated.00.pth and the other ranks' files"
        )
    for rank in range(max(ranks)):
        if rank not in ranks:
            raise FileNotFoundError(
                f"{folder / f'consolidated.{rank:02d}.pth'} is missing: the folder has ranks "
                f"{', '.join(map(str, sorted(ranks)))}"
            )
    return [ranks[rank] for rank in sorted(ranks)]
