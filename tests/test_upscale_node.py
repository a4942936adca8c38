"""Video Upscale in this process: on the smallest x4 upscaler that ComfyUI detects, and on a stubbed network."""

from fractions import Fraction

import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from comfy.model_sampling import V_PREDICTION
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_sdupscale import SD_4XUpscale_Conditioning

from video_ldm.benchmarks.memory import Tally
from video_ldm.nodes import upscale as nodes
from video_ldm.nodes.free_init import FreeInit
from video_ldm.nodes.host import decoding, sampling, upscaling
from video_ldm.nodes.host.api import InputImpl
from video_ldm.nodes.host.lazy_video import HeldVideo, LazyVideo
from video_ldm.nodes.host.options import clip_options
from video_ldm.nodes.load import AS_TRAINED, LoadTemporalLayers
from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.upscaler import TRAINED_LEVEL, augment_small_frames, plan_pieces
from video_ldm.tests import upscale_help
from video_ldm.tests.attach_help import load_model
from video_ldm.tests.host import checkpoints
from video_ldm.tests.small import relative_error
from video_ldm.tests.upscale_help import small_frames, small_vae, text
from video_ldm.tests.video_help import counting, write_exact

PIXELS = 64     # the least tile, in pixels of the large frames: 16 latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video_ldm")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    upscale_help.write_layers(folder / "upscaler_layers.safetensors")
    upscale_help.write_layers(folder / "upscaler_vector.safetensors", mix_length=4)
    checkpoints.write_video_layers(folder / "image_layers.safetensors")
    upscale_help.write_published(folder / "lavie_vsr.pt")
    return folder


@pytest.fixture(scope="module")
def state():
    return upscale_help.unet_state()


@pytest.fixture(scope="module")
def upscaler(state):
    """The upscaler's MODEL, shared by the tests: nothing they do may stay on it."""
    model = load_model(state)
    options = {**model.model_options}
    yield model
    assert model.model_options == options and not any(model.wrappers.values())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.model.diffusion_model.state_dict().items())


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def with_layers(model, file="upscaler_layers.safetensors", strength=1.0):
    return LoadTemporalLayers.execute(model, file, strength, AS_TRAINED).result[0]


class Stub:
    """Stands in for the network, point by point, and keeps what it is told at every call."""

    def __init__(self, model):
        self.model, self.calls = model.clone(), []
        self.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stub", self.run)

    def run(self, executor, x, timesteps, context, y, control, options, **kwargs):
        self.calls.append({"x": x, "y": y, "context": context, "options": options})
        return torch.tanh(x[:, :4] + x[:, 4:].sum(1, keepdim=True)) * context.mean((1, 2))[:, None, None, None]


def latents_of(model, small, window=8, overlap=2, tile=0, level=30, seed=5, steps=2, cfg=2.0, sampler="euler",
               positive=None, scheduler="normal"):
    """What the node samples. `overlap` and `tile` (in latents) are its own values."""
    cuts = plan_pieces(*small.shape[:3], window, overlap, tile)
    settings = sampling.SamplerSettings(steps, cfg, sampler, scheduler, positive or text(), text(12))
    return upscaling.upscale(model, small, level, cuts, seed, settings)


# Sampling

def test_without_layers_a_frame_is_what_cores_own_nodes_make_of_it(upscaler):
    small = small_frames(1, 16, 24)
    for level in (30, 0):
        positive, negative, latent = SD_4XUpscale_Conditioning.execute(small, text(), text(12), 4.0, level / 350).result
        core = sampling.ksample(upscaler, 5, 2, 2.0, "euler", "normal", positive, negative, latent, 1.0)
        assert core.shape == (1, 4, 16, 24)
        assert relative_error(latents_of(upscaler, small, level=level), core) < 1e-5


def test_without_layers_frames_are_upscaled_alone_and_from_the_same_noise(upscaler):
    small = small_frames(2)
    together = latents_of(upscaler, torch.cat([small, small[:1]]), window=3)
    assert relative_error(together[2], together[0]) < 1e-5 < relative_error(together[1], together[0])
    assert relative_error(latents_of(upscaler, small, window=1, overlap=0), together[:2]) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_ancestral", "dpmpp_2m_sde", "uni_pc"])
def test_where_the_network_acts_point_by_point_windows_and_tiles_change_nothing(upscaler, folder, sampler):
    """In every step, with noise of the sampler's own too: to the bit, and the same as without pieces."""
    small, stub = small_frames(7, 20, 28), Stub(with_layers(upscaler, strength=0.0))
    whole = latents_of(stub.model, small, steps=3, sampler=sampler)
    pieces = latents_of(stub.model, small, 4, 2, 8, steps=3, sampler=sampler)
    assert whole.shape == (7, 4, 20, 28) and whole.std() > 0
    assert torch.equal(pieces, whole)
    assert max(len(call["x"]) for call in stub.calls[-10:]) == 2 * 4


def test_the_network_is_given_pieces_with_their_noised_small_frames_their_text_and_the_noise_level(upscaler, folder):
    small, stub = small_frames(6, 16, 24), Stub(with_layers(upscaler, strength=0.0))
    words = [[torch.cat([text(seed)[0][0] for seed in range(6)]), {}]]      # one text for each frame
    latents_of(stub.model, small, 4, 2, 16, level=200, steps=1, cfg=1.0, positive=words)
    eps = torch.randn(6, 3, 16, 24, generator=torch.Generator().manual_seed(5 - 10))
    noised = augment_small_frames(small.movedim(-1, 1) * 2 - 1, 200, eps, Diffusion(0.0001, 0.02))
    places = [(frames, columns) for frames in ((0, 4), (2, 6)) for columns in ((0, 16), (8, 24))]
    assert len(stub.calls) == len(places)
    for call, ((first, last), (left, right)) in zip(stub.calls, places):
        assert call["x"].shape == (4, 7, 16, 16) and call["y"].tolist() == [200] * 4
        assert relative_error(call["x"][:, 4:], noised[first:last, :, :, left:right]) < 1e-6
        assert torch.equal(call["context"], words[0][0][first:last])
        assert clip_options(call["options"]).frames == 4


def test_pieces_begin_from_one_field_of_noise_and_each_frame_has_its_own_with_layers(upscaler, folder):
    small = small_frames(1).repeat(6, 1, 1, 1)
    stub = Stub(with_layers(upscaler, strength=0.0))
    latents_of(stub.model, small, 4, 2, steps=1, cfg=1.0)
    first, second = (call["x"] for call in stub.calls)
    assert torch.equal(first[2:], second[:2])       # frames 2 and 3: latents and noised small frames
    assert len({frame.sum().item() for frame in torch.cat([first[:, :4], second[2:, :4]])}) == 6


def test_the_sampler_works_on_the_cpu_and_core_prepares_for_one_piece(upscaler):
    small, stub, seen = small_frames(9, 20, 28), Stub(upscaler), []

    def note(executor, model, shape, *args, **kwargs):
        seen.append(tuple(shape))
        return executor(model, shape, *args, **kwargs)
    stub.model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", note)
    latents = latents_of(stub.model, small, 4, 2, 8)
    assert seen == [(4, 4, 8, 8)] and latents.device.type == "cpu" and latents.shape == (9, 4, 20, 28)


def test_of_more_frames_only_a_few_times_their_latents_is_in_memory_while_sampling(upscaler, folder):
    """In memory are noise, latents, both predictions with what they are mixed from, and the noised small frames."""
    model, most = with_layers(upscaler, strength=0.0), []
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stub", lambda run, x, *others, **more: x[:, :4].tanh())
    for frames in (8, 24, 40):
        small = small_frames(frames)
        with torch.no_grad(), Tally() as tally:
            latents_of(model, small, 4, 2, steps=1)
        most.append(tally.most["cpu"])
    latents = 16 * 4 * 16 * 16 * 4
    assert most[2] - most[1] <= 8 * latents
    assert most[2] - most[1] == pytest.approx(most[1] - most[0], abs=latents)


# Temporal layers

def test_layers_made_for_the_upscaler_load_and_act_within_their_window(upscaler, folder):
    model, small = with_layers(upscaler), small_frames(3)
    changed = torch.cat([small[:2], 1 - small[2:]])
    before, after = (latents_of(model, frames, 2, 1, steps=1, cfg=1.0) for frames in (small, changed))
    assert torch.equal(before[0], after[0])                     # windows are 0..1 and 1..2
    assert relative_error(after[1], before[1]) > 1e-5           # frame 1 has not changed, and sees frame 2
    bypassed = latents_of(with_layers(upscaler, strength=0.0), small, 2, 1, steps=1, cfg=1.0)
    assert relative_error(before, bypassed) > 1e-3


def test_one_window_with_layers_is_what_cores_sampler_makes_of_the_clip(upscaler, folder):
    model, small = with_layers(upscaler), small_frames(2)
    positive, negative, latent = SD_4XUpscale_Conditioning.execute(small, text(), text(12), 4.0, 30 / 350).result
    core = sampling.ksample(model, 5, 1, 2.0, "euler", "normal", positive, negative, latent, 1.0)
    assert relative_error(latents_of(model, small, steps=1), core) < 1e-5


def test_lavies_layers_load_on_the_upscaler_with_their_schedule_and_act_within_their_window(upscaler, folder):
    model, report = LoadTemporalLayers.execute(upscaler, "lavie_vsr.pt", 1.0, AS_TRAINED).result
    assert "LaVie's video super-resolution UNet, 17 temporal layers." in report
    assert "Trained on clips of 8 frames." in report and "as trained (sqrt_linear 0.0001 to 0.02)" in report
    assert "Licence: " in report and "LaVie left them as the x4 upscaler has them" in report
    schedule = model.get_model_object("model_sampling")
    assert schedule.sigma_max.item() == pytest.approx(157.4, rel=1e-3) and isinstance(schedule, V_PREDICTION)
    small = small_frames(3)
    changed = torch.cat([small[:2], 1 - small[2:]])
    before, after = (latents_of(model, frames, 2, 1, steps=1, cfg=1.0) for frames in (small, changed))
    assert torch.equal(before[0], after[0]) and relative_error(after[1], before[1]) > 1e-5
    bypassed = with_layers(upscaler, "lavie_vsr.pt", strength=0.0)
    assert relative_error(before, latents_of(bypassed, small, 2, 1, steps=1, cfg=1.0)) > 1e-3


def test_layers_and_models_that_do_not_fit_are_refused_by_the_loader(upscaler, folder):
    with pytest.raises(VideoLDMError, match="image_layers.safetensors is .*, and the connected MODEL is the Stable "
                                            "Diffusion x4 upscaler"):
        with_layers(upscaler, "image_layers.safetensors")
    with pytest.raises(VideoLDMError, match="made for the Stable Diffusion x4 upscaler, and the connected MODEL"):
        with_layers(load_model(checkpoints.unet_state()))
    with pytest.raises(VideoLDMError, match="lavie_vsr.pt is LaVie's video super-resolution UNet, made for the Stable "
                                            "Diffusion x4 upscaler, and the connected MODEL is Stable Diffusion 1.x: "
                                            "its text has a width of 768 instead of 1024"):
        with_layers(load_model(checkpoints.unet_state()), "lavie_vsr.pt")


# The node

class Hidden:
    def __init__(self, used):
        link = {"save": {"class_type": "SaveImage", "inputs": {"images": ["7", 0]}}} if used else {}
        self.prompt, self.unique_id = {"7": {"class_type": "VideoLDMUpscale", "inputs": {}}, **link}, "7"


@pytest.fixture
def run(monkeypatch, vae):
    """The node with few steps: images, video, report."""
    def run(model, used=False, positive=None, negative=None, **changes):
        monkeypatch.setattr(nodes.VideoUpscale, "hidden", Hidden(used))
        inputs = {"noise_level": 30, "window": 4, "overlap": 2, "tile": PIXELS, "fps": 0.0, "seed": 5, "steps": 2,
                  "cfg": 2.0, "sampler": "euler", "scheduler": "normal", "vae": vae,
                  "keep_colours": False, **changes}
        if "images" not in inputs and "video" not in inputs:
            inputs["images"] = small_frames(3, 20, 24)
        return nodes.VideoUpscale.execute(model, positive or text(), negative or text(12), **inputs).result
    return run


def test_the_video_is_four_times_as_large_and_its_frames_are_the_images(upscaler, run):
    stub = Stub(upscaler)
    images, video, _ = run(stub.model, used=True)
    assert images.shape == (3, 80, 96, 3) and 0 <= images.min() and images.max() <= 1 and images.std() > 0
    blocked, streamed, _ = run(stub.model)
    assert streamed.get_dimensions() == (96, 80) and streamed.get_frame_count() == 3 and streamed.get_frame_rate() == 8
    assert torch.equal(streamed.get_components().images, images) and torch.equal(video.get_components().images, images)


def test_images_are_decoded_only_where_they_are_connected_and_a_video_only_when_asked_for(upscaler, run, monkeypatch):
    monkeypatch.setattr(decoding.Decoding, "decode_piece", None)
    blocked, video, _ = run(Stub(upscaler).model)
    assert type(blocked).__name__ == "ExecutionBlocker"
    assert "The IMAGE of Video Upscale was not connected" in blocked.message
    assert video.get_frame_count() == 3


def test_a_video_is_upscaled_as_its_frames_and_keeps_its_rate(upscaler, run):
    small, stub = small_frames(3, 20, 24), Stub(upscaler)
    video = LazyVideo(lambda first, last: iter([small[first:last]]), 3, 24, 20, 12)
    images, out, _ = run(stub.model, used=True, video=video)
    assert out.get_frame_rate() == 12 and torch.equal(images, run(stub.model, used=True, images=small)[0])
    assert run(stub.model, video=video, fps=6.0)[1].get_frame_rate() == 6


def test_the_sound_of_a_video_is_kept_at_its_own_rate_only(upscaler, run, tmp_path):
    small, stub = small_frames(3, 20, 24), Stub(upscaler)
    wave = torch.linspace(-0.5, 0.5, 6 * 12000).view(1, 6, 12000)
    video = HeldVideo(small, 12, {"waveform": wave, "sample_rate": 48000})
    kept = run(stub.model, used=True, video=video)[1].get_components().audio
    assert kept["sample_rate"] == 48000 and torch.equal(kept["waveform"], wave)
    assert torch.equal(run(stub.model, video=video, fps=12.0)[1].get_audio()["waveform"], wave)
    _, other, report = run(stub.model, video=video, fps=6.0)
    assert other.get_audio() is None
    assert "Its sound was left out, because it belongs to 12 frames per second." in report


def test_the_sound_of_a_file_from_cores_load_video_is_kept_too(upscaler, run, tmp_path):
    """Core's class gives packed PCM as whole numbers in one channel."""
    wave = counting(2, 44100 // 10)
    write_exact(tmp_path / "clip.mov", "pcm_s16le", wave, "stereo", fps=Fraction(30), frames=3)
    out = run(Stub(upscaler).model, video=InputImpl.VideoFromFile(str(tmp_path / "clip.mov")))[1]
    assert out.get_frame_rate() == 30
    assert np.array_equal(out.get_audio()["waveform"][0] * 2**15, wave)


def test_a_sound_that_cannot_be_saved_is_refused_before_the_work(upscaler, run):
    video = HeldVideo(small_frames(3, 20, 24), 12, {"waveform": torch.zeros(1, 9, 100), "sample_rate": 48000})
    with pytest.raises(VideoLDMError, match="The sound is a tensor of shape"):
        run(Stub(upscaler).model, video=video)


def test_streaming_to_a_file_takes_the_memory_of_a_frame_however_long_the_video(vae, tmp_path):
    most = []
    for count in (4, 16):
        latents = torch.zeros(count, 4, 8, 8)
        video = video_of(vae, latents)
        with torch.no_grad(), Tally() as tally:
            video.save_to(str(tmp_path / f"{count}.mp4"))
        most.append(tally.most["cpu"])
    assert most[1] <= most[0] * 1.01


def video_of(vae, latents) -> LazyVideo:
    """The VIDEO that the node makes of its latents."""
    made = decoding.Decoding(vae, latents, nodes.decode_settings(vae, 4, 2, PIXELS))
    return LazyVideo(made.frames, len(latents), made.width, made.height, 8)


def test_one_frame_alpha_and_a_tile_larger_than_the_frames_are_taken(upscaler, run):
    small, stub = small_frames(1, 9, 11), Stub(upscaler)
    alone, _, report = run(stub.model, used=True, images=small, tile=4096)
    assert alone.shape == (1, 36, 44, 3) and "1 windows of 1 frames, each in 1 tiles of 44x36" in report
    with_alpha = torch.cat([small, torch.rand(1, 9, 11, 1)], dim=-1)
    assert torch.equal(run(stub.model, used=True, images=with_alpha, tile=0)[0], alone)


def test_the_report_says_what_was_done_and_that_layers_are_missing(upscaler, folder, run):
    _, _, alone = run(Stub(upscaler).model)
    assert "3 frames of 24x20 upscaled to 96x80, noise level 30" in alone and "No temporal layers: every frame" in alone
    _, _, report = run(Stub(with_layers(upscaler, strength=0.0)).model)
    assert "No temporal layers" not in report and "strength 0, trained on clips of 4 frames" in report


def test_without_layers_windows_share_nothing(upscaler, run):
    stub = Stub(upscaler)
    run(stub.model, images=small_frames(4), window=2, overlap=1, steps=1, cfg=1.0)
    assert len(stub.calls) == 2
    stub.calls.clear()
    _, _, report = run(stub.model, images=small_frames(5), steps=1, cfg=1.0)
    assert [len(call["x"]) for call in stub.calls] == [3, 2]        # not 4 and 4
    assert "2 windows of 2 or 3 frames" in report


def test_free_init_on_the_model_is_refused(upscaler, folder, run):
    model = FreeInit.execute(with_layers(upscaler), 3, "ideal", 0.25, 0.25, 4).result[0]
    with pytest.raises(VideoLDMError, match="Video Upscale does not take FreeInit. .* from before FreeInit"):
        run(model)


def test_progress_covers_every_piece_of_every_step(upscaler, monkeypatch):
    shown = []
    monkeypatch.setattr(sampling.RolloutProgress, "show", lambda self, value, pictures: shown.append(value))
    for sampler in ("euler", "heun"):
        shown.clear()
        latents_of(Stub(upscaler).model, small_frames(6, 16, 24), 4, 2, 16, sampler=sampler)
        assert shown == sorted(shown) and shown[-1] >= 2 * 4 and {1, 2, 3, 4} <= set(shown)


def test_cancelling_is_noticed_between_pieces_and_leaves_the_model_as_it_was(upscaler, folder, run, monkeypatch):
    cancelled = comfy.model_management.InterruptProcessingException
    calls = []

    def check():
        calls.append(1)
        if len(calls) > 2:
            raise cancelled
    stub = Stub(with_layers(upscaler, strength=0.0))
    options = dict(stub.model.model_options)
    monkeypatch.setattr(upscaling.files, "check_cancelled", check)
    with pytest.raises(cancelled):
        run(stub.model)
    assert len(stub.calls) == 2 and stub.model.model_options == options


def test_running_out_of_memory_is_told_in_a_sentence(upscaler, run):
    model = upscaler.clone()

    def fail(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "full", fail)
    with pytest.raises(VideoLDMError, match="Video Upscale ran out of memory with windows of 3 frames in pieces"):
        run(model)


VIDEO = LazyVideo(lambda first, last: iter(()), 3, 24, 20, 12)


@pytest.mark.parametrize("changes, sentence", [
    ({"noise_level": 351}, "noise_level is 351, and it takes whole numbers from 0 to 350"),
    ({"images": None}, "has nothing to upscale. Connect images or a video"),
    ({"images": small_frames(1), "video": VIDEO}, "images or a video, and both are connected"),
    ({"images": torch.rand(2, 8, 8, 1)}, "The small frames have 1 channel, and"),
    ({"images": small_frames(0)}, "an empty batch"),
    ({"tile": 32}, "tile is 32 pixels; 64 is the least"),
    ({"vae": None}, "No VAE is connected, and this upscaler makes latents"),
    ({"positive": checkpoints.conditioning(3)}, "The text of the positive conditioning has a width of 768, and the x4 "
                                                "upscaler takes 1024"),
    ({"negative": [[text()[0][0], {"control": object()}]]}, "The negative conditioning carries a ControlNet"),
    ({"positive": [[text()[0][0], {"mask": torch.ones(1, 8, 8)}]]}, "The positive conditioning carries a mask"),
    ({"positive": [[text()[0][0], {"area": (1, 1, 0, 0)}]]}, "The positive conditioning carries an area"),
])
def test_what_cannot_be_upscaled_is_refused_before_anything_is_sampled(upscaler, run, changes, sentence):
    stub = Stub(upscaler)
    with pytest.raises(VideoLDMError, match=sentence):
        run(stub.model, **changes)
    assert not stub.calls


def test_with_layers_the_limits_of_the_layers_count(upscaler, folder, run):
    layers = Stub(with_layers(upscaler, strength=0.0)).model
    with pytest.raises(VideoLDMError, match="noise_level is 251, .* levels from 0 to 250"):
        run(layers, noise_level=251)
    lavie = Stub(with_layers(upscaler, "lavie_vsr.pt", strength=0.0))
    *_, report = run(lavie.model, noise_level=350, steps=1)
    assert lavie.calls[0]["y"].tolist() == [350] * 6
    assert "strength 0, trained on clips of 8 frames.\nLaVie used noise level 50." in report
    with pytest.raises(VideoLDMError, match="noise_level is 351, and it takes whole numbers from 0 to 350"):
        run(lavie.model, noise_level=351)
    with pytest.raises(VideoLDMError, match="noise_level is 251, .* levels from 0 to 250"):
        run(with_layers(lavie.model, strength=0.0), noise_level=251)
    with pytest.raises(VideoLDMError, match="overlap is 4 frames and window is 4"):
        run(layers, overlap=4)
    with pytest.raises(VideoLDMError, match="clips of exactly 4 frames, and the pieces have 3. Set window to 4"):
        run(with_layers(upscaler, "upscaler_vector.safetensors"))


def test_another_model_and_the_videos_own_vae_are_refused(upscaler, run):
    with pytest.raises(VideoLDMError, match="The connected MODEL .Stable Diffusion 1.x. is not the Stable Diffusion x4 "
                                            "upscaler"):
        run(load_model(checkpoints.unet_state()))
    from video_ldm.tests import decoder_help
    with pytest.raises(VideoLDMError, match="VAE decodes 4 channels to 8 pixels per latent; the x4 upscaler's decodes "
                                            "4 channels to 4 pixels"):
        run(upscaler, vae=decoder_help.small_vae())


def test_the_widgets_show_the_papers_settings_at_first():
    """docs/papers.md#v14: noise augmentation 30 and windows of 8 frames (Appendix H). Levels were trained up to 250."""
    defaults = {entry.id: getattr(entry, "default", None) for entry in nodes.VideoUpscale.GET_SCHEMA().inputs}
    assert (defaults["noise_level"], defaults["window"]) == (30, 8) and TRAINED_LEVEL == 250


@pytest.mark.parametrize("temporal, window, overlap", [(True, 2, 1), (False, 1, 0)])
def test_a_temporal_vae_decodes_in_windows_that_advance_and_a_plain_one_frame_by_frame(monkeypatch, temporal, window,
                                                                                       overlap):
    """Without temporal layers the network's windows share nothing, so an overlap beyond the window is no mistake."""
    monkeypatch.setattr(nodes.temporal_vae, "is_temporal", lambda vae: temporal)
    settings = nodes.decode_settings(None, 2, 5, 64)
    assert (settings.window, settings.overlap, settings.tile, settings.clips) == (window, overlap, 64, 1)
