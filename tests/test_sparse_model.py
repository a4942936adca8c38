"""SparseCtrl on a MODEL with AnimateDiff's layers: how the known frames enter, and what it leaves as it was."""

import comfy.sample
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host import sparse_control
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.windows import FrameWindows
from video_ldm.temporal.conditioning import context_input_from_latents
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import (
    HEIGHT,
    WIDTH,
    load_model,
    noise_of,
    partly_loaded,
    prediction,
    text,
    with_layers,
)
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.small import relative_error
from video_ldm.tests.sparse_help import with_known, with_sparse, write_for_unet

SIZE = HEIGHT // 8, WIDTH // 8
GAIN = 0.3
SCALE = 0.18215         # from a LATENT to what the network sees


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs that share one network: "image", "video" with AnimateDiff's layers, and both kinds of SparseCtrl."""
    folder = tmp_path_factory.mktemp("sparse")
    for kind in ("video_ldm", "video_ldm_sparse_control"):
        folder_paths.add_model_folder_path(kind, str(folder))
    checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
    write_for_unet(folder / "rgb.safetensors", "rgb", gain=GAIN)
    write_for_unet(folder / "scribble.safetensors", "scribble", gain=GAIN)
    state = checkpoints.unet_state()
    image = load_model(state)
    video = with_layers(image, "motion.safetensors")
    yield {"image": image, "video": video, "rgb": with_sparse(video), "folder": folder,
           "scribble": with_sparse(video, "scribble.safetensors")}
    attach_help.assert_untouched(image, state)


def latents(count=1, seed=5):
    return {"samples": torch.randn(count, 4, *SIZE, generator=torch.Generator().manual_seed(seed))}


def sketches(count=1, seed=6):
    return torch.rand(count, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(seed))


def noted(model):
    """A clone that notes every call of its network, and the notes: (steps, text, control, frames of the window)."""
    m, seen = model.clone(), []

    def note(executor, x, timesteps, context, y, control, options, **kwargs):
        window = options.get("context_window")
        seen.append((timesteps, context, control and {name: list(part) for name, part in control.items()},
                     window and window.frames))
        return executor(x, timesteps, context, y, control, options, **kwargs)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    return m, seen


def network_on(model):
    wrapper, = model.wrappers[WrappersMP.DIFFUSION_MODEL][sparse_control.KEY]
    return wrapper.network


def by_hand(model, known, positions, timesteps, context, clips=1):
    """The residuals of one call, from known frames as the network sees them. The last one is the middle's."""
    conditions = len(context) // (clips * FRAMES)
    seen = context_input_from_latents(known, positions, FRAMES, clips).repeat(conditions, 1, 1, 1)
    with torch.no_grad():
        residuals, middle = network_on(model)(seen, timesteps, context, FRAMES)
    return [*residuals, middle]


def sampled(model, clips=1, frames=FRAMES, steps=2, cfg=1.0):
    latent = torch.zeros(clips * frames, 4, *SIZE)
    return comfy.sample.sample(with_clip_options(model, frames), comfy.sample.prepare_noise(latent, 7), steps, cfg,
                               "euler", "normal", text(), text(12), latent, seed=7, disable_pbar=True)


@pytest.mark.parametrize("kind, positions", [("rgb", (0,)), ("rgb", (0, 3)), ("scribble", (2,))])
def test_the_network_gets_the_residuals_of_its_known_frames_for_each_condition(models, kind, positions):
    numbers = ", ".join(map(str, positions))
    if kind == "rgb":
        given = latents(len(positions))
        model, known = with_known(models[kind], numbers, latent=given), given["samples"] * SCALE
    else:
        given = sketches(len(positions))
        model, known = with_known(models[kind], numbers, image=given), given.movedim(-1, 1)
    model, seen = noted(model)
    prediction(model, cfg=2.0)
    (timesteps, context, control, _), = seen
    assert len(context) == 2 * FRAMES and set(control) == {"output", "middle"}
    expected = by_hand(model, known, positions, timesteps, context)
    found = [*control["output"], *control["middle"]]
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert relative_error(found[-1][:FRAMES], found[-1][FRAMES:]) > 1e-3      # each condition has its own text


def test_residuals_reach_the_prediction_as_a_controlnets_do(models):
    """The same residuals, given to the network without SparseCtrl."""
    model, seen = noted(with_known(models["rgb"], "0", latent=latents()))
    expected = prediction(model)
    residuals = seen[0][2]
    m = models["video"].clone()

    def give(executor, x, timesteps, context, y, control, options, **kwargs):
        assert control is None
        return executor(x, timesteps, context, y, {name: list(part) for name, part in residuals.items()}, options,
                        **kwargs)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", give)
    assert torch.equal(prediction(m), expected)
    assert relative_error(prediction(models["video"]), expected) > 1e-3


def test_the_noise_does_not_change_the_residuals_and_the_step_and_the_text_do(models):
    def residual(**options):
        model, seen = noted(with_known(models["rgb"], "0", latent=latents()))
        prediction(model, **options)
        return seen[0][2]["middle"][0]
    first = residual()
    assert torch.equal(residual(noise=noise_of(seed=9)), first)
    assert relative_error(residual(denoise_sigma=9.0), first) > 1e-3
    assert relative_error(residual(positive=text(33)), first) > 1e-3


def test_strength_is_linear_in_the_residuals_in_all_frames_and_in_each(models):
    def residuals(**options):
        model, seen = noted(with_known(with_sparse(models["video"], **options), "0", latent=latents()))
        prediction(model)
        return [*seen[0][2]["output"], *seen[0][2]["middle"]]
    whole = residuals()
    for half, full in zip(residuals(strength=0.5), whole, strict=True):
        assert torch.equal(half, full * 0.5)
    factors = torch.tensor([1.0, 0.25, 0.0, 2.0])[:, None, None, None]
    for framed, full in zip(residuals(curve="1 0.25 0 2"), whole, strict=True):
        assert torch.equal(framed, full * factors)
    ramp = torch.tensor([0.0, 0.5, 1.0, 1.0])[:, None, None, None] * 0.5
    for framed, full in zip(residuals(strength=0.5, curve="0: 0, 2: 1"), whole, strict=True):
        assert relative_error(framed, full * ramp) < 1e-6


def test_strength_zero_is_the_model_without_it_to_the_bit(models):
    plain = prediction(models["video"], cfg=2.0)
    for options in ({"strength": 0.0}, {"curve": "0"}):
        model = with_known(with_sparse(models["video"], **options), "0", latent=latents())
        assert torch.equal(prediction(model, cfg=2.0), plain)
    assert torch.equal(prediction(models["video"], cfg=2.0), plain)


def test_the_known_frames_are_made_anew_and_are_no_copies(models):
    given = latents()
    made = sampled(with_known(models["rgb"], "0", latent=given))
    held = sampled(with_known(models["video"], "0", latent=given))
    assert torch.equal(held[0], given["samples"][0])        # a noise mask, which SparseCtrl does not use
    assert relative_error(made[:1], given["samples"]) > 1e-2


def test_two_clips_in_a_batch_see_one_set_of_known_frames_or_their_own(models):
    one, two = latents(1, 5)["samples"], latents(1, 8)["samples"]
    shared, seen = noted(with_known(models["rgb"], "0", latent={"samples": one}))
    sampled(shared, clips=2, steps=1)
    timesteps, context, control, _ = seen[0]
    first = by_hand(shared, one * SCALE, (0,), timesteps[:FRAMES], context[:FRAMES])[-1]
    assert relative_error(control["middle"][0], first.repeat(2, 1, 1, 1)) < 1e-5
    both, seen = noted(with_known(models["rgb"], "0", latent={"samples": torch.cat([one, two])}))
    with pytest.raises(VideoLDMError, match="given for 2 clips, and 3 clips are sampled"):
        sampled(both, clips=3, steps=1)
    sampled(both, clips=2, steps=1)
    second = by_hand(both, two * SCALE, (0,), timesteps[:FRAMES], context[:FRAMES])[-1]
    assert relative_error(seen[-1][2]["middle"][0], torch.cat([first, second])) < 1e-5


def windowed(model):
    """12 frames in windows of 4, of which 2 are shared: those from 2 and from 4 on have frame 5."""
    return noted(FrameWindows.execute(model, "windows", FRAMES, 2, "static", "pyramid", 8).result[0])


def test_a_window_sees_its_known_frames_at_its_own_places(models):
    m, seen = windowed(with_known(models["rgb"], "5", latent=latents()))
    sampled(m, frames=12, steps=1)
    assert [window for *_, window in seen if 5 in window] == [[2, 3, 4, 5], [4, 5, 6, 7]] and len(seen) == 5
    for timesteps, context, control, window in seen:
        if 5 in window:
            expected = by_hand(m, latents()["samples"] * SCALE, (window.index(5),), timesteps, context)[-1]
            assert relative_error(control["middle"][0], expected) < 1e-5
        else:
            assert control is None      # as the model makes a clip without known frames


def test_strengths_by_frame_follow_the_windows(models):
    m, seen = windowed(with_known(with_sparse(models["video"], curve="5: 1, 6: 0"), "5", latent=latents()))
    sampled(m, frames=12, steps=1)
    for *_, control, window in seen:
        if 5 in window:
            assert [bool(frame.any()) for frame in control["middle"][0]] == [number <= 5 for number in window]


def test_it_acts_between_its_two_ends_of_the_sampling_alone(models):
    sparse = with_sparse(models["video"], start_percent=0.2, end_percent=0.6)
    model, seen = noted(with_known(sparse, "0", latent=latents()))
    sampled(model, steps=10)
    sampling = models["image"].get_model_object("model_sampling")
    high, low = (float(sampling.percent_to_sigma(share)) for share in (0.2, 0.6))
    acted = [control is not None for _, _, control, _ in seen]
    sigmas = [float(sampling.sigma(timesteps[0])) for timesteps, *_ in seen]
    assert acted == [low <= sigma <= high for sigma in sigmas] and 0 < sum(acted) < 10


def test_context_guidance_compares_with_the_model_without_sparsectrl(models):
    scale = 3.0
    plain, seen = prediction(models["video"]), prediction(with_known(models["rgb"], "0", latent=latents()))
    guided = prediction(with_known(models["rgb"], "0", latent=latents(), guidance=scale))
    assert relative_error(guided, seen + (scale - 1) * (seen - plain)) < 1e-4


def test_it_adds_to_a_controlnets_residuals_and_leaves_those_as_they_are(models):
    generator, shape = torch.Generator().manual_seed(3), (FRAMES, 320, *SIZE)
    given = {"input": [], "output": [torch.randn(shape, generator=generator), None],
             "middle": [torch.randn(shape, generator=generator)]}
    before = {name: [None if part is None else part.clone() for part in parts] for name, parts in given.items()}

    def controlnet(executor, x, timesteps, context, y, control, options, **kwargs):
        return executor(x, timesteps, context, y, given, options, **kwargs)
    m, seen = noted(with_known(models["rgb"], "0", latent=latents()))
    inside = m.wrappers[WrappersMP.DIFFUSION_MODEL]
    m.wrappers = {**m.wrappers, WrappersMP.DIFFUSION_MODEL: {"outside": [controlnet], **inside}}
    prediction(m)
    timesteps, context, found, _ = seen[0]
    expected = by_hand(m, latents()["samples"] * SCALE, (0,), timesteps, context)
    assert relative_error(found["output"][0], before["output"][0] + expected[0]) < 1e-5
    assert relative_error(found["output"][1], expected[1]) < 1e-5
    assert relative_error(found["middle"][0], before["middle"][0] + expected[2]) < 1e-5
    for name, parts in given.items():
        assert len(parts) == len(before[name])
        assert all(part is None or torch.equal(part, old) for part, old in zip(parts, before[name]))


def test_the_text_that_core_gives_controlnets_alone_is_sparsectrls_too(models):
    own = text(77)[0][0]
    model, seen = noted(with_known(models["rgb"], "0", latent=latents()))
    prediction(model, positive=[[text()[0][0], {"cross_attn_controlnet": own}]])
    timesteps, _, control, _ = seen[0]
    expected = by_hand(model, latents()["samples"] * SCALE, (0,), timesteps, own.expand(FRAMES, -1, -1))
    assert relative_error(control["middle"][0], expected[-1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_single_precision(models, dtype):
    write_for_unet(models["folder"] / "half.safetensors", "rgb", dtype, gain=GAIN)
    half = with_layers(load_model(checkpoints.as_type(checkpoints.unet_state(), dtype), dtype), "motion.safetensors")
    model = with_known(with_sparse(half, "half.safetensors"), "0", latent=latents())
    assert {weight.dtype for weight in network_on(model).parameters()} == {dtype}
    expected = prediction(with_known(models["rgb"], "0", latent=latents()))
    difference = relative_error(prediction(models["video"]), expected)
    assert relative_error(prediction(model).float(), expected) < 0.1 * difference


def test_models_of_one_file_share_its_weights_and_core_counts_them(models):
    one, two = with_sparse(models["video"]), with_sparse(models["video"], strength=0.5)
    assert network_on(one) is network_on(two)
    patcher, = (part for part in one.get_nested_additional_models() if part.model is network_on(one))
    assert patcher.model_size() == sum(weight.nbytes for weight in network_on(one).parameters())


def test_weights_that_core_loads_in_part_give_the_same_prediction(models):
    model = with_known(models["rgb"], "0", latent=latents())
    expected = prediction(model)
    patcher, = (part for part in model.get_nested_additional_models() if part.model is network_on(model))
    with partly_loaded([patcher], patcher.model_size() // 3):
        assert 0 < patcher.loaded_size() < patcher.model_size()
        assert torch.equal(prediction(model), expected)
    assert torch.equal(prediction(model), expected)
