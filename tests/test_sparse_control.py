"""SparseCtrl's network and files, against residuals of the published code: docs/papers.md#sparsectrl."""

import pytest
import torch

from video_ldm.nodes.host import sparse_control
from video_ldm.temporal.conditioning import context_input_from_latents
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_sparse_control, load_temporal, load_video_model
from video_ldm.temporal.sparse_control import added, scaled
from video_ldm.tests.formats_help import motion_shapes, motion_tensors, narrow, saved
from video_ldm.tests.small import relative_error
from video_ldm.tests.sparse_help import KINDS, PUBLISHED, RECORDED, ones, recorded_file, shapes_for_unet, weights

CLIPS, FRAMES, HEIGHT, WIDTH, STEP = 2, 4, 4, 6, 381.0


def network_of(folder, tensors: dict, name: str = "sparse.safetensors"):
    return sparse_control.load_sparse_control(load_sparse_control(saved(folder, name, tensors)), torch.float32)


def known_frames(kind: str) -> torch.Tensor:
    """What frames 0 and 3 show: two conditions with the same frames, and another text each."""
    if kind == "rgb":
        return ones((2, 4, HEIGHT, WIDTH), 99)
    return ones((2, 3, 8 * HEIGHT, 8 * WIDTH), 99).abs().clamp(0, 1)


def residuals_of(network, kind: str, change=lambda seen: seen) -> list[torch.Tensor]:
    """Every residual, sampled as the recorded ones are. change: of what the network sees."""
    seen = change(context_input_from_latents(known_frames(kind), (0, 3), FRAMES, 1)).repeat(CLIPS, 1, 1, 1)
    text = ones((2, 7, 768), 77).repeat_interleave(FRAMES, 0)
    with torch.no_grad():
        residuals, middle = network(seen, torch.full((CLIPS * FRAMES,), STEP), text, FRAMES)
    return [found.flatten()[::97 if found.numel() < 20000 else 293] for found in (*residuals, middle)]


def errors_of(network, kind: str, **options) -> list[float]:
    """The error of each residual, relative to the recorded one."""
    recorded = [torch.tensor(values) for values in RECORDED[kind]["residuals"]]
    return [relative_error(*pair) for pair in zip(residuals_of(network, kind, **options), recorded, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_residuals_are_those_of_the_published_code(tmp_path, kind):
    assert max(errors_of(network_of(tmp_path, recorded_file(kind)), kind)) < 1e-4


def inverted(seen: torch.Tensor) -> torch.Tensor:
    return torch.cat([seen[:, :-1], 1 - seen[:, -1:]], dim=1)


def descaled(seen: torch.Tensor) -> torch.Tensor:
    """Latents as a LATENT has them, or pictures from -1 to 1."""
    frames = seen[:, :-1] / 0.18215 if seen.shape[1] == 5 else (2 * seen[:, :-1] - 1) * seen[:, -1:]
    return torch.cat([frames, seen[:, -1:]], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [inverted, descaled, lambda seen: seen.roll(1, 0)],
                         ids=["mask inverted", "other scale", "frames moved"])
def test_another_mask_scale_or_place_gives_other_residuals(tmp_path, kind, change):
    assert min(errors_of(network_of(tmp_path, recorded_file(kind)), kind, change=change)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_of_the_first_convolution_counts_and_its_weights_do_not(tmp_path, kind):
    tensors = recorded_file(kind)
    without = network_of(tmp_path, tensors | {"conv_in.bias": torch.zeros(32)}, "bias.safetensors")
    assert min(errors_of(without, kind)) > 1e-3
    other = network_of(tmp_path, tensors | {"conv_in.weight": torch.randn(32, 4, 3, 3)}, "weight.safetensors")
    assert max(errors_of(other, kind)) < 1e-4


def test_strength_multiplies_each_images_residual_and_zero_is_zero():
    residual = torch.randn(3, 2, 2, 2)
    residual[1, 0, 0, 0] = torch.inf
    found = scaled(residual, torch.tensor([0.5, 0.0, 2.0]))
    assert torch.equal(found[0], residual[0] * 0.5) and torch.equal(found[2], residual[2] * 2)
    assert (found[1] == 0).all()


def test_residuals_are_added_to_those_that_end_at_the_same_place():
    one, two, three = (torch.full((1,), value) for value in (1.0, 2.0, 3.0))
    before = [one, None]
    found = added(before, [two, three, one])
    assert [value.item() for value in found] == [2.0, 4.0, 1.0]
    assert before == [one, None] and one.item() == 1.0
    assert added([one, two], [three])[0] is one


# Files

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [
    dict, lambda t: {f"module.{key}": value for key, value in t.items()},
    lambda t: {f"controlnet.{key}": value for key, value in t.items()},
    lambda t: {f"controlnet.module.{key}": value for key, value in t.items()},
], ids=["bare", "module", "controlnet", "both"])
def test_a_file_is_read_under_any_of_its_wrappers(tmp_path, kind, wrap):
    found = load_sparse_control(saved(tmp_path, "file.safetensors", wrap(recorded_file(kind))))
    assert (found.kind, found.params.sees) == (f"sparsectrl_{kind}", "latents" if kind == "rgb" else "pictures")
    assert found.params.channels == (32, 32, 32, 64) and found.params.middle_channels == 64
    assert [(block, module.attentions, module.norm_pooled) for block, module in found.params.motion] == [
        (1, 1, False), (3, 1, False)]
    assert (found.text_width, found.params.per_latent) == (768, 1 if kind == "rgb" else 8)


def test_a_checkpoint_of_the_authors_form_is_read(tmp_path):
    torch.save({"controlnet": recorded_file("rgb"), "animatediff_config": {"x": 1}, "epoch": 3}, tmp_path / "rgb.ckpt")
    network = sparse_control.load_sparse_control(load_sparse_control(tmp_path / "rgb.ckpt"), torch.float32)
    assert max(errors_of(network, "rgb")) < 1e-4


def tables(kind: str, value=None) -> dict:
    """The file's tables of frame positions: the sinusoid, or another number in each place."""
    from video_ldm.temporal.layers import interleaved_sinusoid
    found = {}
    for key, shape in RECORDED[kind]["shapes"].items():
        if key.endswith("attention_blocks.0.to_q.weight"):
            table = interleaved_sinusoid(32, shape[1])[None]
            found[key.replace("to_q.weight", "pos_encoder.pe")] = table if value is None else table * 0 + value
    return found


def test_tables_of_frame_positions_are_left_out_and_others_than_animatediffs_refused(tmp_path):
    tensors = recorded_file("rgb")
    assert len(tables("rgb")) == 2
    assert max(errors_of(network_of(tmp_path, tensors | tables("rgb")), "rgb")) < 1e-4
    with pytest.raises(VideoLDMError, match=r"pos_encoder.pe is not the one that AnimateDiff computes"):
        load_sparse_control(saved(tmp_path, "other.safetensors", tensors | tables("rgb", 0.5)))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_files_load_and_stay_near(tmp_path, kind):
    half = {key: value.half() for key, value in recorded_file(kind).items()}
    assert load_sparse_control(saved(tmp_path, "half.safetensors", half)).dtype == torch.float16
    errors = errors_of(network_of(tmp_path, half), kind)
    assert 1e-6 < max(errors) < 2e-2


def test_the_published_layout_is_accepted_whole(tmp_path):
    """With a tenth of the channels: 12 residuals, and a motion module after each of the 8 ResBlocks."""
    for kind in KINDS:
        shapes = {key: shape for key, shape in narrow(PUBLISHED[f"ad_v3_sd15_sparsectrl_{kind}"]).items()}
        shapes = {key: tuple(768 if size == 76 else size for size in shape) for key, shape in shapes.items()}
        found = load_sparse_control(saved(tmp_path, f"{kind}.safetensors", weights(shapes)))
        assert found.params.channels == (32,) * 4 + (64,) * 3 + (128,) * 5
        assert [block for block, _ in found.params.motion] == [1, 2, 4, 5, 7, 8, 10, 11]
        sparse_control.sparse_network(found)


def without(tensors: dict, *parts: str) -> dict:
    return {key: value for key, value in tensors.items() if not any(part in key for part in parts)}


@pytest.mark.parametrize("change, sentence", [
    (lambda t: without(t, "controlnet_mid_block.weight"), "lacks its first convolution or the convolutions behind"),
    (lambda t: without(t, "down_blocks.1.motion_modules"), r"motion modules after the input blocks \[1\]"),
    (lambda t: without(t, "down_blocks.0.resnets.0.conv1.weight"), r"in_layers.2.weight is missing where"),
    (lambda t: without(t, "motion_modules.0.temporal_transformer.proj_in.bias"), "2 of its .* tensors are missing"),
    (lambda t: t | {"pose.weight": torch.zeros(3)}, r"holds 1 tensors that it does not have \(the first: pose.weight"),
    (lambda t: t | {"controlnet_down_blocks.2.bias": torch.zeros(8)}, r"zero_convs.2.bias has shape \[8\]"),
    (lambda t: t | {"conv_in.weight": torch.zeros(32, 4, 3, 3, dtype=torch.int8)}, "holds conv_in.weight as int8"),
    (lambda t: t | {"controlnet_cond_embedding.weight": torch.zeros(32, 9, 3, 3)}, r"embedding.weight has shape"),
], ids=["no middle", "no module", "no weight", "no bias", "more", "shape", "quantised", "channels"])
def test_damaged_files_are_refused_by_what_is_wrong(tmp_path, change, sentence):
    path = saved(tmp_path, "bad.safetensors", change(recorded_file("rgb")))
    with pytest.raises(VideoLDMError, match=sentence) as caught:
        sparse_control.sparse_network(load_sparse_control(path))
    assert str(caught.value).startswith("bad.safetensors ") and str(caught.value).endswith(".")


def test_a_file_in_the_wrong_slot_is_sent_to_its_own_in_both_directions(tmp_path):
    sparse = saved(tmp_path, "v3_sd15_sparsectrl_rgb.safetensors", recorded_file("rgb"))
    motion = saved(tmp_path, "v3_sd15_mm.safetensors", motion_tensors(motion_shapes((32,), middle=False)))
    control = saved(tmp_path, "control.safetensors", {"control_model.zero_convs.0.0.weight": torch.zeros(3)})
    for load in (load_temporal, load_video_model):
        with pytest.raises(VideoLDMError, match=r"^v3_sd15_sparsectrl_rgb.safetensors is an AnimateDiff SparseCtrl "
                                                r"file for pictures \(RGB\), not .* Load it with Load SparseCtrl.$"):
            load(sparse)
    with pytest.raises(VideoLDMError, match=r"^v3_sd15_mm.safetensors is an AnimateDiff v3 motion module, not a "
                                            r"SparseCtrl file. Load it with Load Temporal Layers.$"):
        load_sparse_control(motion)
    with pytest.raises(VideoLDMError, match=r"is a ControlNet, not a SparseCtrl file. Load it with core's Load Contr"):
        load_sparse_control(control)


def test_the_small_file_for_a_whole_model_has_the_published_names():
    for kind in KINDS:
        assert set(shapes_for_unet(kind)) < set(PUBLISHED[f"ad_v3_sd15_sparsectrl_{kind}"])
