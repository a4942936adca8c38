"""Known frames through a network's own input: the further channels, number by number, and the nodes that give them."""

from dataclasses import replace

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host.known_frames import further_channels
from video_ldm.nodes.host.options import CLIP, clip_options, layer_sets
from video_ldm.nodes.longer import ContextFrames
from video_ldm.temporal.conditioning import masked_input
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.params import GREY, MASK_FIRST, MASK_LAST, InputFramesParams
from video_ldm.tests import input_frames_help
from video_ldm.tests.input_frames_help import (
    SCALE,
    SIZE,
    Vae,
    frames_of,
    grey,
    inputs_of,
    sampled,
    with_input,
)
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import windowed

networks = input_frames_help.networks       # fixture

FRAMES = 6
SEINE = InputFramesParams(MASK_FIRST, given=0.0, filler=GREY)
ZEROS_FIRST = InputFramesParams(MASK_FIRST)


def with_frames(model, positions="0", sets=1, guidance=1.0, vae=True, seed=5):
    """Context Frames with random latents, and these latents `sets n c h w` as the network sees them."""
    count = len(positions.replace(",", " ").split())
    latents = frames_of(sets * count, seed)
    m = ContextFrames.execute(model, positions, guidance, latent={"samples": latents},
                              vae=Vae() if vae else None).result[0]
    return m, SCALE * latents.unflatten(0, (sets, count))


def by_hand(form, known, positions, numbers):
    """The further channels of one clip's frames, written out.

    Args:
        form: the network's input for known frames.
        known: latents of the known frames, as the network sees them.
        positions: their frame numbers within the clip.
        numbers: the frame numbers of the frames that the call has.
    """
    rows = []
    for number in numbers:
        inside = number in positions
        empty = grey() if form.filler == GREY else torch.zeros(SIZE)
        latents = known[positions.index(number)] if inside else empty
        mask = torch.full((1, *SIZE[1:]), form.given if inside else 1 - form.given)
        rows.append(torch.cat([mask, latents] if form.form == MASK_FIRST else [latents, mask]))
    return torch.stack(rows)


def assert_seen(call, expected):
    """The call's input is noisy latents, then the expected channels of all its images."""
    assert call.shape == (len(expected), 4 + expected.shape[1], *SIZE[1:])
    assert (call[:, 4:] - expected).abs().max() < 1e-6


# The channels by themselves

def test_the_order_and_the_sign_of_the_mask_and_the_filler_are_the_networks():
    z, mask = torch.full((1, 2, 2, 1, 1), 7.0), torch.tensor([[1.0, 0.0]])
    z[0, 1] = torch.nan                     # what stands in unknown frames does not matter
    filler = torch.tensor([3.0, 4.0])[:, None, None]
    for params, known, unknown in (
            (InputFramesParams(MASK_FIRST, 0.0, GREY), [0, 7, 7], [1, 3, 4]),
            (InputFramesParams(MASK_FIRST, 1.0), [1, 7, 7], [0, 0, 0]),
            (InputFramesParams(MASK_LAST, 1.0), [7, 7, 1], [0, 0, 0]),
            (InputFramesParams(MASK_LAST, 0.0, GREY), [7, 7, 0], [3, 4, 1])):
        assert masked_input(params, z, mask, filler).flatten(1).tolist() == [known, unknown]
    with pytest.raises(VideoLDMError, match="encoding of mid-grey.*Connect the VAE"):
        masked_input(SEINE, z, mask)


# The channels in a sampling

@pytest.mark.parametrize("form", [SEINE, ZEROS_FIRST, InputFramesParams(MASK_LAST)], ids=str)
@pytest.mark.parametrize("written, positions", [("0", [0]), ("0, -1", [0, 5]), ("0 1 2", [0, 1, 2]), ("4, 2", [4, 2])])
def test_every_condition_sees_the_known_frames_at_their_places(networks, form, written, positions):
    m, known = with_frames(with_input(networks["seine"], form), written)
    m, seen = inputs_of(m)
    sampled(m, FRAMES)
    assert_seen(seen[0], by_hand(form, known[0], positions, range(FRAMES)).repeat(2, 1, 1, 1))
    assert len(seen) == 1


def test_the_noisy_latents_come_first_and_are_those_of_any_model(networks):
    plain, noisy = networks["lavie_base"].clone(), []

    def look(executor, x, *args, **kwargs):
        noisy.append(x.clone())
        return executor(x, *args, **kwargs)
    plain.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    sampled(plain, FRAMES)
    m, seen = inputs_of(with_frames(networks["seine"])[0])
    sampled(m, FRAMES)
    assert torch.equal(seen[0][:, :4], noisy[0])


def test_several_clips_have_known_frames_of_their_own_or_share_them(networks):
    for sets in (1, 3):
        m, known = with_frames(networks["seine"], "0, -1", sets)
        m, seen = inputs_of(m)
        sampled(m, FRAMES, clips=3)
        clips = [by_hand(SEINE, known[clip % sets], [0, 5], range(FRAMES)) for clip in range(3)]
        assert_seen(seen[0], torch.cat(clips).repeat(2, 1, 1, 1))


def test_conditions_in_calls_of_their_own_see_the_same(networks, monkeypatch):
    m, known = with_frames(networks["seine"], "0, -1", 2)
    m, seen = inputs_of(m)
    monkeypatch.setattr(m.model, "memory_required", lambda *args, **kwargs: 1e18)       # no two fit together
    sampled(m, FRAMES, clips=2)
    expected = torch.cat([by_hand(SEINE, clip, [0, 5], range(FRAMES)) for clip in known])
    assert len(seen) == 2
    for call in seen:
        assert_seen(call, expected)


def test_a_node_that_repeats_the_batch_within_a_call_gets_the_channels_for_each_repeat(networks):
    m, known = with_frames(networks["seine"], "1", 2)
    m, seen = inputs_of(m)

    def twice(apply_model, args):
        c = {name: value.repeat(2, *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) else value
             for name, value in args["c"].items()}
        return apply_model(args["input"].repeat(2, 1, 1, 1), args["timestep"].repeat(2), **c)[:len(args["input"])]
    m.set_model_unet_function_wrapper(twice)
    sampled(m, FRAMES, clips=2)
    expected = torch.cat([by_hand(SEINE, clip, [1], range(FRAMES)) for clip in known])
    assert_seen(seen[0], expected.repeat(4, 1, 1, 1))


def test_each_window_sees_the_known_frames_of_its_own_numbers(networks):
    for sets in (1, 2):
        m, known = with_frames(networks["seine"], "0, -1", sets)
        m, seen = inputs_of(windowed(m, length=4, overlap=2))
        sampled(m, FRAMES, clips=2)
        assert len(seen) == 2
        for call, numbers in zip(seen, (range(4), range(2, 6))):
            clips = [by_hand(SEINE, known[clip % sets], [0, 5], numbers) for clip in range(2)]
            assert_seen(call, torch.cat(clips).repeat(2, 1, 1, 1))


def test_a_window_without_known_frames_sees_that_nothing_is_given(networks):
    m, known = with_frames(networks["seine"])
    m, seen = inputs_of(windowed(m, length=3, overlap=0))
    sampled(m, FRAMES)
    assert_seen(seen[0], by_hand(SEINE, known[0], [0], range(3)).repeat(2, 1, 1, 1))
    assert_seen(seen[1], by_hand(SEINE, [], [], range(3)).repeat(2, 1, 1, 1))


def test_context_guidance_hides_the_known_frames_in_one_more_call(networks):
    m, known = with_frames(networks["seine"], "0, -1", guidance=2.0)
    m, seen = inputs_of(m)
    sampled(m, FRAMES)
    assert_seen(seen[0], by_hand(SEINE, known[0], [0, 5], range(FRAMES)).repeat(2, 1, 1, 1))
    assert_seen(seen[1], by_hand(SEINE, [], [], range(FRAMES)))
    assert len(seen) == 2


@torch.no_grad()
def test_the_channels_have_the_type_of_the_noisy_latents(networks):
    m, known = with_frames(networks["seine"])
    layers, = layer_sets(m)
    clip = clip_options(m.model_options["transformer_options"])
    options = {CLIP: replace(clip, frames=FRAMES, images=FRAMES)}
    x = torch.zeros(FRAMES, *SIZE, dtype=torch.float16)
    channels = further_channels(layers, x, options)
    assert channels.dtype == torch.float16
    assert (channels - by_hand(SEINE, known[0], [0], range(FRAMES))).abs().max() < 1e-3


def test_wrappers_of_other_nodes_see_the_noisy_latents_alone(networks):
    m, _ = with_frames(networks["seine"])
    sizes = []

    def look(executor, x, *args, **kwargs):
        out = executor(x, *args, **kwargs)
        sizes.append((x.shape[1], out.shape[1]))
        return out
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    sampled(m, FRAMES)
    assert sizes == [(4, 4)]


def test_layers_of_strength_0_leave_a_network_that_still_sees_the_known_frames(networks):
    """The network's input has its channels whether or not its temporal layers act."""
    m, known = with_frames(networks["seine"])
    silent, _ = inputs_of(m)
    keyed = silent.wrappers[WrappersMP.DIFFUSION_MODEL]
    silent.wrappers = {**silent.wrappers, WrappersMP.DIFFUSION_MODEL: {key: value for key, value in keyed.items()
                                                                       if key != "test"}}
    out, other = sampled(silent, FRAMES), sampled(m, FRAMES)
    assert torch.isfinite(out).all() and relative_error(out[1:], other[1:]) > 1e-3
