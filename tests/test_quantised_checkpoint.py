"""Our own layout, and quantised models: loaded so, saved, opened again, watched and edited."""

import copy
import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes_folder import write_bitsandbytes
from compressed_folder import write_compressed
from meta_folder import PARAMS, write_meta
from mlx_folder import packed, write_mlx
from modelopt_folder import write_modelopt
from parity import VISION, pair, text_config
from peak_memory import peak_of_loading
from safetensors.torch import load_file, save_file
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab.checkpoint import compressed, convert, mlx, modelopt, parts
from llama4_lab.checkpoint.files import Stored
from llama4_lab.checkpoint.params import config_from_params
from llama4_lab.checkpoint.parts import unpack
from llama4_lab.checkpoint.quantised import packable
from llama4_lab.packed import KINDS, Packed, pack
from llama4_lab.prompt import Prompt, Spans

IDS = torch.arange(5, 29)[None] % 89
UP = "language_model.model.layers.1.feed_forward.experts.2.up_proj.weight"
BITS = {"int8": 0.02, "int4": 0.35, "fp8": 0.08}  # how far logits may be off, of their spread


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    l4.save(tiny(), folder, max_shard_bytes=150_000)
    return folder


def stored(folder):
    return load_file(folder / "model.safetensors")


def assert_refused(folder, change, sentence, key="quantization_config"):
    """Change tensors and what config.json says of them, and see that a sentence refuses both."""
    state, config = stored(folder), json.loads((folder / "config.json").read_text())
    change(state, config[key])
    config["quantization_config"] = config[key]
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        l4.load(folder)


def put_back(model):
    """Return a plain model with the weights that a quantised one stands for."""
    plain = tiny()
    state = model.state_dict()
    for name, (module, part) in packable(model).items():
        state[name] = getattr(module, part).unpack()
        del state[f"{name}_codes"], state[f"{name}_scales"]
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_quantised_model_computes_with_the_rounded_weights(folder, kind):
    plain, model = l4.load(folder), l4.load(folder, quantize=kind)
    for name, (module, part) in packable(model).items():
        weight = getattr(module, part)
        assert isinstance(weight, Packed) and weight.kind == kind
        expected = pack(plain.get_parameter(name), kind).unpack()
        assert torch.equal(weight.unpack(), expected), name
    logits, exact = model(IDS), plain(IDS)
    torch.testing.assert_close(logits, put_back(model)(IDS), atol=1e-5, rtol=1e-4)
    off = (logits - exact).std() / exact.std()
    assert 1e-4 < off < BITS[kind]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_saved_quantised_model_opens_as_it_was(folder, kind, tmp_path):
    model = l4.load(folder, quantize=kind)
    l4.save(model, tmp_path / "q", max_shard_bytes=100_000)
    again = l4.load(tmp_path / "q")
    assert torch.equal(again(IDS), model(IDS))
    content = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert content == {"method": "llama4_lab", "kind": kind, "group_size": 128}
    assert torch.equal(l4.load(tmp_path / "q", quantize=kind)(IDS), model(IDS))
    # The same file again: nothing is rounded twice.
    l4.save(again, tmp_path / "r")
    for name, tensor in l4.load(tmp_path / "r").state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), model.state_dict()[name].view(torch.uint8))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_all_of_our_own_layout_stays_in_the_file(folder, kind, tmp_path):
    l4.convert(folder, tmp_path, quantize=kind)
    model = l4.load(tmp_path)
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line.split("-", 1) for line in lines if str(tmp_path) in line]
    ranges = [(int(low, 16), int(rest.split()[0], 16)) for low, rest in mapped]
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        assert any(low <= weight.data_ptr() < high for low, high in ranges), name


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_transformers_refuses_our_own_layout(folder, kind, tmp_path):
    from transformers import AutoModelForCausalLM, Llama4ForCausalLM

    l4.convert(folder, tmp_path, quantize=kind, text_only=True)
    for theirs in (AutoModelForCausalLM, Llama4ForCausalLM):
        with pytest.raises(ValueError, match=r"quantization config .* has no `quant_method`"):
            theirs.from_pretrained(tmp_path)
    if kind is None:  # and were this key lost, the shapes would still speak
        raw = json.loads((tmp_path / "config.json").read_text())
        del raw["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            Llama4ForCausalLM.from_pretrained(tmp_path)
        name = "model.layers.1.feed_forward.experts.gate_up_proj"
        sentence = f"{name} is [5, 80, 48] where config.json asks for [5, 48, 80]"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            l4.load(tmp_path)


def test_meta_folders_can_be_quantised(tmp_path):
    model = l4.random(config_from_params(PARAMS))
    l4.save(model, tmp_path / "hf")
    write_meta(tmp_path / "meta", load_file(tmp_path / "hf" / "model.safetensors"), PARAMS, 2)
    expected = l4.load(tmp_path / "hf", quantize="int4").state_dict()
    found = l4.load(tmp_path / "meta", quantize="int4").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


# ---- what is done with models


@pytest.fixture(scope="module")
def int8(folder):
    return l4.load(folder, quantize="int8")


@torch.no_grad()
def test_points_can_be_watched_and_changed(int8):
    plain = put_back(int8)
    close = {"atol": 2e-5, "rtol": 1e-4}
    with l4.trace(int8, "*") as found, l4.trace(plain, "*") as expected:
        int8(IDS), plain(IDS)
    assert (
        found.keys() == expected.keys() == set(l4.points(int8.config.replace(vision_config=None)))
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **close)
    changes = {"layers.1.experts.hidden": torch.zeros_like, "layers.2.attn.z": lambda z: 2 * z}
    with l4.intervene(int8, changes), l4.intervene(plain, changes):
        assert not torch.allclose(found["logits"], int8(IDS))
        torch.testing.assert_close(int8(IDS), plain(IDS), **close)


@torch.no_grad()
def test_edited_runs_replay(int8):
    plain = put_back(int8)
    runs = [
        [l4.edits.DropExpert(layer=3, expert=2)],
        [l4.edits.AblateHead(layer=2, head=1)],
        [l4.edits.Scale("layers.0.mlp.hidden", 3.0)],
        [l4.edits.SkipLayer(layer=4)],
    ]
    found = l4.Replay(int8, {"input_ids": IDS}).many(runs)
    expected = l4.Replay(plain, {"input_ids": IDS}).many(runs)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.logits, other.logits, atol=2e-5, rtol=1e-4)
        assert mine.effect.unseen == [] and mine.effect.kl.max() > 1e-6
    hidden = found[2].evidence["layers.0.mlp.hidden"]
    assert hidden.changed > 0 and hidden.used_by == "linear"


def test_gradients_reach_the_embeddings(int8):
    plain = put_back(int8)
    for model in (int8, plain):
        model.zero_grad()
        model(IDS)[0, -1, 7].backward()
    torch.testing.assert_close(
        int8.embed_tokens.weight.grad, plain.embed_tokens.weight.grad, atol=1e-5, rtol=1e-3
    )


@torch.no_grad()
def test_decoding_with_a_cache_equals_one_pass(int8):
    whole, cache = int8(IDS), int8.new_cache()
    parts = [int8(part, cache=cache) for part in IDS.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_leaves_codes_and_scales(folder, kind):
    model = l4.load(folder, quantize=kind)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copied = copy.deepcopy(model).bfloat16()
    assert copied.dtype == torch.bfloat16 and copied.to("meta").lm_head.weight.kind == kind
    copied = copy.deepcopy(model).bfloat16()
    for name, buffer in copied.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8))
    assert copied(IDS).dtype == torch.bfloat16
    model.load_state_dict(copied.float().state_dict())
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        tiny().load_state_dict(model.state_dict())


@torch.no_grad()
def test_analyses_read_packed_weights_or_say_why_not(int8):
    from llama4_lab.analysis.decomposition import decompose_logit
    from llama4_lab.analysis.pruning import pruned, survey
    from llama4_lab.analysis.quantisation import rounded

    plain = put_back(int8)
    unknown = Spans(*(torch.full_like(IDS, -1) for _ in range(4)), [], [], None)
    prompt = Prompt(IDS, None, torch.ones_like(IDS), [[""] * IDS.shape[1]], unknown)
    mine, other = (decompose_logit(model, prompt, target=3) for model in (int8, plain))
    torch.testing.assert_close(mine.values, other.values, atol=1e-4, rtol=1e-3)
    found = survey(int8, [IDS])
    assert abs(found.similarity - survey(plain, [IDS]).similarity).max() < 1e-3
    sentence = (
        "merging experts takes plain weights in memory, but layers.0.self_attn.q_proj.weight is "
        "int8: load the model without quantize and experts"
    )
    with pytest.raises(ValueError) as raised, pruned(int8, found, 3, how="merge"):
        pass
    assert str(raised.value) == sentence
    with (
        pytest.raises(ValueError, match=r"^rounding takes plain weights"),
        rounded(int8, 1, "int8"),
    ):
        pass


def test_biases_are_added(tmp_path):
    model = tiny(attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    l4.save(model, tmp_path)
    with torch.no_grad():
        off = l4.load(tmp_path, quantize="int8")(IDS) - model(IDS)
        assert off.std() / model(IDS).std() < BITS["int8"]


# ---- what does not fit


def spoil(folder, at, change):
    """Save an int4 checkpoint with some of its tensors changed."""
    l4.save(l4.load(folder, quantize="int4"), at)
    tensors = load_file(at / "model.safetensors")
    change(tensors)
    save_file(tensors, at / "model.safetensors")


def spoil_config(folder, at, **changes):
    l4.save(l4.load(folder, quantize="int4"), at)
    raw = json.loads((at / "config.json").read_text())
    raw["quantization_config"] |= changes
    (at / "config.json").write_text(json.dumps(raw))


def transpose_experts(folder, at):
    l4.convert(folder, at)
    tensors = load_file(at / "model.safetensors")
    tensors[DOWN] = tensors[DOWN].mT.contiguous()
    save_file(tensors, at / "model.safetensors")


Q = "language_model.model.layers.0.self_attn.q_proj.weight"
DOWN = "language_model.model.layers.3.feed_forward.experts.down_proj"
BROKEN = {
    "lost scales": (
        lambda folder, at: spoil(folder, at, lambda t: t.pop(f"{Q}_scales")),
        f"{{at}}/model.safetensors lacks {Q}_scales, which config.json asks for",
    ),
    "scales of other groups": (
        lambda folder, at: spoil(
            folder, at, lambda t: t.update({f"{Q}_scales": t[f"{Q}_scales"][:, :1].clone()})
        ),
        f"{{at}}/model.safetensors: {Q}_scales is [96, 1] where config.json asks for [96, 3]",
    ),
    "scales in float16": (
        lambda folder, at: spoil(
            folder, at, lambda t: t.update({f"{Q}_scales": t[f"{Q}_scales"].half()})
        ),
        f"{{at}}/model.safetensors: {Q}_scales holds float16 where config.json asks for bfloat16",
    ),
    "codes of another kind": (
        lambda folder, at: spoil(
            folder, at, lambda t: t.update({f"{Q}_codes": t[f"{Q}_codes"].char()})
        ),
        f"{{at}}/model.safetensors: {Q}_codes holds I8 where config.json asks for uint8",
    ),
    "a plain weight": (
        lambda folder, at: spoil(folder, at, lambda t: t.update({Q: torch.zeros(96, 48)})),
        f"{{at}}/model.safetensors holds {Q}, for which config.json has no place",
    ),
    "the wrong kind": (
        lambda folder, at: spoil_config(folder, at, kind="int8"),
        f"{{at}}/model.safetensors: {Q}_codes is [96, 24] where config.json asks for [96, 48]",
    ),
    "an unknown kind": (
        lambda folder, at: spoil_config(folder, at, kind="int3"),
        "{at}/config.json: kind 'int3' of quantised weights is not int8, int4 or fp8",
    ),
    "experts of Hugging Face's layout": (
        transpose_experts,
        f"{{at}}/model.safetensors: {DOWN} is [5, 40, 48] where config.json asks for [5, 48, 40]",
    ),
    "an odd group": (
        lambda folder, at: spoil_config(folder, at, group_size=100),
        "{at}/config.json: group_size 100 is not a power of two",
    ),
    "other groups": (
        lambda folder, at: spoil_config(folder, at, group_size=8),
        f"{{at}}/model.safetensors: {Q}_scales is [96, 3] where config.json asks for [96, 6]",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_explained(folder, what, tmp_path):
    breaking, sentence = BROKEN[what]
    breaking(folder, tmp_path)
    with pytest.raises(ValueError) as raised:
        l4.load(tmp_path)
    assert str(raised.value) == sentence.format(at=tmp_path)


def test_a_wrong_wish_is_explained(folder, tmp_path):
    with pytest.raises(ValueError, match=r"unknown kind 'int3'.*choose int8, int4, fp8"):
        l4.load(folder, quantize="int3")
    l4.save(l4.load(folder, quantize="int4"), tmp_path)
    with pytest.raises(ValueError, match=r"holds int4 weights, which cannot become 'int8': leave"):
        l4.load(tmp_path, quantize="int8")
    model = l4.load(folder, quantize="int4")
    model.layers[1].feed_forward.experts.put("down_proj", pack(torch.randn(5, 48, 40), "int8"))
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.feed_forward\.experts\.down_proj is packed as int8 but "
        r"layers\.0\.self_attn\.q_proj\.weight is int4: a checkpoint has one kind of weights",
    ):
        l4.save(model, tmp_path / "mixed")


def test_odd_rows_are_named_where_two_weights_go_into_a_byte(tmp_path):
    l4.save(tiny(hidden_size=45, vision_config=None), tmp_path / "odd")
    sentence = (
        "layers.0.self_attn.q_proj.weight has rows of 45 weights, and int4 packs two to a byte: "
        "choose int8 or fp8"
    )
    for write in (l4.load, partial(convert, target=tmp_path / "new")):
        with pytest.raises(ValueError) as caught:
            write(tmp_path / "odd", quantize="int4")
        assert str(caught.value) == sentence
    assert not (tmp_path / "new").exists()
    l4.load(tmp_path / "odd", quantize="int8")


def test_a_tied_head_stays_the_table_of_embeddings(tmp_path):
    l4.save(tiny(tie_word_embeddings=True, vision_config=None), tmp_path / "plain")
    model = l4.load(tmp_path / "plain", quantize="int8")
    assert model.lm_head.weight is model.embed_tokens.weight
    l4.save(model, tmp_path / "int8")
    again = l4.load(tmp_path / "int8")
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.slow
def test_quantising_takes_the_packed_weights_and_one_matrix(tmp_path):
    config = CONFIG.replace(
        hidden_size=256, intermediate_size=1024, num_local_experts=16, num_hidden_layers=4,
        interleave_moe_layer_step=1, vision_config=None,
    )  # fmt: skip
    model = l4.random(config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    l4.save(model, tmp_path)
    del model
    peak = peak_of_loading(tmp_path, quantize="int4")
    # 202 MB in float32. The codes and scales are 26 MB; a matrix of an expert is 2 MB, and rounding
    # it takes a few times as much.
    assert weights > 200e6 and peak < 26e6 + 24e6


# --- of compressed-tensors


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A transformers model with dense layers and a vision encoder, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("theirs") / "plain"
    hf, _ = pair(text_config(interleave_moe_layer_step=2), VISION)
    hf.save_pretrained(folder)
    return hf, folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The same with rows that groups of 32 divide."""
    folder = tmp_path_factory.mktemp("wide") / "plain"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 128}
    hf, _ = pair(text_config(interleave_moe_layer_step=2, **sizes), VISION)
    hf.save_pretrained(folder)
    return hf, folder


def check_opens_as(folder, rounded, hf):
    """Compare a folder of codes with transformers on the weights that they stand for."""
    ids = torch.arange(5, 29)[None]
    found, expected = l4.load(folder), l4.load(rounded)
    assert found.dtype == torch.float32 and found.config == expected.config
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    again = type(hf).from_pretrained(rounded).eval()
    torch.testing.assert_close(found(ids), again(ids).logits, atol=1e-5, rtol=0)

    found.backend, left = "loop", l4.load(folder, experts="mmap")
    assert torch.equal(left(ids), found(ids))
    left.expert_memory.limit = left.expert_memory.bytes_read = 0
    left.expert_memory.clear()
    for i in left.config.routed_layers:
        experts = left.layers[i].feed_forward.experts
        for e in range(num := left.config.num_local_experts):
            _ = experts.gate_up_proj[e], experts.down_proj[e]
    ends = ("_shape", "input_scale", "input_zero_point", "input_global_scale", "weight_format")
    held = {name: t for name, t in stored(folder).items() if ".experts." in name}
    read = [t.nbytes if t.ndim else num * t.nbytes for n, t in held.items() if not n.endswith(ends)]
    assert left.expert_memory.bytes_read == sum(read)

    ours = folder.with_name("ours")
    l4.convert(folder, ours)
    assert torch.equal(l4.load(ours)(ids), expected(ids))
    return found


@pytest.mark.parametrize("also", [(), ("self_attn.q_proj", "shared_expert")])
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@torch.no_grad()
def test_weights_of_compressed_tensors_are_those_of_its_codes(theirs, kind, also, tmp_path):
    also = tuple(f"language_model.model.layers.1.{'feed_forward.' * ('expert' in part)}{part}"
                 for part in also)  # fmt: skip
    hf, plain = theirs
    rounded = write_compressed(plain, tmp_path / "q", kind, also)
    found = check_opens_as(tmp_path / "q", rounded, hf)
    ids = torch.arange(5, 29)[None]
    assert (found(ids) - hf(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    "kind",
    ["fp8 blocks", "int4 zeros", "nvfp4", "int2", "int3", "int3 zeros", "int5", "int6 zeros"],
)
@torch.no_grad()
def test_weights_of_its_other_kinds_are_those_of_its_codes(wide, kind, tmp_path, monkeypatch):
    hf, plain = wide
    also = ("language_model.model.layers.1.self_attn.v_proj", "lm_head")
    rounded = write_compressed(plain, tmp_path / "q", kind, also)
    check_opens_as(tmp_path / "q", rounded, hf)
    monkeypatch.setattr(parts, "PIECE", 64 * 40)  # what rows share is there in every piece
    expected = l4.load(rounded).lm_head.weight
    assert torch.equal(l4.load(tmp_path / "q").lm_head.weight, expected)


def test_fp8_codes_are_kept_by_our_own_format(theirs, tmp_path):
    write_compressed(theirs[1], tmp_path / "q", "fp8")
    codes = stored(tmp_path / "q")
    for model in (
        l4.load(tmp_path / "q", quantize="fp8"),
        l4.convert(tmp_path / "q", tmp_path / "ours", quantize="fp8") or l4.load(tmp_path / "ours"),
    ):
        experts = model.layers[1].feed_forward.experts.down_proj
        for e in range(len(experts)):
            name = f"language_model.model.layers.1.feed_forward.experts.{e}.down_proj.weight"
            assert torch.equal(experts[e].codes.float(), codes[name].float())
            torch.testing.assert_close(experts[e].scales, codes[f"{name}_scale"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state, layout: layout.update(format="marlin-24"),
            "weights of compressed-tensors in the format 'marlin-24': only float-",
        ),
        (
            lambda state, layout: layout["config_groups"]["group_0"]["weights"].update(num_bits=9),
            "packed weights of [9] bits: only one size of 1 to 8 is read",
        ),
        (
            lambda state, layout: layout["config_groups"].update(
                group_1={"weights": {"num_bits": 4, "block_structure": [2, 4]}}
            ),
            "config.json: blocks of weights are [None, [2, 4]]: only one size is read",
        ),
        (
            lambda state, layout: layout.update(config_groups=[]),
            "config.json does not describe a Llama 4 (AttributeError",
        ),
        (
            lambda state, layout: state.pop(f"{UP}_packed"),
            f"lacks {UP[21:]}, which config.json asks for",
        ),
        (
            lambda state, layout: state.update({f"{UP}_zero_point": torch.zeros(3)}),
            f"{UP}_zero_point is [3] where config.json asks for [5, 6]",
        ),
        (
            lambda state, layout: state.update({f"{UP}_scale": torch.zeros(3)}),
            f"{UP}_scale is [3] where config.json asks for [40, 1]",
        ),
        (
            lambda state, layout: state.update({f"{UP}_packed": torch.zeros(40, 7).int()}),
            f"{UP}_packed is [40, 7] where config.json asks for [40, 6]",
        ),
        (
            lambda state, layout: (
                layout["config_groups"]["group_0"]["weights"].update(num_bits=6),
                state.update({f"{UP}_packed": torch.zeros(40, 10).int()}),
            ),
            f"{UP}_packed holds codes of 6 bits with gaps, as compressed-tensors 0.17 wrote them",
        ),
        (
            lambda state, layout: state.update({f"{UP}_packed": torch.zeros(40, 6).char()}),
            f"{UP}_packed holds I8 where config.json asks for int32",
        ),
    ],
)
def test_codes_that_cannot_be_read_are_refused_in_one_sentence(folder, change, sentence, tmp_path):
    l4.save(tiny(), tmp_path / "plain")
    write_compressed(tmp_path / "plain", tmp_path / "q", "int4")
    assert_refused(tmp_path / "q", change, sentence)


@pytest.mark.parametrize(
    "rows_of",
    [compressed.Nvfp4, partial(modelopt.Scaled, algorithm="NVFP4", is_transposed=False)],
    ids=["compressed-tensors", "ModelOpt"],
)
def test_rows_that_groups_of_nvfp4_do_not_divide_are_refused(rows_of):
    held = tuple(Stored(Path("m"), name, (), "U8") for name in ("codes", "scales", "of_all"))
    with pytest.raises(ValueError, match=r"^m: codes has groups of 16 weights, .* rows of 24$"):
        rows_of(held).layout(4, 24)


# --- of MLX


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_unpacked_bit_after_bit(bits):
    codes = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    found = unpack(torch.from_numpy(packed(codes.numpy(), bits)), bits)
    assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_that_codes_do_not_fill_are_unpacked(bits):
    codes = torch.randint(2**bits, (3, 32), generator=torch.Generator().manual_seed(bits))
    words = torch.from_numpy(packed(codes.numpy(), bits).view("int32"))
    found = unpack(torch.cat([words, words[:, :1]], dim=1), bits)
    assert torch.equal(found[:, :32].long(), codes)
    first = unpack(words[:, :1].mT.contiguous().mT, bits)  # the zero points of a few rows lie so
    assert torch.equal(first[:, : 32 // bits].long(), codes[:, : 32 // bits])


@pytest.mark.parametrize(
    ("mode", "bits", "others"),
    [
        (None, 4, {}),
        ("affine", 4, {}),
        ("affine", 2, {"down_proj": 6, "lm_head": 8, "layers.0.self_attn.v_proj": 3}),
        *((mode, 4, {}) for mode in ("mxfp4", "mxfp8", "nvfp4")),
    ],
)
@torch.no_grad()
def test_weights_of_mlx_are_those_of_its_codes(wide, mode, bits, others, tmp_path):
    hf, plain = wide
    rounded = write_mlx(plain, tmp_path / "q", mode, bits, others=others)
    check_opens_as(tmp_path / "q", rounded, hf)


@torch.no_grad()
def test_what_mlx_left_of_a_model_opens_in_other_ways(wide, tmp_path):
    ids = torch.arange(5, 29)[None]
    rounded = write_mlx(wide[1], tmp_path / "q", "affine")
    # The routed experts stay in few bits, and the others are packed.
    left = l4.load(tmp_path / "q", experts="mmap", quantize="int8")
    expected = l4.load(rounded, quantize="int8")
    found, plain = (model.layers[1].feed_forward.experts for model in (left, l4.load(rounded)))
    assert torch.equal(found.down_proj[2], plain.down_proj[2])
    found, expected = (model.layers[0].self_attn.q_proj.weight for model in (left, expected))
    assert torch.equal(found.codes, expected.codes)
    # A model whose read-out is its table of embeddings has one of them, or the same codes twice.
    state, config = stored(tmp_path / "q"), json.loads((tmp_path / "q/config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    # Other programs put what mlx-lm says of codes where the text model is described.
    config["text_config"]["quantization"] = config.pop("quantization")
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    base = "language_model."
    for part in ("weight", "scales", "biases"):
        state[f"{base}lm_head.{part}"] = state[f"{base}model.embed_tokens.{part}"].clone()
    save_file(state, tmp_path / "q" / "model.safetensors")
    twice = l4.load(tmp_path / "q")
    for part in ("weight", "scales", "biases"):
        del state[f"{base}lm_head.{part}"]
    save_file(state, tmp_path / "q" / "model.safetensors")
    once = l4.load(tmp_path / "q")
    assert once.lm_head.weight is once.embed_tokens.weight
    assert torch.equal(twice(ids), once(ids))


@torch.no_grad()
def test_what_stands_for_a_weight_may_lie_in_several_files(wide, tmp_path):
    write_mlx(wide[1], tmp_path / "q", "affine")
    ids, whole = torch.arange(5, 29)[None], l4.load(tmp_path / "q", experts="mmap")
    expected, state = whole(ids), stored(tmp_path / "q")
    names, weight_map = sorted(state), {}
    for i, of_file in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in of_file}, tmp_path / "q" / f"{i}.safetensors")
        weight_map |= dict.fromkeys(of_file, f"{i}.safetensors")
    index = tmp_path / "q" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "q" / "model.safetensors").unlink()
    left = l4.load(tmp_path / "q", experts="mmap")
    assert torch.equal(left(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(left))(ids), expected)
    # Another checkpoint that takes the names is not read.
    for file in sorted((tmp_path / "q").glob("*.safetensors")):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        file.unlink()
        save_file(zeros, file)
    left.expert_memory.clear()
    assert torch.equal(left(ids), expected)


def test_large_matrices_are_turned_back_some_rows_at_a_time(wide, tmp_path, monkeypatch):
    write_mlx(wide[1], tmp_path / "q", "affine")
    whole, sizes = l4.load(tmp_path / "q"), []
    turn_back = mlx.Coded.turn_back
    monkeypatch.setattr(parts, "PIECE", 64 * 40)
    monkeypatch.setattr(
        mlx.Coded, "turn_back", lambda *held: sizes.append(held[1].shape[0]) or turn_back(*held)
    )
    in_pieces = l4.load(tmp_path / "q")
    assert 40 in sizes and max(sizes) == 96  # of an expert
    for name, weight in whole.state_dict().items():
        assert torch.equal(in_pieces.state_dict()[name], weight), name


GATES = "language_model.model.layers.1.feed_forward.experts.gate_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state, layout: layout.update(mode="fp3"),
            "MLX's mode 'fp3' with 4 bits in groups of 32: only affine codes of 1 to 6 or 8 bits",
        ),
        (
            lambda state, layout: layout.update({GATES: {"bits": 7, "group_size": 32}}),
            "MLX's mode 'affine' with 7 bits in groups of 32: only affine codes of 1 to 6 or 8",
        ),
        (
            lambda state, layout: layout.update({GATES: {"bits": 6}}),
            "config.json does not describe a Llama 4 (KeyError: 'group_size')",
        ),
        (
            lambda state, layout: layout.update(bits=8),
            "is [97, 8] where config.json asks for [97, 16]",
        ),
        (
            lambda state, layout: layout.update({GATES: {"bits": 4, "group_size": 128}}),
            f"{GATES}.weight has groups of 128 weights, which do not divide its rows of 64",
        ),
        (
            lambda state, layout: state.pop(f"{GATES}.weight"),
            f"lacks {GATES[21:]}.weight, which config.json asks for",
        ),
        (
            lambda state, layout: state.pop(f"{GATES}.biases"),
            f"lacks {GATES}.biases, which config.json asks for",
        ),
        (
            lambda state, layout: state.update(
                {f"{GATES}.weight": state[f"{GATES}.weight"][:3].contiguous()}
            ),
            f"{GATES}.weight is [3, 96, 8] where config.json asks for [5, 96, 8]",
        ),
        (
            lambda state, layout: state.update(
                {f"{GATES}.weight": state[f"{GATES}.weight"].view(torch.int32)}
            ),
            f"{GATES}.weight holds I32 where config.json asks for uint32",
        ),
    ],
)
def test_codes_of_mlx_that_do_not_fit_are_refused_in_one_sentence(wide, change, sentence, tmp_path):
    write_mlx(wide[1], tmp_path / "q", "affine")
    assert_refused(tmp_path / "q", change, sentence, "quantization")


# --- of bitsandbytes


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "int8"])
@torch.no_grad()
def test_weights_of_bitsandbytes_are_those_of_its_codes(theirs, kind, experts, tmp_path):
    hf, plain = theirs
    rounded = write_bitsandbytes(plain, tmp_path / "q", kind, experts)
    check_opens_as(tmp_path / "q", rounded, hf)


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "int8"])
@torch.no_grad()
def test_weights_of_bitsandbytes_may_be_odd_in_number(kind, tmp_path):
    sizes = {"hidden_size": 45, "intermediate_size": 37, "intermediate_size_mlp": 51}
    hf, _ = pair(text_config(interleave_moe_layer_step=2, **sizes), VISION)
    hf.save_pretrained(tmp_path / "plain")
    rounded = write_bitsandbytes(tmp_path / "plain", tmp_path / "q", kind)
    found, expected = l4.load(tmp_path / "q").state_dict(), l4.load(rounded).state_dict()
    left = l4.load(tmp_path / "q", experts="mmap")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        if ".experts." in name:
            path, _, part = name.rpartition(".")
            mapped = getattr(left.get_submodule(path), part)
            assert torch.equal(torch.stack([mapped[e] for e in range(5)]), weight), name


ONE = "language_model.model.layers.1.feed_forward.experts.2.up_proj.weight"
STACK = "language_model.model.layers.1.feed_forward.experts.up_proj.weight"


def renamed(state, new, old=ONE):
    for name in [name for name in state if name.startswith(old)]:
        state[name.replace(old, new)] = state.pop(name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state: state.pop(f"{ONE}.absmax"),
            f"lacks {ONE[21:]}.absmax, which {ONE}.quant_state.bitsandbytes__nf4 asks for",
        ),
        (
            lambda state: state.update({f"{ONE}.absmax": torch.zeros(30).byte()}),
            f"{ONE}.absmax holds U8 where weights are",
        ),
        (
            lambda state: state.update({f"{ONE}.absmax": torch.zeros(29)}),
            f"{ONE}.absmax is [29] where config.json asks for [30]",
        ),
        (
            lambda state: state.update({ONE: state[ONE].to(torch.bfloat16)}),
            f"{ONE} holds bfloat16 where config.json asks for uint8",
        ),
        (
            lambda state: renamed(state, ONE.replace("experts.2", "experts.7")),
            f"lacks {ONE[21:]}, which config.json asks for",
        ),
        (
            lambda state: (
                renamed(state, STACK),
                renamed(state, STACK.replace("up", "gate"), ONE.replace("up", "gate")),
            ),
            f"{STACK.replace('up', 'gate')} stands for [40, 48]; of routed experts only those that "
            "lie one by one are read",
        ),
        (
            lambda state: state[f"{ONE}.quant_state.bitsandbytes__nf4"].fill_(65),
            "model.safetensors: Expecting value",
        ),
    ],
)
def test_codes_of_bitsandbytes_that_do_not_fit_are_refused(theirs, change, sentence, tmp_path):
    write_bitsandbytes(theirs[1], tmp_path / "q", "nf4")
    state = stored(tmp_path / "q")
    change(state)
    save_file(state, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        l4.load(tmp_path / "q")


# --- of ModelOpt


@pytest.mark.parametrize("is_beside", [False, True])
@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
@torch.no_grad()
def test_weights_of_modelopt_are_those_of_its_codes(wide, algorithm, is_beside, tmp_path):
    hf, plain = wide
    rounded = write_modelopt(plain, tmp_path / "q", algorithm, is_beside)
    check_opens_as(tmp_path / "q", rounded, hf)


STACKED = "language_model.model.layers.1.feed_forward.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state, layout: layout.update(quant_algo="W4A8_AWQ"),
            "weights of modelopt by 'W4A8_AWQ': only FP8 and NVFP4 are read",
        ),
        (
            lambda state, layout: state.pop(f"{STACKED}_weight_scale"),
            f"holds {STACKED}_weight_scale_2, for which config.json has no place",
        ),
        (
            lambda state, layout: state.update({STACKED: state[STACKED].mT.contiguous()}),
            f"{STACKED} is [5, 64, 48] where config.json asks for [5, 48, 64]",
        ),
        (
            lambda state, layout: state.update({f"{STACKED}_weight_scale_2": torch.ones(2)}),
            f"{STACKED}_weight_scale_2 is [2] where config.json asks for [5]",
        ),
    ],
)
def test_codes_of_modelopt_that_do_not_fit_are_refused(wide, change, sentence, tmp_path):
    write_modelopt(wide[1], tmp_path / "q", "NVFP4")
    assert_refused(tmp_path / "q", change, sentence)
