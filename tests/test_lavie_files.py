"""LaVie's and SEINE's files, by names and shapes alone: what they must hold (docs/papers.md#l1)."""

from pathlib import Path

import pytest
import torch

from video_ldm.nodes.host.video_network import unet_config
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, lavie
from video_ldm.temporal.formats.files import TensorFile
from video_ldm.temporal.formats.tensor_names import Keys
from video_ldm.temporal.layers.position import rotation_angles
from video_ldm.tests.network_help import KINDS, ROTATION

each_kind = pytest.mark.parametrize("kind", ["lavie_base", "seine", "lavie_interpolation"])


def opened(kind: str, shapes: dict, name: str = "lavie.pt"):
    """A file of these shapes, opened. No weight is made."""
    def read(keys):
        return {key: rotation_angles(torch.ones(1))[0] if key.endswith(ROTATION)
                else torch.empty(shapes[key], device="meta") for key in keys}
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    file = TensorFile(Path(name), shapes, {}, tuple(shapes), read)
    found = lavie.detect(Keys(shapes), {})
    assert found.kind == kind
    return lavie.load(file, found)


@each_kind
def test_a_network_is_stable_diffusion_and_16_attentions_over_time_and_nothing_else(kind):
    """docs/papers.md#l1: the published sizes, on the meta device."""
    network = opened(kind, KINDS[kind])
    layers = sum(tensor.numel() for tensor in network.layers.tensors.values())
    spatial = sum(torch.Size(shape).numel() for shape in network.spatial_shapes.values())
    rotations = 0 if kind == "lavie_interpolation" else 16 * 16     # numbers that are computed
    assert spatial + layers + rotations == {"lavie_base": 909_124_356, "seine": 909_138_756,
                                            "lavie_interpolation": 909_131_524}[kind]
    further = {"lavie_base": 0, "seine": 5, "lavie_interpolation": 4}[kind]
    assert spatial == 859_520_964 + further * 320 * 9       # Stable Diffusion 1.4, and a wider first convolution
    assert unet_config(network)["in_channels"] == 4 + further
    slot = "in_attn_post_ff" if kind == "lavie_interpolation" else "in_attn_pre_ff"
    assert [site.slot for site, _ in network.layers.params.bricks] == [slot] * 16


@pytest.mark.parametrize("lost, words", [
    ("conv_in.weight", "lavie.pt looks like .*input_blocks.0.0.weight is missing"),
    ("mid_block.resnets.1.conv2.bias", "lavie.pt looks like .*, but middle_block.2.out_layers.3.bias is missing"),
    ("up_blocks.1.upsamplers.0.conv.weight", "lavie.pt looks like .*, but output_blocks.5.2.conv.weight is missing"),
    ("down_blocks.2.attentions.1.transformer_blocks.0.attn_temp.to_v.weight", "lavie.pt looks like .* 1 of its .* "
     "tensors are missing .the first: layers.input_8_.*attn_temporal.to_v.weight"),
    ("down_blocks.2.attentions.1.transformer_blocks.0.norm_temp.weight", "lavie.pt looks like .*, but its layer at "
     "input_8_in_attn_p.*_ff_0 is incomplete. Download the file again"),
])
@each_kind
def test_a_file_that_lacks_one_tensor_is_refused_with_its_name(kind, lost, words):
    shapes = {key: shape for key, shape in KINDS[kind].items() if key != lost}
    if lost == "conv_in.weight" and kind == "seine":
        kind = "lavie_base"         # the two differ in this tensor alone
    with pytest.raises(VideoLDMError, match=words):
        unet_config(opened(kind, shapes))


@each_kind
def test_a_file_that_lacks_a_whole_layer_or_holds_more_is_refused(kind):
    block = "up_blocks.2.attentions.1.transformer_blocks.0."
    shapes = {key: shape for key, shape in KINDS[kind].items() if not key.startswith((f"{block}attn_temp",
                                                                                      f"{block}norm_temp"))}
    with pytest.raises(VideoLDMError, match="its temporal layer output_7_in_attn_p.*_0 is missing. The file is incom"):
        opened(kind, shapes)
    with pytest.raises(VideoLDMError, match="holds 1 tensors that it does not have .the first: class_embedding.weight"):
        opened(kind, KINDS[kind] | {"class_embedding.weight": (1000, 1280)})
    with pytest.raises(VideoLDMError, match=r"but out.2.weight is \[4, 320, 3, 2\] where \[4, 320, 3, 3\] is due"):
        unet_config(opened(kind, KINDS[kind] | {"conv_out.weight": (4, 320, 3, 2)}))


@pytest.mark.parametrize("kind, channels, found", [
    ("lavie_base", 4, "lavie_base"), ("lavie_base", 9, "seine"), ("lavie_base", 8, "lavie_unknown"),
    ("lavie_interpolation", 8, "lavie_interpolation"), ("lavie_interpolation", 4, "lavie_unknown"),
    ("lavie_interpolation", 9, "lavie_unknown")])
def test_positions_and_input_channels_tell_the_kind(kind, channels, found):
    identified = identify_keys(KINDS[kind] | {"conv_in.weight": (320, channels, 3, 3)})
    assert (identified.kind, identified.takes) == (found, None if found == "lavie_unknown" else "video_model")
