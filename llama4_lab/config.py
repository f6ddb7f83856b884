"""Sizes and per-layer rules of a Llama 4 model; presets; parameter counts.

Field names are those of Hugging Face's ``config.json``. Read `llama4_lab.model.text` next.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, cast, get_args


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling; with ``low == high`` there is no zone in between."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _check_values(self, "rope_scaling ")


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder and its adapter; every size in pixels, patches or channels."""

    hidden_size: int = 1408
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    num_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 4096
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _check_values(self, "vision ")
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )
        _require(
            self.shuffle * self.pixel_shuffle_ratio == 1 and self.grid % self.shuffle == 0,
            f"pixel_shuffle_ratio {self.pixel_shuffle_ratio} does not divide "
            f"a grid of {self.grid}x{self.grid} patches into whole blocks",
        )
        _require(
            self.hidden_size % (4 * self.num_attention_heads) == 0,
            f"vision hidden_size {self.hidden_size} needs heads of a width divisible by 4 for "
            f"two-dimensional RoPE; {self.num_attention_heads} heads do not give it",
        )
        _require(
            self.intermediate_size == self.hidden_size * self.shuffle**2,
            f"vision intermediate_size {self.intermediate_size} must be hidden_size / "
            f"pixel_shuffle_ratio^2 = {self.hidden_size * self.shuffle**2}: the adapter reads it",
        )
        _require(
            self.projector_input_dim == self.projector_output_dim == self.vision_output_dim,
            f"projector_input_dim {self.projector_input_dim}, projector_output_dim "
            f"{self.projector_output_dim} and vision_output_dim "
            f"{self.vision_output_dim} must agree",
        )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def shuffle(self) -> int:
        """Patches along one side of the block that becomes one image token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.shuffle) ** 2

    @property
    def tile(self) -> dict[str, Any]:
        """What `llama4_lab.prompt.build_prompt` has to know of a tile."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "shuffle_ratio": self.pixel_shuffle_ratio,
            "num_channels": self.num_channels,
        }


@dataclass(frozen=True)
class Llama4Config:
    """A Llama 4 model: the text decoder, and the vision encoder if there is one.

    Raises:
        ValueError: values of the wrong kind, or sizes that contradict each other, with the values.
    """

    vocab_size: int = 202048
    hidden_size: int = 5120
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 8192  # of one expert, and of the shared expert
    intermediate_size_mlp: int = 16384  # of a dense layer
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 1
    moe_layers: tuple[int, ...] | None = None  # overrides the step
    no_rope_layer_interval: int = 4
    no_rope_layers: tuple[int, ...] | None = None  # 1 means that RoPE IS used; overrides interval
    attention_chunk_size: int | None = 8192  # None: RoPE layers see the whole past
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    use_qk_norm: bool = True
    attention_bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 262144
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 200000
    eos_token_id: int | tuple[int, ...] | None = (200001, 200007, 200008)
    pad_token_id: int | None = 200018
    boi_token_index: int = 200080
    eoi_token_index: int = 200081
    image_token_index: int = 200092  # <|patch|>, the token that an image feature replaces
    vision_config: VisionConfig | None = None
    is_estimate: bool = field(default=False, compare=False)  # invented sizes of an unreleased model

    def __post_init__(self) -> None:
        for name in _LISTS:
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))  # which can be hashed and compared
        _check_values(self)
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim {self.head_dim} is odd: RoPE rotates pairs of numbers",
        )
        _require(
            self.num_experts_per_tok <= self.num_local_experts,
            f"num_experts_per_tok {self.num_experts_per_tok} must lie between 1 and "
            f"num_local_experts {self.num_local_experts}",
        )
        _require(
            self.attention_chunk_size is None or self.attention_chunk_size > 0,
            f"attention_chunk_size {self.attention_chunk_size} must be positive, "
            "or None for no chunks",
        )
        if self.no_rope_layers is not None:
            _require(
                len(self.no_rope_layers) >= self.num_hidden_layers,
                f"no_rope_layers has {len(self.no_rope_layers)} entries "
                f"for {self.num_hidden_layers} layers",
            )
        for layer in self.moe_layers or ():
            _require(
                0 <= layer < self.num_hidden_layers,
                f"moe_layers names layer {layer}; this model has layers 0 to "
                f"{self.num_hidden_layers - 1}",
            )

    # ---- per-layer rules

    def is_moe(self, layer: int) -> bool:
        """Whether the layer routes its tokens to experts; otherwise it has one dense MLP."""
        self.check_layer(layer)
        if self.moe_layers is not None:
            return layer in self.moe_layers
        step = self.interleave_moe_layer_step
        return step > 0 and (layer + 1) % step == 0

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers with experts, in order; none in a dense model."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    def uses_rope(self, layer: int) -> bool:
        """Whether the layer rotates queries and keys (and then attends inside chunks)."""
        self.check_layer(layer)
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def attention_chunk(self, layer: int) -> int | None:
        """Tokens in one attention chunk of the layer; ``None`` where it sees the whole past."""
        return self.attention_chunk_size if self.uses_rope(layer) else None

    def check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_hidden_layers:
            raise ValueError(
                f"layer {layer} is out of range: this model has {self.num_hidden_layers} layers "
                f"(0 to {self.num_hidden_layers - 1})"
            )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens after which generation ends; none where the config names none."""
        eos = self.eos_token_id
        return (eos,) if isinstance(eos, int) else tuple(eos or ())

    # ---- values in and out

    def replace(self, **changes: Any) -> "Llama4Config":
        """Copy with some fields changed; an unknown name is refused with the closest known one.

        With fewer layers, what `moe_layers` and `no_rope_layers` say of the others is left out.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise TypeError(f"Llama4Config has no field {name!r}{hint}")
        layers = changes.get("num_hidden_layers", self.num_hidden_layers)
        if isinstance(layers, int) and 0 <= layers < self.num_hidden_layers:
            if self.moe_layers is not None:
                kept = tuple(layer for layer in self.moe_layers if layer < layers)
                changes.setdefault("moe_layers", kept)
            if self.no_rope_layers is not None:
                changes.setdefault("no_rope_layers", self.no_rope_layers[:layers])
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Llama4Config":
        """Read any published variant of ``config.json``, multimodal or text only.

        Both spellings of the RoPE settings are read (``rope_theta`` with ``rope_scaling``, and
        ``rope_parameters``); ``attn_temperature_tuning`` may be an integer as at launch, and
        ``no_rope_layers`` empty. Lists of layers that say the same as the step and the interval, as
        transformers writes them, are left out.

        Raises:
            ValueError: not a Llama 4 config, or a setting that this implementation does not have.
        """
        known = ("llama4", "llama4_text")
        if raw.get("model_type") not in known:
            raise ValueError(
                f"model_type {raw.get('model_type')!r} is not a Llama 4: "
                f"expected one of {', '.join(known)}"
            )
        for name in ("text_config", "vision_config"):
            may_be_none = name == "vision_config"
            _require(
                isinstance(given := raw.get(name, {}), dict) or (may_be_none and given is None),
                f"{name} {given!r:.80} must be an object" + " or None" * may_be_none,
            )
        text = {**raw, **raw.get("text_config", {})}
        if "text_config" in raw:  # of the two, transformers looks at the inner one
            text["tie_word_embeddings"] = raw["text_config"].get("tie_word_embeddings", False)
        values = _known_fields(cls, text)
        _require(
            text.get("hidden_act", "silu") == "silu",
            f"hidden_act {text.get('hidden_act')!r} is not supported: Llama 4 uses 'silu'",
        )
        values |= _rope_fields(text)
        if isinstance(tuning := values.get("attn_temperature_tuning"), int):
            values["attn_temperature_tuning"] = bool(tuning)
        for name in _LISTS:
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        if not values.get("no_rope_layers"):
            values["no_rope_layers"] = None
        if (vision := raw.get("vision_config")) is not None:
            fields = _known_fields(VisionConfig, vision) | _rope_fields(vision)
            values["vision_config"] = VisionConfig(**fields)
        # Models without MoE layers may count no experts; nothing reads these numbers then.
        names = ("num_local_experts", "num_experts_per_tok")
        none = [name for name in names if values.get(name) == 0]
        values |= dict.fromkeys(none, 1)
        is_given = values.get("head_dim") is not None
        values["head_dim"] = values["head_dim"] if is_given else cls.head_dim
        config = cls(**values)  # what checks the numbers that are divided
        config._check_layer_types(text.get("layer_types"))
        if none and (moe := config.routed_layers):
            raise ValueError(f"{none[0]} 0 must be positive: layer {moe[0]} has experts")
        if not is_given:
            config = config.replace(head_dim=config.hidden_size // config.num_attention_heads)
        return config._with_rules()

    def _with_rules(self) -> "Llama4Config":
        """Leave out lists of layers that say the same as the step and the interval."""
        usual = self.replace(moe_layers=None, no_rope_layers=None)
        changes = {}
        if usual.routed_layers == self.routed_layers:
            changes["moe_layers"] = None
        if all(usual.uses_rope(i) == self.uses_rope(i) for i in range(self.num_hidden_layers)):
            changes["no_rope_layers"] = None
        return self.replace(**changes)

    def _check_layer_types(self, types: list[str] | None) -> None:
        """Refuse another rule of who attends in chunks than that of RoPE.

        transformers takes masks from ``layer_types``, and rotations from ``no_rope_layers``.
        """
        if types is None:
            return
        for layer in range(self.num_hidden_layers):
            given = types[layer] if layer < len(types) else None
            usual = "chunked_attention" if self.uses_rope(layer) else "full_attention"
            is_alike = self.attention_chunk(layer) is None and given == "full_attention"
            _require(
                given == usual or is_alike,
                f"layer_types has {given!r} for layer {layer}, where only {usual!r} is supported: "
                f"it {'has' if self.uses_rope(layer) else 'is without'} RoPE, and RoPE layers "
                "attend in chunks, the others to all",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a ``config.json`` that transformers and `from_dict` read."""
        text = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in (*_OF_PICTURES, "vision_config", "is_estimate")
        }
        pictures = {name: getattr(self, name) for name in _OF_PICTURES}
        layers = range(self.num_hidden_layers)
        text |= {
            "model_type": "llama4_text",
            "hidden_act": "silu",
            "no_rope_layers": [int(self.uses_rope(i)) for i in layers],
            "moe_layers": [*self.routed_layers],
            "rope_scaling": None,
        }
        if (self.pad_token_id or 0) >= self.vocab_size:  # transformers looks for its embedding
            text["pad_token_id"] = None
        if self.rope_scaling is not None:
            text["rope_scaling"] = dataclasses.asdict(self.rope_scaling) | {"rope_type": "llama3"}
        if self.vision_config is None:
            return {"architectures": ["Llama4ForCausalLM"]} | text | pictures
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "tie_word_embeddings": self.tie_word_embeddings,
            **pictures,
            "text_config": text,
            "vision_config": dataclasses.asdict(self.vision_config)
            | {"model_type": "llama4_vision_model", "hidden_act": "gelu"},
        }

    # ---- counts

    def parameter_counts(self) -> dict[str, int]:
        """Count parameters by part; ``total``, and ``active`` for one text token.

        ``active`` counts what one text token's forward pass uses: one set of routed experts, the
        shared expert, attention, norms, and both embedding tables; no vision.
        """
        d, f, e = self.hidden_size, self.intermediate_size, self.num_local_experts
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layers = self.num_hidden_layers
        moe = len(self.routed_layers)
        counts = {
            "embeddings": self.vocab_size * d * (1 if self.tie_word_embeddings else 2),
            "attention": layers * (2 * d * (q + kv) + self.attention_bias * (q + 2 * kv + d)),
            "norms": layers * 2 * d + d,
            "routers": moe * d * e,
            "routed experts": moe * e * 3 * d * f,
            "shared experts": moe * 3 * d * f,
            "dense MLPs": (layers - moe) * 3 * d * self.intermediate_size_mlp,
        }
        active = sum(counts.values()) - moe * (e - self.num_experts_per_tok) * 3 * d * f
        if (vision := self.vision_config) is not None:
            w, m = vision.hidden_size, vision.intermediate_size
            block = 4 * (w * w + w) + (2 * w * m + w + m) + 4 * w
            patches = vision.grid**2 + 1
            embed = w * vision.num_channels * vision.patch_size**2 + w + patches * w
            adapter = m * vision.projector_input_dim + vision.projector_output_dim**2
            counts["vision encoder"] = vision.num_hidden_layers * block + embed + 4 * w + adapter
            counts["projector"] = vision.vision_output_dim * d
        return counts | {"total": sum(counts.values()), "active": active}


_LISTS = ("moe_layers", "no_rope_layers", "eos_token_id")
_OF_PICTURES = ("boi_token_index", "eoi_token_index", "image_token_index")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[int, ...]: "a list of whole numbers",
    NoneType: "None",
}
_MAY_BE_ZERO = ("num_hidden_layers", "interleave_moe_layer_step")
_OF_ANY_SIGN = ("_id", "_index", "attn_scale")  # what the names of such numbers end in


def _check_values(config: Any, where: str = "") -> None:
    """Compare a config's values with its annotations, and refuse numbers that are not positive."""
    for f in dataclasses.fields(config):
        name, value, annotation = where + f.name, getattr(config, f.name), cast(Any, f.type)
        kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        words = " or ".join(_WORDS.get(kind) or kind.__name__ for kind in kinds)
        _require(
            any(_is_of_kind(value, kind) for kind in kinds),
            f"{name} {value!r:.80} must be {words}",
        )
        if annotation in (int, float) and not f.name.endswith(_OF_ANY_SIGN):
            may_be_zero = f.name in _MAY_BE_ZERO
            _require(
                value > 0 or (may_be_zero and value == 0),
                f"{name} {value} must be positive" + ", or 0" * may_be_zero,
            )


def _is_of_kind(value: Any, kind: Any) -> bool:
    if kind == tuple[int, ...]:
        return isinstance(value, tuple) and all(isinstance(each, int) for each in value)
    if isinstance(value, bool):  # which Python counts among the whole numbers
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _known_fields(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)} - {"vision_config", "rope_scaling"}
    return {name: value for name, value in raw.items() if name in names}


def _rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Read ``rope_parameters`` (one dict) or ``rope_theta`` with ``rope_scaling``."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(
        kind in ("default", "llama3"),
        f"rope_type {kind!r} is not supported: Llama 4 uses 'default' or 'llama3'",
    )
    fields: dict[str, Any] = {}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is not None:
        fields["rope_theta"] = theta
    if kind == "llama3":
        names = [f.name for f in dataclasses.fields(RopeScaling)]
        missing = [name for name in names if name not in rope]
        _require(not missing, f"rope_type 'llama3' without {', '.join(missing)}")
        fields["rope_scaling"] = RopeScaling(**{name: rope[name] for name in names})
    return fields


SCOUT = Llama4Config(
    rope_scaling=RopeScaling(), max_position_embeddings=10485760, vision_config=VisionConfig()
)
"""Llama 4 Scout 17B-16E Instruct."""

MAVERICK = Llama4Config(
    num_local_experts=128,
    interleave_moe_layer_step=2,
    use_qk_norm=False,
    max_position_embeddings=1048576,
    vision_config=VisionConfig(),
)
"""Llama 4 Maverick 17B-128E Instruct."""

BEHEMOTH_ESTIMATE = SCOUT.replace(
    hidden_size=14336,
    num_hidden_layers=128,
    num_attention_heads=112,
    intermediate_size=20480,
    is_estimate=True,
)
"""AN ESTIMATE. Behemoth was announced (288B active, 16 experts, nearly two trillion parameters) but
never released; these sizes are invented to be consistent with those three numbers."""
