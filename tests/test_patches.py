"""A vision encoder learns to see before anything else."""

import numpy as np
import torch
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.config import VisionConfig
from llama4_lab.train import patches, scenes
from llama4_lab.train.shapes import COLOURS, PLACES, SHAPES

MODEL = CONFIG.replace(
    num_hidden_layers=2,
    vision_config=VisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=48,
        patch_size=4,
        projector_input_dim=CONFIG.hidden_size,
        projector_output_dim=CONFIG.hidden_size,
        vision_output_dim=CONFIG.hidden_size,
    ),
)


def test_each_token_is_numbered_after_the_object_in_its_place():
    scene = scenes.sample(np.random.default_rng(3), "caption").scenes[0]
    shape, colour, place = (patches.names([scene], name, 6)[0].view(6, 6) for name in patches.LOOKS)
    for idx, name in enumerate(PLACES):
        row, col = divmod(idx, 3)
        block = (slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2))
        there = [thing for thing in scene.objects if thing.place == name]
        assert (place[block] == idx + 1).all()
        assert (shape[block] == (1 + SHAPES.index(there[0].shape) if there else 0)).all()
        assert (colour[block] == (1 + COLOURS.index(there[0].colour) if there else 0)).all()


def test_features_are_those_that_the_model_reads():
    model = l4.random(MODEL)
    scene = scenes.sample(np.random.default_rng(3), "caption").scenes[0]
    ours = patches.see(model, [scene])
    ids = torch.full((1, 36), model.config.image_token_index)
    pixels = torch.from_numpy(scenes.draw(scene)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        theirs = torch.nn.functional.rms_norm(model.embed(ids, pixels), (ours.shape[-1],))
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0)  # ours in bfloat16


def test_the_encoder_learns_and_the_text_model_stays_as_it_was():
    model = l4.random(MODEL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    right = patches.teach_patches(model, 40, rows=12)
    assert right["place"] > 0.5
    assert right["colour"] > 0.3
    for name, value in model.state_dict().items():
        is_seeing = name.startswith(("vision_model", "multi_modal"))
        assert torch.equal(value, before[name]) == (not is_seeing), name
