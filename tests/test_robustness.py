"""Attacks on pictures do what they promise, and the routing they change is counted."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.analysis.features import Target
from llama4_lab.analysis.robustness import LEVEL, attack
from llama4_lab.prompt import Prompt, build_prompt

TARGET = Target(token=7)


@pytest.fixture(scope="module")
def model(tokenizer) -> l4.Llama4:
    config = CONFIG.replace(
        vocab_size=336, image_token_index=tokenizer.patch_id, num_hidden_layers=4
    )
    return l4.random(config, seed=3).eval()


@pytest.fixture(scope="module")
def prompt(tokenizer) -> Prompt:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return build_prompt(
        tokenizer,
        "is it",
        [Image.fromarray(pixels)],
        image_size=24,
        patch_size=4,
        shuffle_ratio=0.5,
    )


def log_probability(model, prompt, pixels):
    return model(prompt.input_ids, pixels)[0, -1].log_softmax(dim=-1)[TARGET.token]


@torch.no_grad()
def experts(model, prompt, pixels):
    with l4.trace(model, "layers.*.router.indices") as cache:
        model(prompt.input_ids, pixels)
    return [cache[f"layers.{i}.router.indices"][0].sort().values for i in (1, 3)]


@pytest.mark.parametrize("towards", [False, True])
def test_fgsm_is_one_step_along_the_sign_of_the_gradient(model, prompt, towards):
    pixels = prompt.pixel_values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_probability(model, prompt, pixels), pixels)
    step = (1 if towards else -1) * 3 * LEVEL * gradient.sign()
    found = attack(model, prompt, TARGET, method="fgsm", radius=3 * LEVEL, towards=towards)
    torch.testing.assert_close(
        found.pixel_values, (prompt.pixel_values + step).clamp(-1, 1), atol=1e-6, rtol=0
    )
    assert (found.change > 0) == towards


@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_an_attack_tells_what_it_did(model, prompt, method):
    found = attack(model, prompt, TARGET, method=method, radius=0.3)
    with torch.no_grad():
        before = log_probability(model, prompt, prompt.pixel_values)
        after = log_probability(model, prompt, found.pixel_values)
    assert (found.before, found.after) == pytest.approx((float(before), float(after)), abs=1e-5)
    assert found.change == found.after - found.before < 0
    assert found.layers == (1, 3)
    clean, changed = (experts(model, prompt, x) for x in (prompt.pixel_values, found.pixel_values))
    for row, (was, now) in enumerate(zip(clean, changed, strict=True)):
        np.testing.assert_array_equal(found.flipped[row], (was != now).any(dim=-1))
    np.testing.assert_array_equal(found.flips, found.flipped.sum(axis=1))
    assert found.flips.sum() > 0
    assert not found.flipped[:, 0].any()  # <|begin_of_text|> does not see the picture


def test_a_level_is_how_far_apart_two_neighbouring_greys_are(tokenizer):
    one, other = (
        build_prompt(
            tokenizer,
            "is it",
            [Image.new("RGB", (24, 24), (grey, grey, grey))],
            image_size=24,
            patch_size=4,
            shuffle_ratio=0.5,
        ).pixel_values
        for grey in (100, 101)
    )
    torch.testing.assert_close(other - one, torch.full_like(one, LEVEL), atol=1e-6, rtol=0)


def test_a_step_of_pgd_is_as_long_as_it_is_asked_to_be(model, prompt):
    found = attack(model, prompt, TARGET, radius=0.3, steps=2, step_size=0.01)
    change = (found.pixel_values - prompt.pixel_values).abs()
    assert change.max() == pytest.approx(0.02, abs=1e-6)
    usual = attack(model, prompt, TARGET, radius=0.3, steps=5)
    change = (usual.pixel_values - prompt.pixel_values).abs()
    assert change.max() == pytest.approx(0.3, abs=1e-6)


def test_pgd_goes_further_than_one_step_within_the_same_radius(model, prompt):
    found = {
        name: attack(model, prompt, TARGET, method=name, radius=0.3) for name in ("fgsm", "pgd")
    }
    assert found["pgd"].after < found["fgsm"].after
    change = found["pgd"].pixel_values - prompt.pixel_values
    assert float(change.abs().max()) <= 0.3 + 1e-6
    assert float(found["pgd"].pixel_values.abs().max()) <= 1


def test_the_radius_of_l2_is_the_length_of_the_whole_change(model, prompt):
    found = attack(model, prompt, TARGET, radius=0.5, step_size=0.1, steps=3, norm="L2")
    assert float((found.pixel_values - prompt.pixel_values).norm()) <= 0.5 + 1e-5
    assert found.change < 0


def test_pixels_outside_the_mask_stay(model, prompt):
    mask = torch.zeros_like(prompt.pixel_values)
    mask[:, :, :8] = 1
    found = attack(model, prompt, TARGET, mask=mask)
    changed = found.pixel_values != prompt.pixel_values
    assert changed[:, :, :8].any()
    assert not changed[:, :, 8:].any()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_random_start_comes_from_the_seed_and_leaves_generators_alone(
    model, prompt, norm, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("a GPU was seeded"))
    mask, state = torch.ones_like(prompt.pixel_values), torch.random.get_rng_state()
    mask[:, :, :8] = 0
    options = {"steps": 1, "step_size": 0.0, "random_start": True, "norm": norm, "mask": mask}
    with torch.inference_mode():
        one, again, other = (
            attack(model, prompt, TARGET, seed=seed, **options).pixel_values for seed in (1, 1, 2)
        )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    changed = one != prompt.pixel_values
    assert changed[:, :, 8:].any() and not changed[:, :, :8].any()


def test_a_model_that_routes_nothing_is_attacked_too(prompt, tokenizer):
    config = CONFIG.replace(vocab_size=336, image_token_index=tokenizer.patch_id)
    found = attack(l4.random(config.replace(interleave_moe_layer_step=0)), prompt, TARGET)
    assert found.change < 0
    assert found.layers == () and found.flipped.shape == (0, len(prompt.tokens))


def test_what_cannot_be_attacked_is_explained(model, prompt, tokenizer):
    with pytest.raises(ValueError, match="unknown attack 'cw' with norm 'Linf'; choose 'fgsm' or"):
        attack(model, prompt, method="cw")
    with pytest.raises(ValueError, match="unknown attack 'pgd' with norm 'L1'; choose 'fgsm' or"):
        attack(model, prompt, norm="L1")
    with pytest.raises(ValueError, match=r"this prompt has no image to attack: build it with imag"):
        attack(model, build_prompt(tokenizer, "is it"))
