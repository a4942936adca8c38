"""Scene layouts.

Boxes and labels become tokens and act on a frozen image LDM. Training leaves some out. Files keep the layers.
"""

import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from video_ldm.nodes.host.layout_conditioning import call_unet
from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_layout, load_temporal
from video_ldm.temporal.formats import scene_layout_file as layout_format
from video_ldm.temporal.formats.temporal_file import Base
from video_ldm.temporal.scene_layout import (
    NOT_SAID,
    Layout,
    LayoutParams,
    SceneLayout,
    drop_conditions,
    picture_grid,
    unconditional_layout,
)
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext
from video_ldm.temporal.training.scene_layout_loss import LayoutLoss, Scenes
from video_ldm.tests.small import batch, randomise, relative_error, small_unet

PARAMS = LayoutParams(colours=("red", "blue", "white"), labels=(("light", ("day", "night")),), width=16, heads=2,
                      layers=2, frequencies=3, sites=((0, 64), (2, 64)))


def scene(seed=3):
    return randomise(SceneLayout(PARAMS), seed).requires_grad_(False)


def layout(boxes=((0.1, 0.2, 0.4, 0.5), (0.6, 0.5, 0.9, 0.8)), colours=(0, 1), present=None, told=True, light=1):
    return Layout(torch.tensor([boxes]).reshape(1, -1, 4), torch.tensor([colours], dtype=torch.long),
                  torch.tensor([present or (True,) * len(colours)]), torch.tensor([told]), torch.tensor([[light]]))


@pytest.fixture(scope="module")
def unet():
    return small_unet().requires_grad_(False)


def output(unet, network, told, images=2, patched=True):
    x, tau, context = batch(images, 1)
    with torch.no_grad():
        return call_unet(unet, network, x, tau, context, told) if patched else unet(x, tau, context=context)


# What a layout does

def test_before_training_a_layout_changes_nothing_to_the_bit(unet):
    assert torch.equal(output(unet, SceneLayout(PARAMS), layout()), output(unet, None, None, patched=False))


def test_boxes_colours_labels_and_leaving_them_out_each_change_the_output(unet):
    network, first = scene(), layout()
    heard = output(unet, network, first)
    others = [replace(first, boxes=first.boxes + 0.05), replace(first, colours=torch.tensor([[0, 2]])),
              replace(first, labels=torch.tensor([[2]])), replace(first, labels=torch.tensor([[NOT_SAID]])),
              replace(first, told=torch.tensor([False])), layout(present=(True, False))]
    assert min(relative_error(output(unet, network, other), heard) for other in others) > 1e-4


def test_the_order_of_boxes_does_not_matter_and_absent_boxes_are_as_if_they_were_not_there(unet):
    network, first = scene(), layout()
    swapped = Layout(first.boxes.flip(1), first.colours.flip(1), first.present, first.told, first.labels)
    assert relative_error(output(unet, network, swapped), output(unet, network, first)) < 1e-5
    alone = layout(boxes=((0.1, 0.2, 0.4, 0.5),), colours=(0,))
    absent = layout(present=(True, False))
    assert relative_error(output(unet, network, absent), output(unet, network, alone)) < 1e-5


def test_a_layout_without_boxes_and_one_that_says_nothing_run_and_differ(unet):
    network = scene()
    empty = layout(boxes=(), colours=())
    absent = output(unet, network, layout(present=(False, False)))
    assert relative_error(output(unet, network, empty), absent) < 1e-5
    assert relative_error(output(unet, network, unconditional_layout(PARAMS)), output(unet, network, empty)) > 1e-4


def test_images_with_a_layout_each_are_what_each_is_alone(unet):
    network, x, tau, context = scene(), *batch(2, 1)
    one, two = layout(), layout(colours=(2, 0), light=2)
    both = Layout(*(torch.cat([getattr(one, name), getattr(two, name)]) for name in Layout.__dataclass_fields__))
    with torch.no_grad():
        together = call_unet(unet, network, x, tau, context, both)
        alone = [call_unet(unet, network, x[k:k + 1], tau[k:k + 1], context[k:k + 1], both[k:k + 1]) for k in (0, 1)]
    assert relative_error(together, torch.cat(alone)) < 1e-5


@torch.no_grad()
def test_a_boxs_token_is_made_of_the_waves_of_its_corners_and_middle_and_its_colour():
    """By hand: sin and cos of pi 2^k times x0, y0, x1, y1 and the middle, k from 0, then the layers' weights."""
    network = randomise(SceneLayout(replace(PARAMS, layers=0)), 3).conditioner
    first = layout()
    tokens, there = network(first)
    assert tokens.shape == (1, 2 + 1 + 1, 16) and there.flatten().tolist() == [True] * 4
    for box, colour, token in zip(first.boxes[0].tolist(), first.colours[0], tokens[0]):
        x0, y0, x1, y1 = box
        values = x0, y0, x1, y1, (x0 + x1) / 2, (y0 + y1) / 2
        angles = [math.pi * 2 ** k * value for value in values for k in range(3)]
        waves = torch.tensor([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])
        expected = network.norm(network.box(waves) + network.colour.weight[colour])
        assert relative_error(token, expected) < 1e-5
    assert relative_error(tokens[0, 2], network.norm(network.labels[0].weight[1])) < 1e-6      # light 1
    assert relative_error(tokens[0, 3], network.norm(network.told.weight[1])) < 1e-6           # told


@torch.no_grad()
def test_a_layout_changes_each_place_of_an_even_picture_differently():
    """Queries know where they are: the same features in all places, and other answers in each."""
    act = scene().bind_layout(layout(), 4, 6)
    x = torch.randn(64, generator=torch.Generator().manual_seed(2)).expand(1, 24, 64)
    added = (act(x, 0) - x)[0]
    assert torch.pdist(added).min() > 1e-4
    assert torch.equal(act(x, 1), x)        # a block that has no attention of the layout


def test_the_middles_of_a_feature_maps_places_are_in_reading_order():
    grid = picture_grid(8, 4, 7)        # latents of 4 x 7, once halved: 2 x 4
    assert grid[:4, 0].tolist() == [0.125, 0.375, 0.625, 0.875] and grid[:4, 1].tolist() == [0.25] * 4
    assert grid[4:, 1].tolist() == [0.75] * 4
    with pytest.raises(VideoLDMError, match="9 places are no halving of the latents"):
        picture_grid(9, 4, 7)


def test_an_image_model_of_other_channels_is_refused(unet):
    other = SceneLayout(replace(PARAMS, sites=((0, 32),)))
    with pytest.raises(VideoLDMError, match="made for an image model with 32 channels where this one has 64"):
        output(unet, other, layout())


# Training

def test_labels_boxes_and_everything_are_left_out_as_often_as_told():
    many = layout()
    many = Layout(*(getattr(many, name).expand(20000, *getattr(many, name).shape[1:])
                    for name in Layout.__dataclass_fields__))
    dropped = drop_conditions(many, 0.1, torch.Generator().manual_seed(0))
    no_light, no_boxes = dropped.labels[:, 0] == NOT_SAID, ~dropped.told
    assert not dropped.present[no_boxes].any() and dropped.present[~no_boxes].all()
    assert abs(no_light.float().mean() - 0.19) < 0.01 and abs(no_boxes.float().mean() - 0.19) < 0.01
    assert abs((no_light & no_boxes).float().mean() - (0.1 + 0.9 * 0.01)) < 0.01
    kept = drop_conditions(many, 0.0, torch.Generator().manual_seed(0))
    assert all(torch.equal(getattr(kept, name), getattr(many, name)) for name in Layout.__dataclass_fields__)


@pytest.mark.slow
def test_training_moves_the_conditioner_alone_and_lowers_the_loss_where_the_box_says_what_is_there(unet, tmp_path):
    """Pictures whose left or right half is bright, as the box says and nothing else does."""
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0]], [[0.5, 0.0, 1.0, 1.0]]])

    def scenes(step):
        sides = torch.randint(0, 2, (8,), generator=step.generator)
        x = torch.full((8, 4, 8, 12), -1.0)
        for image, side in enumerate(sides.tolist()):
            x[image, :, :, 6 * side:6 * side + 6] = 1.0
        told = Layout(boxes[sides], torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1, dtype=torch.bool),
                      torch.ones(8, dtype=torch.bool), torch.zeros(8, 1, dtype=torch.long))
        return Scenes(x, told, torch.zeros(8, 7, 768))

    torch.manual_seed(0)
    network, before = SceneLayout(PARAMS), {key: value.clone() for key, value in unet.state_dict().items()}
    loss = LayoutLoss(unet, network, call_unet, Diffusion(0.0015, 0.0195, prediction="v"), scenes,
                      torch.zeros(7, 768), dropout=0.0)
    loop = Loop(LoopParams(steps=40, lr=1e-2, warmup=0, ema_decay=0.0, log_every=40), {"scene": network}, loss,
                tmp_path, "layout")
    fresh = torch.stack([loss(StepContext.make(1000 + k, 0))["loss"].detach() for k in range(4)]).mean()
    loop.run()
    trained = torch.stack([loss(StepContext.make(1000 + k, 0))["loss"].detach() for k in range(4)]).mean()
    assert trained < 0.9 * fresh
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    moved = [name for name, weight in network.named_parameters() if weight.grad is not None and weight.grad.abs().sum()]
    assert {name.split(".")[0] for name in moved} == {"conditioner", "attentions"}


# Files

def write(path, **changes):
    network = randomise(SceneLayout(PARAMS), 5)
    given = dict(tensors=network.state_dict(), params=PARAMS, null_text=torch.randn(7, 768),
                 base=Base("Stable Diffusion 1.x", 768), licence="Apache-2.0", metadata={"steps": "3"})
    layout_format.write(path, **{**given, **changes})
    return network


def test_a_scene_layout_survives_the_disk_to_the_bit(tmp_path):
    path = tmp_path / "scene.safetensors"
    network = write(path)
    content = load_layout(path)
    assert content.params == PARAMS and content.base == Base("Stable Diffusion 1.x", 768)
    assert content.metadata == {"steps": "3"} and content.licence == "Apache-2.0"
    assert content.null_text.shape == (7, 768) and content.tensors.keys() == network.state_dict().keys()
    assert all(torch.equal(content.tensors[key], value) for key, value in network.state_dict().items())


def test_what_does_not_belong_together_is_not_written(tmp_path):
    path = tmp_path / "scene.safetensors"
    for changes, words in (({"params": replace(PARAMS, width=32)}, "tensors and params disagree"),
                           ({"null_text": torch.zeros(7, 64)}, "null_text is l 768"),
                           ({"metadata": {"version": "9"}}, "entry version belongs to the format")):
        with pytest.raises(ValueError, match=words):
            write(path, **changes)
    assert list(tmp_path.iterdir()) == []


def rewritten(path, metadata=None, **changes):
    """The file with other metadata or tensors. None takes a tensor out."""
    with safe_open(str(path), framework="pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, {**file.metadata(), **(metadata or {})}
    tensors |= changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path, metadata=header)


@pytest.mark.parametrize("metadata, changes, words", [
    ({"version": "2"}, {}, "scene layout file of version 2, and this pack reads version 1"),
    ({"params": "{}"}, {}, "metadata is damaged"),
    ({"params": "["}, {}, "metadata is damaged"),
    ({"base_context_dim": "wide"}, {}, "metadata is damaged"),
    ({}, {"null_text": None}, "null_text has shape"),
    ({}, {"conditioner.told.weight": None}, "lacks conditioner.told.weight"),
    ({}, {"conditioner.more": torch.zeros(1)}, "has the unknown tensor conditioner.more"),
    ({}, {"conditioner.told.weight": torch.zeros(3, 16)}, "has shape \\[3, 16\\], and \\[2, 16\\] is due"),
    ({}, {"conditioner.told.weight": torch.zeros(2, 16, dtype=torch.int8)}, "not a floating-point"),
])
def test_a_damaged_scene_layout_is_refused_by_name(tmp_path, metadata, changes, words):
    path = tmp_path / "scene.safetensors"
    write(path)
    rewritten(path, metadata, **changes)
    with pytest.raises(VideoLDMError, match=words) as caught:
        load_layout(path)
    assert "scene.safetensors" in str(caught.value)


def test_files_in_the_wrong_node_are_refused_with_the_node_they_belong_to(tmp_path):
    path, other = tmp_path / "scene.safetensors", tmp_path / "vae.safetensors"
    write(path)
    save_file({"decoder.mid.block_1.norm1.weight": torch.zeros(4)}, other)
    with pytest.raises(VideoLDMError, match="is a scene layout file, not .* Choose it in Scene Layout"):
        load_temporal(path)
    with pytest.raises(VideoLDMError, match="vae.safetensors is a VAE, not a scene layout file"):
        load_layout(other)
