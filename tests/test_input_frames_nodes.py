"""SEINE and networks of Video LDM's appendix H.2 in Context Frames, Extend Video and Latent Interpolate x4."""

import comfy.controlnet
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, RandomNoise, SamplerCustomAdvanced

from video_ldm.nodes.host import files, models
from video_ldm.nodes.host.context import encoded_grey
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.longer import ContextFrames
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import input_frames_help
from video_ldm.tests.input_frames_help import SCALE, SIZE, Vae, called, ddim, frames_of, grey, inputs_of, sampled, text
from video_ldm.tests.longer_help import run_extend, run_interpolate
from video_ldm.tests.small import relative_error

networks = input_frames_help.networks       # fixture

FRAMES, SEED = 6, 7


def context_frames(model, positions="0", guidance=1.0, **given):
    return ContextFrames.execute(model, positions, guidance, **{"vae": Vae(), **given}).result


def seine_channels(known, positions, frames):
    """SEINE's further channels of one clip: the mask, 0 where a frame is given; then latents, or mid-grey."""
    mask, latents = torch.ones(frames, 1, *SIZE[1:]), grey().repeat(frames, 1, 1, 1)
    for frame, position in zip(SCALE * known, positions):
        mask[position], latents[position] = 0, frame
    return torch.cat([mask, latents], dim=1)


def noise_for(frames, seed=SEED):
    return comfy.sample.prepare_noise(torch.zeros(frames, *SIZE), seed)


# Context Frames

@pytest.mark.parametrize("written, positions", [("0", [0]), ("0, -1", [0, 5]), ("0, 1, 2", [0, 1, 2])])
def test_seine_samples_as_by_hand_and_the_known_frames_come_back_unchanged(networks, written, positions):
    """Image to video, transition, and going on: the published input, and DDIM with eta 0."""
    known, base = frames_of(len(positions)), networks["seine"]
    m, report = context_frames(base, written, latent={"samples": known})
    out = VideoLDMSampler.execute(m, text(), text(12), FRAMES, 24, 16, 1, SEED, 2, 8.0, "euler", "ddim_uniform",
                                  1.0).result[0]["samples"]
    expected = ddim(base, noise_for(FRAMES), seine_channels(known, positions, FRAMES), FRAMES, 2, 8.0)
    others = [n for n in range(FRAMES) if n not in positions]
    assert relative_error(out[others], expected[others]) < 1e-5
    assert torch.equal(out[positions], known)
    assert "seen by the network's own input, which was trained with context frames." in report


def test_what_is_not_seines_way_gives_another_output(networks):
    """Each of these mistakes would show in the test above."""
    base, x = networks["seine"], torch.randn(FRAMES, *SIZE, generator=torch.Generator().manual_seed(2))
    right = seine_channels(frames_of(1), [0], FRAMES)
    mask, latents = right[:, :1], right[:, 1:]
    zeros = torch.cat([mask, torch.where(mask < 1, latents, torch.zeros(()))], 1)
    expected = called(base, torch.cat([x, right], 1), 500, text(), FRAMES)
    for wrong in (torch.cat([1 - mask, latents], 1), torch.cat([latents, mask], 1), zeros):
        assert relative_error(called(base, torch.cat([x, wrong], 1), 500, text(), FRAMES), expected) > 1e-3


def test_a_picture_enters_as_its_latents(networks):
    picture, vae = torch.rand(1, 16, 24, 3, generator=torch.Generator().manual_seed(1)), Vae()
    m, seen = inputs_of(context_frames(networks["seine"], image=picture, vae=vae)[0])
    sampled(m, FRAMES, cfg=1.0)
    expected = seine_channels(Vae().encode(picture), [0], FRAMES)
    assert (seen[0][:, 4:] - expected).abs().max() < 1e-6
    assert [pictures.shape for pictures in vae.encoded] == [(1, 16, 24, 3)] * 2      # the picture, and one of mid-grey


@torch.no_grad()
def test_mid_grey_is_the_vaes_own_encoding_of_0_5_at_the_size_of_the_clip(networks):
    vae = models.load_autoencoder(files.DEMO_FOLDER / "autoencoder.safetensors")
    made = encoded_grey(networks["seine"], torch.zeros(3, 4, 5, 6), vae)
    assert torch.equal(made, vae.encode(torch.full((1, 40, 48, 3), 0.5))[0])
    assert encoded_grey(networks["a4"], torch.zeros(3, 4, 5, 6), None) is None


def test_cores_custom_sampler_takes_the_model_too(networks):
    m, _ = context_frames(networks["seine"], latent={"samples": frames_of(1)})
    sigmas = comfy.samplers.calculate_sigmas(m.get_model_object("model_sampling"), "ddim_uniform", 2)
    guider = BasicGuider.execute(m, text()).result[0]
    noise = RandomNoise.execute(SEED).result[0]
    out = SamplerCustomAdvanced.execute(noise, guider, comfy.samplers.sampler_object("euler"), sigmas,
                                        {"samples": torch.zeros(FRAMES, *SIZE)}).result[0]["samples"]
    ours = VideoLDMSampler.execute(m, text(), text(12), FRAMES, 24, 16, 1, SEED, 2, 1.0, "euler", "ddim_uniform",
                                   1.0).result[0]["samples"]
    assert torch.equal(out, ours)


def test_the_known_frames_change_the_others_and_hidden_ones_do_not(networks):
    base, latent = networks["seine"], {"samples": frames_of(1)}
    with_them = sampled(context_frames(base, latent=latent)[0], FRAMES, cfg=1.0)
    other = sampled(context_frames(base, latent={"samples": frames_of(1, 6)})[0], FRAMES, cfg=1.0)
    assert relative_error(other[1:], with_them[1:]) > 1e-3
    hidden = [sampled(context_frames(base, guidance=0.0, latent={"samples": frames_of(1, seed)})[0], FRAMES, cfg=1.0)
              for seed in (5, 6)]
    assert relative_error(hidden[0][1:], hidden[1][1:]) < 1e-5      # guidance 0 is the prediction without them


def test_a_controlnet_sees_the_noisy_latents_alone(networks):
    m, seen = inputs_of(context_frames(networks["seine"], latent={"samples": frames_of(1)})[0])

    class Net:
        """A ControlNet that notes what it is given."""

        previous_controlnet = cond_hint_original = None
        extra_hooks = None
        multigpu_clones: dict = {}      # newer versions of ComfyUI look for copies on other cards
        shapes = []

        def get_control(self, x, t, cond, batched_number, transformer_options):
            self.shapes.append(tuple(x.shape))

        def pre_run(self, *args):
            pass

        def get_models(self):
            return []

        def inference_memory_requirements(self, dtype):
            return 0

        def get_extra_hooks(self):
            return []

        def cleanup(self):
            pass
    net = Net()
    positive = [[text()[0][0], {"control": net, "control_apply_to_uncond": True}]]
    VideoLDMSampler.execute(m, positive, text(12), FRAMES, 24, 16, 1, SEED, 1, 1.0, "euler", "normal", 1.0)
    assert net.shapes == [(FRAMES, *SIZE)] and seen[0].shape == (FRAMES, 9, *SIZE[1:])


def test_an_area_of_the_conditioning_is_refused(networks):
    m, _ = context_frames(networks["seine"], latent={"samples": frames_of(1)})
    positive = [[text()[0][0], {"area": (1, 3, 0, 0), "strength": 1.0}]]
    with pytest.raises(VideoLDMError, match="A part of the picture is sampled by itself"):
        VideoLDMSampler.execute(m, positive, text(12), FRAMES, 24, 16, 1, SEED, 1, 1.0, "euler", "normal", 1.0)


def test_without_known_frames_there_is_a_sentence_in_every_sampler(networks):
    for kind in ("seine", "a4"):
        with pytest.raises(VideoLDMError, match="given known frames through its own input.*Connect Context Frames"):
            sampled(networks[kind], FRAMES)
        with pytest.raises(VideoLDMError, match="given known frames through its own input.*or use Extend Video"):
            VideoLDMSampler.execute(networks[kind], text(), text(12), 5, 24, 16, 1, 7, 1, 1.0, "euler", "normal", 1.0)


class VideoVae(Vae):
    def encode(self, pictures):
        return torch.zeros(1, 16, 1, 2, 3)


class LargeVae(Vae):
    def encode(self, pictures):
        return torch.zeros(1, 16, 2, 3)


@pytest.mark.parametrize("kind, positions, given, sentence", [
    ("seine", "0", {"latent": {"samples": frames_of(1)}, "vae": None}, "sees mid-grey.*also where the known"),
    ("seine", "0", {"latent": {"samples": frames_of(1)}, "vae": VideoVae()}, "5 dimensions"),
    ("seine", "0", {"latent": {"samples": frames_of(1)}, "vae": LargeVae()}, "makes latents of 16 x 2 x 3.*4 x 2 x 3"),
    ("seine", "0", {"latent": {"samples": torch.zeros(1, 16, 2, 3)}}, "16 latent channels, and this model's have 4"),
    ("seine", "0, 1", {"latent": {"samples": frames_of(1)}}, "1 context frames were given for 2 positions"),
    ("seine", "0", {}, "No context frames are connected"),
    ("a4", "0", {"latent": {"samples": frames_of(1)}}, "were trained for the context frames 0, -1, not for 0")])
def test_what_the_networks_cannot_take_is_refused_at_the_node(networks, kind, positions, given, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        context_frames(networks[kind], positions, **given)


def test_context_guidance_is_refused_for_a_network_that_always_had_both_ends(networks):
    with pytest.raises(VideoLDMError, match="never trained without them. Set it to 1"):
        context_frames(networks["a4"], "0, -1", 2.0, latent={"samples": frames_of(2)})


def test_known_frames_of_another_size_are_refused(networks):
    m, _ = context_frames(networks["seine"], latent={"samples": torch.zeros(1, 4, 4, 3)})
    with pytest.raises(VideoLDMError, match="context frames are 24x32 pixels and the clip is 24x16"):
        sampled(m, FRAMES)


# Extend Video

def extend(model, given=1, length=10, **changes):
    latent = {"latent": {"samples": frames_of(given)}} if given else {}
    return run_extend(model, length=length, **{"frames": 4, "seed": SEED, "vae": Vae(), **latent, **changes})


@pytest.mark.parametrize("overlap", [1, 3])
def test_each_clip_of_a_long_video_sees_the_last_frames_of_the_one_before(networks, overlap):
    m, seen = inputs_of(networks["seine"])
    latent, _, report = extend(m, overlap=overlap)
    video, known, start = latent["samples"], 1, 0
    for call in seen:
        assert (call[:, 4:] - seine_channels(video[start:start + known], range(known), 4)).abs().max() < 1e-6
        start, known = start + 4 - overlap, overlap
    assert len(seen) == {1: 3, 3: 7}[overlap]
    assert torch.equal(video[:1], frames_of(1)) and "seen by the network's own input" in report


def test_a_long_video_is_context_frames_again_and_again(networks):
    video = extend(networks["seine"], length=6, cfg=2.0)[0]["samples"]
    first = sampled(context_frames(networks["seine"], latent={"samples": frames_of(1)})[0], 4)
    second = sampled(context_frames(networks["seine"], "0 1", latent={"samples": first[-2:]})[0], 4, seed=SEED + 1)
    assert torch.equal(video, torch.cat([first, second[2:]]))


def test_seine_starts_from_noise_where_nothing_is_given_and_all_is_grey(networks):
    (m, seen), vae = inputs_of(networks["seine"]), Vae()
    video = extend(m, 0, 6, vae=vae)[0]["samples"]
    assert video.shape == (6, *SIZE) and len(vae.encoded) == 1
    assert (seen[0][:, 4:] - seine_channels(frames_of(0), [], 4)).abs().max() < 1e-6
    assert (seen[1][:, 4:] - seine_channels(video[2:4], [0, 1], 4)).abs().max() < 1e-6


def test_a_start_that_a_network_was_not_trained_for_is_refused(networks):
    for given, words in ((0, "none"), (1, "0")):
        with pytest.raises(VideoLDMError, match=f"trained for the context frames 0, -1, not for {words}"):
            extend(networks["a4"], given, length=4)
    for given in (0, 1):
        with pytest.raises(VideoLDMError, match="sees mid-grey.*no VAE is connected"):
            extend(networks["seine"], given, vae=None)
    with pytest.raises(VideoLDMError, match="The frames to start from have 16 latent channels"):
        extend(networks["seine"], latent={"samples": torch.zeros(1, 16, 2, 3)})


# Latent Interpolate x4

def test_video_ldms_interpolation_sees_latents_then_the_mask_of_both_ends(networks):
    m, seen = inputs_of(networks["a4"])
    keys = frames_of(3)
    out = run_interpolate(m, keys, cfg=2.0)[0]["samples"]
    ends = torch.tensor([1.0, 0, 0, 0, 1]).view(5, 1, 1, 1)
    pairs = [torch.zeros(5, *SIZE) for _ in range(2)]
    for pair, (one, other) in zip(pairs, zip(keys, keys[1:])):
        pair[0], pair[4] = SCALE * one, SCALE * other
    expected = torch.cat([torch.cat([pair, ends.expand(5, 1, *SIZE[1:])], 1) for pair in pairs])
    assert (seen[0][:, 4:] - expected.repeat(2, 1, 1, 1)).abs().max() < 1e-6
    assert len(out) == 9 and torch.equal(out[::4], keys)


def test_seine_makes_the_frames_between_two_key_frames(networks):
    m, seen = inputs_of(networks["seine"])
    keys, vae = frames_of(3), Vae()
    out = run_interpolate(m, keys, vae=vae, windows=1)[0]["samples"]
    for call, pair in zip(seen, (keys[:2], keys[1:]), strict=True):
        assert (call[:, 4:] - seine_channels(pair, [0, 4], 5)).abs().max() < 1e-6
    assert torch.equal(out[::4], keys) and len(vae.encoded) == 1
    with pytest.raises(VideoLDMError, match="sees mid-grey.*no VAE is connected"):
        run_interpolate(networks["seine"], keys)


def test_the_networks_are_as_before_after_all_of_this(networks):
    """Without known frames LaVie's base beside them is the same MODEL as at first."""
    base = networks["lavie_base"]
    before = sampled(base, FRAMES)
    sampled(context_frames(networks["seine"], latent={"samples": frames_of(1)})[0], FRAMES)
    assert torch.equal(sampled(base, FRAMES), before)
    m = with_clip_options(networks["seine"], FRAMES)
    assert m.model_options["transformer_options"]["video_ldm_clip"].context is None
