"""Upscalers in pixel space, which is the paper's driving kind.

Their file, the MODEL it becomes, Video Upscale on it, and layers that see the small frames.
"""

import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import load_file, save_file

from video_ldm.nodes import upscale as nodes
from video_ldm.nodes.host import sampling, upscaling
from video_ldm.nodes.host.noise_schedule import with_schedule
from video_ldm.nodes.load import AS_TRAINED, LoadTemporalLayers, LoadVideoModel
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_temporal, load_upscaler
from video_ldm.temporal.formats import pixel_upscaler as upscaler_format
from video_ldm.temporal.formats.files import open_file
from video_ldm.temporal.upscaler import (
    augment_small_frames,
    match_colours,
    plan_pieces,
    unfold_pixels,
)
from video_ldm.tests import pixel_help
from video_ldm.tests.attach_help import load_model
from video_ldm.tests.host import checkpoints
from video_ldm.tests.pixel_help import text
from video_ldm.tests.small import relative_error
from video_ldm.tests.upscale_help import small_frames, small_vae

FILE, LAYERS, SHARED = "pixels.safetensors", "pixels_layers.safetensors", "pixels_shared.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    pixel_help.write_model(folder / FILE)
    pixel_help.write_layers(folder / LAYERS)
    pixel_help.write_layers(folder / SHARED, shared_noise=True)
    checkpoints.write_video_layers(folder / "image_only_layers.safetensors")
    return folder


@pytest.fixture
def model(folder):
    return LoadVideoModel.execute(FILE).result[0]


def with_layers(model, strength=1.0, file=LAYERS):
    return LoadTemporalLayers.execute(model, file, strength, AS_TRAINED).result[0]


def made(model, small, window=8, overlap=2, tile=0, level=150, seed=5, steps=2, cfg=2.0, sampler="euler"):
    """What the node samples, as pixels. `tile` is in small pixels."""
    cuts = plan_pieces(*small.shape[:3], window, overlap, tile)
    x = upscaling.upscale(model, small, level, cuts, seed,
                           sampling.SamplerSettings(steps, cfg, sampler, "normal", text(), text(12)))
    return unfold_pixels(x)


# The file

def test_a_file_comes_back_to_the_bit_and_is_known_by_its_metadata(folder):
    found = load_upscaler(folder / FILE)
    assert found.params == pixel_help.PARAMS and identify(folder / FILE).kind == "pixel_upscaler"
    state = pixel_help.network().state_dict()
    assert found.tensors.keys() == state.keys() and all(found.tensors[key].equal(state[key]) for key in state)
    with pytest.raises(VideoLDMError, match="is a video upscaler in pixel space, not .* Load it with Load Video Model"):
        load_temporal(folder / FILE)


def test_layers_that_see_small_frames_are_version_3_and_come_back(folder):
    loaded = load_temporal(folder / LAYERS)
    assert loaded.params == pixel_help.stack_params(pixel_help.network()) and loaded.metadata["version"] == "3"
    assert loaded.params.takes_small_frames and loaded.params.known_positions is None
    state = pixel_help.stack(pixel_help.network()).state_dict()
    assert all(loaded.tensors[key].equal(state[key]) for key in state)
    assert any("small frames" in note for note in loaded.notes)


@pytest.mark.parametrize("change, sentence", [
    (lambda t, m: m.update(version="9"), "of version 9, and this pack reads version 1"),
    (lambda t, m: m.pop("unet"), "its metadata cannot be read"),
    (lambda t, m: m.update(usual_noise="900"), "its metadata cannot be read: noise levels 900 and 250"),
    (lambda t, m: m.update(prediction="x"), "its metadata cannot be read: prediction 'x'"),
    (lambda t, m: t.pop("model.diffusion_model.out.2.bias"), "out.2.bias is missing where"),
    (lambda t, m: t.update({"other": torch.zeros(1)}), "other is in it, where a UNet is due"),
    (lambda t, m: m.update(unet=m["unet"].replace('"noise_levels": 1000', '"noise_levels": 200')),
     "label_emb.weight is"),
    (lambda t, m: m.update(unet=m["unet"].replace('"head_channels": 32', '"head_channels": 0')),
     "no network has its sizes"),
])
def test_a_file_whose_parts_do_not_agree_is_refused_at_the_loader(folder, change, sentence):
    from safetensors import safe_open
    with safe_open(str(folder / FILE), "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(folder / FILE)
    change(tensors, metadata)
    save_file(tensors, folder / "changed.safetensors", metadata=metadata)
    with pytest.raises(VideoLDMError, match=sentence):
        LoadVideoModel.execute("changed.safetensors")


def test_other_files_are_refused_by_the_loader_and_layers_by_other_models(folder):
    with pytest.raises(VideoLDMError, match="image_only_layers.safetensors is a file of Video LDM temporal layers, not "
                                            "a whole video model"):
        LoadVideoModel.execute("image_only_layers.safetensors")
    with pytest.raises(VideoLDMError, match="made for a random upscaler, and the connected MODEL is Stable"):
        with_layers(load_model(checkpoints.unet_state()))


# The MODEL

def test_a_pixel_upscaler_samples_by_the_published_formula(model):
    """One Euler step from pure noise, written out.

    The small frames are noised and concatenated. The network predicts v. What is made are details of the small frames.
    Guidance joins the two predictions.
    """
    small, level, seed = small_frames(2, 6, 8), 150, 5
    ours = made(model, small, steps=1, level=level)
    x_low = small.movedim(-1, 1) * 2 - 1
    eps = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed - 10))
    c_low = augment_small_frames(x_low, level, eps, Diffusion(0.0001, 0.02))
    noise = torch.randn(1, 48, 6, 8, generator=torch.manual_seed(seed)).expand(2, -1, -1, -1)
    schedule, tau = Diffusion(0.0001, 0.02, prediction="v"), torch.full((2,), 999)
    sigma = (schedule.sigma[999] / schedule.alpha[999]).float()
    x = noise * (1 + sigma ** 2).sqrt() * schedule.alpha[999].float()        # core begins at unit variance
    network = pixel_help.network().eval()

    def clean(words):
        context = words[0][0].expand(2, -1, -1)
        v = network(torch.cat([x, c_low], 1), tau, context=context, y=torch.full((2,), level))
        return schedule.predicted_x(v, x, tau)
    with torch.no_grad():
        details = clean(text(12)) + 2.0 * (clean(text()) - clean(text(12)))
    blocks = (c_low / Diffusion(0.0001, 0.02).alpha[level].float()).repeat_interleave(4, 2).repeat_interleave(4, 3)
    expected = blocks + unfold_pixels(details) / 3.0
    assert relative_error(ours, expected) < 1e-4


def test_strength_0_is_the_plain_upscaler_bit_for_bit_and_layers_change_it(model):
    small = small_frames(3, 6, 8)
    unet = model.model.diffusion_model
    x, tau, y = torch.randn(3, 51, 6, 8), torch.full((3,), 500), torch.full((3,), 150)
    context = text()[0][0].expand(3, -1, -1)
    stack = pixel_help.stack(pixel_help.network())
    with torch.no_grad():
        plain = unet(x, tau, context=context, y=y)
        with open_call(unet, [(stack, CallSettings(3, strength=0.0, known=x[:, -3:]))], context):
            assert torch.equal(unet(x, tau, context=context, y=y), plain)
        with open_call(unet, [(stack, CallSettings(3, known=x[:, -3:]))], context):
            assert relative_error(unet(x, tau, context=context, y=y), plain) > 1e-3
    assert relative_error(made(with_layers(model), small), made(model, small)) > 1e-3


def test_with_layers_of_shared_noise_all_frames_are_made_from_one_as_without_layers(model):
    small, given = small_frames(1, 6, 8).repeat(3, 1, 1, 1), []
    plain = made(model, small_frames(3, 6, 8))
    assert torch.equal(made(with_layers(model, 0.0, SHARED), small_frames(3, 6, 8)), plain)
    assert relative_error(made(with_layers(model, 0.0), small_frames(3, 6, 8)), plain) > 1e-2
    layered = with_layers(model, 1.0, SHARED)
    layered.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", lambda executor, x, *args, **kwargs: (
        given.append(x), executor(x, *args, **kwargs))[1])
    made(layered, small, steps=1, cfg=1.0)
    assert all(torch.equal(x, x[:1].expand_as(x)) for x in given) and given[0].shape == (3, 51, 6, 8)


def test_layers_see_the_small_frames_that_the_network_is_given(model):
    """The last channels of its input: with the network's own view of them cut off, they still change the result."""
    unet, stack = model.model.diffusion_model, pixel_help.stack(pixel_help.network())
    tau, y, context = torch.full((3,), 500), torch.full((3,), 150), text()[0][0].expand(3, -1, -1)
    x, other = torch.randn(3, 51, 6, 8), torch.randn(3, 3, 6, 8)

    def run(known):
        with torch.no_grad(), open_call(unet, [(stack, CallSettings(3, known=known))], context):
            return unet(x, tau, context=context, y=y)
    assert relative_error(run(other), run(x[:, -3:])) > 1e-4
    with pytest.raises(VideoLDMError, match="see the small frames that are upscaled, and the model was called without"):
        run(None)
    seen = []
    stack_model = with_layers(model)
    stack_model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", lambda executor, x, *args, **kwargs: (
        seen.append(x[:, -3:]), executor(x, *args, **kwargs))[1])
    from video_ldm.nodes.host.known_frames import context_input
    assert torch.equal(context_input(stack, x, {}), x[:, -3:])
    made(stack_model, small_frames(2, 6, 8), steps=1)
    assert seen and all(part.shape[1:] == (3, 6, 8) for part in seen)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_where_the_network_acts_point_by_point_windows_and_tiles_change_nothing(model, sampler):
    stub = with_layers(model, strength=0.0)

    def run(executor, x, timesteps, context, y, control, options, **kwargs):
        return torch.tanh(x[:, :48] + x[:, 48:].sum(1, keepdim=True)) * context.mean((1, 2))[:, None, None, None]
    stub.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stub", run)
    small = small_frames(7, 10, 14)
    whole = made(stub, small, steps=3, sampler=sampler)
    assert whole.shape == (7, 3, 40, 56) and whole.std() > 0
    assert torch.equal(made(stub, small, 4, 2, 4, steps=3, sampler=sampler), whole)


def test_an_upscaler_that_predicts_x_itself_is_sampled_so(folder):
    import dataclasses
    params = dataclasses.replace(pixel_help.PARAMS, prediction="x0")
    upscaler_format.write(folder / "x0.safetensors", pixel_help.network().state_dict(), params)
    model = LoadVideoModel.execute("x0.safetensors").result[0]
    small, seen = small_frames(2, 6, 8), []

    def keep(executor, *args, **kwargs):
        seen.append(executor(*args, **kwargs))
        return seen[-1]
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "keep", keep)
    x = made(model, small, level=0, steps=1, cfg=1.0)
    assert relative_error(x, unfold_pixels(seen[0] / 3.0) + pixel_blocks(small)) < 1e-5
    kept = with_schedule(model, "linear", 0.0001, 0.02, None).get_model_object("model_sampling")
    assert torch.equal(kept.calculate_denoised(torch.ones(1), x, x + 1), x)


def pixel_blocks(small):
    return (small.movedim(-1, 1) * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)


# The node

@pytest.fixture
def run(monkeypatch):
    def run(model, used=True, **changes):
        link = {"save": {"class_type": "SaveImage", "inputs": {"images": ["7", 0]}}} if used else {}
        hidden = type("Hidden", (), {"prompt": {"7": {"class_type": "VideoLDMUpscale", "inputs": {}}, **link},
                                     "unique_id": "7"})
        monkeypatch.setattr(nodes.VideoUpscale, "hidden", hidden)
        inputs = {"noise_level": 150, "window": 4, "overlap": 2, "tile": 64, "fps": 0.0, "seed": 5, "steps": 1,
                  "cfg": 1.0, "sampler": "euler", "scheduler": "normal", "images": small_frames(3, 20, 24),
                  "keep_colours": False, **changes}
        return nodes.VideoUpscale.execute(model, text(), text(12), **inputs).result
    return run


def test_the_video_is_what_was_sampled_and_needs_no_vae(model, run):
    images, video, report = run(model)
    assert images.shape == (3, 80, 96, 3) and 0 <= images.min() and images.max() <= 1 and images.std() > 0
    sampled = made(model, small_frames(3, 20, 24), 4, 0, 16, steps=1, cfg=1.0)
    assert torch.allclose(images, ((sampled + 1) / 2).clamp(0, 1).movedim(1, -1))
    assert torch.equal(run(model, used=False)[1].get_components().images, images)
    assert "3 frames of 24x20 upscaled to 96x80" in report and "tiles of 64x64" in report
    assert "made to be run with" not in report and "noise level 150" in run(model, noise_level=30)[2]
    assert video.get_dimensions() == (96, 80)
    one, _, _ = run(with_layers(model), images=small_frames(1, 9, 11), tile=0)       # one frame, odd sizes
    assert one.shape == (1, 36, 44, 3)


def test_large_frames_keep_the_colours_of_the_small_ones_however_they_are_streamed(model, run):
    small = small_frames(3, 20, 24) / 2 + torch.tensor([0.5, 0.0, 0.25])
    plain, _, said = run(model, images=small)
    kept, _, report = run(model, images=small, keep_colours=True)
    assert drift(plain, small) > 0.03 and drift(kept, small) < drift(plain, small) / 3       # of noise, the worst case
    assert "Colours are kept" in report and "Colours are kept" not in said
    alone = torch.cat([match_colours(one.movedim(-1, 1), large.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)
                       for one, large in zip(small.split(1), plain.split(1))])
    assert torch.equal(kept, alone)
    video = run(model, used=False, images=small, keep_colours=True)[1]
    assert torch.equal(video.get_components().images, kept)
    assert torch.equal(video.as_trimmed(1 / 8, 2 / 8).get_components().images, kept[1:])


def drift(large, small) -> float:
    """How far the mean colour of a quarter of a frame lies from that of the small one, at most."""
    quarters = [torch.nn.functional.adaptive_avg_pool2d(frames.movedim(-1, 1), 2) for frames in (large, small)]
    return float((quarters[0] - quarters[1]).abs().max())


def test_the_report_says_whose_noise_it_was_and_layers_that_disagree_on_it_are_refused(model, run):
    one, own = "All frames were made from one noise, as these layers", "Every frame was made from noise of its own."
    shared, other = with_layers(model, file=SHARED), with_layers(model)
    for layered, said, unsaid in ((shared, one, own), (with_layers(shared, file=SHARED), one, own), (other, own, one)):
        report = run(layered)[2]
        assert said in report and unsaid not in report
    for layered in (with_layers(shared), with_layers(other, file=SHARED)):
        with pytest.raises(VideoLDMError, match=f"do not go together: {SHARED} was trained on one noise for all "
                                                f"frames, and {LAYERS} on noise of its own in each. Load only one"):
            run(layered)


@pytest.mark.parametrize("changes, sentence", [
    ({"vae": small_vae()}, "This upscaler makes pixels, not latents.*Disconnect the VAE"),
    ({"noise_level": 251}, "noise_level is 251, .* levels from 0 to 250"),
])
def test_inputs_that_do_not_go_with_a_pixel_upscaler_are_refused_in_a_sentence(model, run, changes, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        run(model, **changes)


def test_the_report_of_the_loader_says_what_the_upscaler_is_and_how_to_run_it(folder):
    report = LoadVideoModel.execute(FILE).result[1]
    assert "a random upscaler" in report and "150 is what it was made" in report and "Licence: Apache-2.0." in report


def test_entries_of_the_formats_own_names_are_refused_when_written(tmp_path):
    with pytest.raises(ValueError, match="unet belongs to the format"):
        upscaler_format.write(tmp_path / "x.safetensors", {}, pixel_help.PARAMS, {"unet": "1"})
    assert not list(tmp_path.iterdir())


def test_the_schedules_of_pixels_and_of_the_small_frames_are_told_apart(tmp_path):
    params = upscaler_format.UpscalerParams({}, 0.001, 0.02, "v", 0.0003, 0.004, 300, 20, 1.5, "ours")
    upscaler_format.write(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, params)
    assert upscaler_format.load(open_file(tmp_path / "x.safetensors")).params == params
