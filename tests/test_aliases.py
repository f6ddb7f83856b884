"""TransformerLens's names: they reach the points that they mean, or say why they cannot."""

from pathlib import Path

import pytest
import torch
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab import cli
from llama4_lab.aliases import ALIASES, ON_MOE, WITHOUT_POINT, aliases, match, resolve
from llama4_lab.points import Tap, described
from llama4_lab.points_page import as_markdown

pytestmark = pytest.mark.usefixtures("no_grad")

KNOWN = l4.points(CONFIG)
PAGE = Path(__file__).parents[1] / "docs" / "points.md"


@pytest.fixture(scope="module")
def prompt():
    ids = torch.randint(4, 89, (2, 13), generator=torch.Generator().manual_seed(0))
    ids[:, 3:12] = CONFIG.image_token_index
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}


def test_every_alias_reads_its_point_under_the_name_that_was_asked(prompt):
    model = tiny()
    names = aliases(KNOWN)
    assert {alias.point for alias in ALIASES} == {
        point.replace(point.split(".")[1], "{i}", 1) if point.startswith("layers.") else point
        for point in names.values()
    }
    with l4.trace(model, list(names)) as theirs, l4.trace(model, "*") as ours:
        model(**prompt)
    assert set(theirs) == set(names)
    for alias, point in names.items():
        assert torch.equal(theirs[alias], ours[point]), alias


@pytest.mark.parametrize(
    ("alias", "point"),
    [
        ("hook_embed", "embed"),
        ("blocks.3.hook_resid_pre", "layers.3.resid_pre"),
        ("blocks.3.hook_resid_mid", "layers.3.resid_mid"),
        ("blocks.3.hook_resid_post", "layers.3.resid_post"),
        ("blocks.3.attn.hook_q", "layers.3.attn.q"),
        ("blocks.3.attn.hook_rot_k", "layers.3.attn.rot_k"),
        ("blocks.3.attn.hook_attn_scores", "layers.3.attn.scores"),
        ("blocks.3.attn.hook_pattern", "layers.3.attn.pattern"),
        ("blocks.3.hook_attn_out", "layers.3.attn.out"),
        ("blocks.2.hook_mlp_out", "layers.2.mlp.out"),
        ("blocks.3.mlp.hook_router_scores", "layers.3.router.logits"),
        ("ln_final.hook_normalized", "final_norm"),
        ("unembed.hook_out", "logits"),
    ],
)
def test_an_alias_changes_its_point(prompt, alias, point):
    def double(value):
        return 2 * value

    model = tiny()
    with l4.intervene(model, {point: double}):
        ours = model(**prompt)
    with l4.intervene(model, {alias: double}):
        assert torch.equal(model(**prompt), ours)
    with l4.trace(model, point):
        assert not torch.equal(model(**prompt), ours)


def test_router_scores_are_what_the_hook_of_that_name_holds_in_transformers():
    """Its second output, which TransformerLens hooks, are the logits before the sigmoid."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    model = tiny()
    block = model.layers[1].feed_forward
    theirs = Llama4TextMoe(
        Llama4TextConfig(
            hidden_size=48, intermediate_size=40, num_local_experts=5, num_experts_per_tok=2
        )
    )
    theirs.router.weight.copy_(block.router.weight)
    x = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1))
    seen = {}

    class Watch(Tap):
        def __call__(self, name, value):
            seen[name] = value
            return value

    block(x, Watch(), "loop")
    torch.testing.assert_close(theirs(x)[1], seen["router.logits"][0])


def test_patterns_of_aliases_reach_many_points():
    assert list(resolve(CONFIG, "blocks.*.attn.hook_z")) == [
        f"blocks.{i}.attn.hook_z" for i in range(6)
    ]
    assert match(CONFIG, ["blocks.[01].hook_resid_*", "hook_embed"]) == [
        "embed",
        *(f"layers.{i}.resid_{part}" for i in (0, 1) for part in ("pre", "mid", "post")),
    ]


def test_a_pattern_means_points_wherever_points_fit():
    assert list(resolve(CONFIG, "*")) == list(KNOWN)
    assert list(resolve(CONFIG, "*embed")) == ["vision.embed", "embed"]
    assert list(resolve(CONFIG, "*hook_embed")) == ["hook_embed"]


def test_two_names_of_one_point_are_both_kept(prompt):
    model = tiny()
    names = ["embed", "hook_embed", "embed.hook_out"]
    with l4.trace(model, names) as cache:
        model(**prompt)
    assert set(cache) == set(names)
    assert match(CONFIG, names) == ["embed"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blocks.3.attn.hook_patern", "did you mean 'blocks.3.attn.hook_pattern'"),
        ("hook_embeds", "did you mean 'hook_embed'"),
        ("blocks.9.hook_resid_pre", r"this model has 6 layers \(0 to 5\)"),
        ("blocks.9.nonsense", r"this model has 6 layers \(0 to 5\)"),
        (
            "blocks.0.mlp.hook_router_scores",
            "'blocks.0.mlp.hook_router_scores': layer 0 is a dense layer; MoE layers are 1, 3, 5",
        ),
        (
            "blocks.3.hook_mlp_out",
            "MoE layer 3 has no single point for it: take 'layers.3.experts.out', summed over "
            "topk, and 'layers.3.shared.out': it is their sum",
        ),
        (
            "blocks.*.hook_mlp_out",
            r"MoE layers have no single point for it: take 'layers.\{i\}.experts.out'.*"
            "dense layers are 0, 2, 4",
        ),
        ("blocks.1.mlp.hook_post", "take 'layers.1.experts.hidden'"),
        ("blocks.2.attn.hook_result", "has no point here: .* 'layers.2.attn.z' of the head"),
        ("blocks.*.ln1.hook_scale", "has no point here: take 'layers.{i}.resid_pre'"),
        ("hook_pos_embed", "positions enter by rotating q and k"),
    ],
)
def test_hooks_without_a_point_say_why(name, sentence):
    for context in (l4.trace(tiny(), name), l4.intervene(tiny(), {name: torch.clone})):
        with pytest.raises(KeyError, match=sentence), context:
            pass


def test_the_sum_that_stands_for_hook_mlp_out_is_what_a_moe_layer_adds(prompt):
    model = tiny()
    with l4.trace(model, "layers.3.*") as cache:
        model(**prompt)
    at = {name.removeprefix("layers.3."): value for name, value in cache.items()}
    added = at["experts.out"].sum(2) + at["shared.out"]
    torch.testing.assert_close(at["resid_mid"] + added, at["resid_post"])


def test_every_piece_of_advice_names_points_that_exist():
    advice = [*WITHOUT_POINT.values(), *ON_MOE.values()]
    quoted = [name for text in advice for name in text.split("'")[1::2]]
    assert quoted
    for name in quoted:
        assert any(point.endswith(name.removeprefix("layers.{i}")) for point in KNOWN), name


def test_a_text_model_says_that_it_has_no_vision_hooks():
    with (
        pytest.raises(KeyError, match="hook_out': this model has no vision encoder"),
        l4.trace(tiny(vision_config=None), "vision_encoder.hook_out"),
    ):
        pass


# --- the page ----------------------------------------------------------------------


def test_the_committed_page_is_what_the_command_writes(capsys):
    assert cli.main(["points", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), (
        "write it again: llama4-lab points --markdown > docs/points.md"
    )


@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(vision_config=None), l4.SCOUT])
def test_the_page_lists_every_point_with_its_axes_and_layers(config):
    page = as_markdown(config)
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    listed = {row[1].strip("`"): row for row in rows if len(row) == 7}
    for name, point in described(config).items():
        kind = ".".join("{i}" if part.isdigit() else part for part in name.split("."))
        assert listed[kind][2] == point.axes
        assert listed[kind][4] == point.meaning
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        which = {"–": layer is None, "all": True}
        if not name.startswith("vision."):
            moe = layer is not None and config.is_moe(layer)
            which |= {"MoE": moe, "dense": not moe}
        assert which[listed[kind][3]], name
    assert ("Vision" in page) == (config.vision_config is not None)


def test_the_command_lists_the_points_of_a_shipped_model(capsys):
    assert cli.main(["points", "--model", "nano"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = "b t d        the residual stream that the layer reads"
    assert dict(lines)["layers.0.resid_pre"] == said
    assert cli.main(["points", "--model", "no_such_model"]) == 1
    assert "unknown model 'no_such_model'" in capsys.readouterr().err
