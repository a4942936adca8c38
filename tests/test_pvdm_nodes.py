"""Load PVDM, PVDM Sampler, PVDM Encode and PVDM Decode on small random networks."""

import re
from dataclasses import replace

import comfy.cli_args
import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch

from video_ldm.nodes import pvdm as nodes
from video_ldm.nodes.decode import TemporalDecode
from video_ldm.nodes.host import latents
from video_ldm.nodes.host import pvdm as host
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.pvdm import SamplerParams, diffusion, roll_out
from video_ldm.tests import pvdm_help
from video_ldm.tests.pvdm_help import ABOUT, AUTOENCODER, SINGLE, UNET
from video_ldm.tests.small import relative_error

FRAMES, LENGTH = AUTOENCODER.frames, AUTOENCODER.shape.length
Cancelled = comfy.model_management.InterruptProcessingException


@pytest.fixture(scope="module", autouse=True)
def inference():
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pvdm")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    pvdm_help.write(folder)
    pvdm_help.write(folder, "single", unet_params=SINGLE)
    return folder


def load(name="small"):
    return nodes.LoadPVDM.execute(f"{name}_autoencoder.safetensors", f"{name}.safetensors").result


@pytest.fixture(scope="module")
def pvdm(folder):
    return load()[0]


def sample(pvdm, **changes):
    """(IMAGE, VIDEO, planes) of PVDM Sampler with few steps."""
    widgets = dict(seed=3, clips=2, steps=3, following_steps=2, eta=1.0, guidance=0.0, fps=0.0)
    return nodes.PVDMSampler.execute(pvdm, **{**widgets, **changes}).result


def planes(pvdm, **changes):
    return sample(pvdm, **changes)[2]["samples"]


@pytest.fixture(scope="module")
def three(pvdm):
    """Three clips: IMAGE, VIDEO, planes."""
    return sample(pvdm, clips=3)


def frames(count, seed=0, height=AUTOENCODER.height, width=AUTOENCODER.width):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


class Hidden:
    """`cls.hidden` of a running node, whose VIDEO is connected and whose IMAGE is not."""
    unique_id = "7"
    prompt = {"7": {"class_type": "a node", "inputs": {}},
              "8": {"class_type": "SaveVideo", "inputs": {"video": ["7", 1]}}}


# Sampling

@pytest.mark.parametrize("eta, guidance", [(1.0, 0.0), (0.5, 1.5)])
def test_the_sampler_makes_what_the_plain_networks_make_from_the_same_noise(pvdm, eta, guidance):
    unet, autoencoder = pvdm_help.unet(), pvdm_help.autoencoder()
    generators = {number: torch.Generator().manual_seed(host.seed_of_clip(3, number)) for number in range(2)}
    rows = torch.cat(list(roll_out(
        2, SamplerParams(3, eta), SamplerParams(2, eta, guidance),
        lambda x, tau, cond: unet(x, tau, AUTOENCODER.shape, cond),
        lambda number: torch.randn(1, 4, LENGTH, generator=generators[number]), diffusion(), generators.get)))
    images, video, latent = sample(pvdm, eta=eta, guidance=guidance)
    assert latent["samples"].shape == (2, 4, 1, LENGTH) and relative_error(latent["samples"][:, :, 0], rows) < 1e-5
    expected = (autoencoder.decode(rows).transpose(1, 2).flatten(0, 1).movedim(1, -1) + 1) / 2
    assert images.shape == (2 * FRAMES, 16, 32, 3) and relative_error(images, expected) < 1e-5
    assert latent["frame_rate"] == 8.0 == video.get_frame_rate()


def test_a_network_that_predicts_v_is_sampled_so(folder):
    params = replace(UNET, prediction="v")
    pvdm_help.write(folder, "v", unet_params=params)
    network, generator = pvdm_help.unet(params), torch.Generator().manual_seed(host.seed_of_clip(3, 0))
    wanted = next(roll_out(1, SamplerParams(3), SamplerParams(2),
                           lambda x, tau, cond: network(x, tau, AUTOENCODER.shape, cond),
                           lambda number: torch.randn(1, 4, LENGTH, generator=generator), diffusion("v"),
                           lambda number: generator))
    found = planes(load("v")[0], clips=1)
    assert relative_error(found[:, :, 0], wanted) < 1e-5


def test_fewer_clips_are_the_beginning_of_more_and_another_seed_is_another_video(pvdm, three):
    rows = three[2]["samples"]
    assert torch.equal(planes(pvdm, clips=1), rows[:1]) and torch.equal(planes(pvdm, clips=2), rows[:2])
    for other in (rows[1:2], planes(pvdm, clips=1, seed=4), planes(pvdm, clips=1, seed=2 ** 64 - 1)):
        assert relative_error(other, rows[:1]) > 0.1


def test_no_seed_and_clip_share_their_noise():
    seeds = {host.seed_of_clip(seed, number) for seed in range(30) for number in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2 ** 64 for seed in seeds)
    assert host.seed_of_clip(1, 11) != host.seed_of_clip(11, 1)


def test_a_start_clip_goes_on_from_its_last_frames(pvdm):
    start = frames(FRAMES + 5)
    encoded = nodes.PVDMEncode.execute(pvdm, start[5:]).result[0]
    rows = planes(pvdm, start_clip=start, steps=9)
    assert rows.shape[0] == 2
    assert torch.equal(rows, planes(pvdm, start_planes=encoded))
    unet, generator = pvdm_help.unet(), torch.Generator().manual_seed(host.seed_of_clip(3, 0))
    before = pvdm_help.autoencoder().encode(start[None, 5:].movedim(-1, 1) * 2 - 1)
    first = next(roll_out(1, SamplerParams(9), SamplerParams(2), lambda x, tau, cond: unet(x, tau, AUTOENCODER.shape,
                                                                                           cond),
                          lambda number: torch.randn(1, 4, LENGTH, generator=generator), diffusion(),
                          lambda number: generator, before))
    assert relative_error(rows[:1, :, 0], first) < 1e-5
    assert relative_error(rows[:1], planes(pvdm, clips=1, steps=2)) > 1e-2
    assert torch.equal(planes(pvdm, start_planes={"samples": torch.cat([torch.zeros(2, 4, 1, LENGTH),
                                                                        encoded["samples"]])}), rows)


def test_every_setting_changes_the_video(pvdm):
    made = [planes(pvdm, **changes) for changes in (
        {}, {"steps": 4}, {"following_steps": 3}, {"eta": 0.0}, {"guidance": 2.0})]
    assert all(relative_error(a, b) > 1e-3 for number, a in enumerate(made) for b in made[:number])
    assert torch.equal(made[0][:1], made[2][:1]) and torch.equal(made[0][:1], made[4][:1])     # of the second clip


def test_with_eta_0_the_steps_add_no_noise(pvdm, monkeypatch):
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: drawn.append(1) or randn(*size, **options))
    planes(pvdm, clips=1, eta=0.0)
    assert len(drawn) == 1


# Outputs

def test_only_connected_pictures_are_decoded_and_the_video_streams_clip_by_clip(pvdm, three, monkeypatch):
    decoded = []
    decode = host.decode_clip
    monkeypatch.setattr(host, "decode_clip", lambda pvdm, row: decoded.append(1) or decode(pvdm, row))
    monkeypatch.setattr(nodes.PVDMSampler, "hidden", Hidden, raising=False)
    blocked, video, latent = sample(pvdm, clips=3)
    assert decoded == [] and "The IMAGE of PVDM Sampler was not connected" in blocked.message
    assert torch.equal(latent["samples"], three[2]["samples"])
    assert (video.get_frame_count(), video.get_dimensions(), video.get_duration()) == (3 * FRAMES, (32, 16), 3.0)
    pieces = []
    for number, piece in enumerate(video.pieces(), 1):
        assert len(decoded) == number       # a clip is decoded when it is asked for
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), three[0])
    part = video.as_trimmed(1.25, 0.5)      # frames 10 to 13: the second clip alone
    assert torch.equal(torch.cat(list(part.pieces())), three[0][10:14]) and len(decoded) == 4
    over = video.as_trimmed(0.75, 0.5)      # frames 6 to 9: the first two clips
    assert torch.equal(torch.cat(list(over.pieces())), three[0][6:10]) and len(decoded) == 6


@pytest.mark.parametrize("fps, carried, rate", [(0.0, None, 8.0), (12.5, 4.0, 12.5), (0.0, 4.0, 4.0)])
def test_the_frame_rate_is_the_widgets_else_the_planes_else_the_models(pvdm, three, fps, carried, rate):
    latent = {"samples": three[2]["samples"][:1], **({} if carried is None else {"frame_rate": carried})}
    assert nodes.PVDMDecode.execute(pvdm, latent, fps).result[1].get_frame_rate() == rate
    assert sample(pvdm, clips=1, fps=12.5)[2]["frame_rate"] == 12.5


def test_planes_are_encoded_and_decoded_clip_by_clip(pvdm):
    images = frames(2 * FRAMES)
    latent = nodes.PVDMEncode.execute(pvdm, images).result[0]
    reference = pvdm_help.autoencoder()
    clips = images.unflatten(0, (2, FRAMES)).movedim(-1, 1) * 2 - 1
    assert latent["samples"].shape == (2, 4, 1, LENGTH) and latent["frame_rate"] == 8.0
    assert relative_error(latent["samples"][:, :, 0], reference.encode(clips)) < 1e-5
    decoded, video = nodes.PVDMDecode.execute(pvdm, latent, 0.0).result
    expected = (reference(clips).movedim(1, -1).flatten(0, 1) + 1) / 2
    assert decoded.shape == images.shape and relative_error(decoded, expected) < 1e-5
    assert torch.equal(video.get_components().images, decoded)
    swapped = nodes.PVDMDecode.execute(pvdm, {"samples": latent["samples"].flip(0)}, 0.0).result[0]
    assert torch.equal(swapped, torch.cat([decoded[FRAMES:], decoded[:FRAMES]]))
    alpha = torch.cat([images, torch.zeros(2 * FRAMES, 16, 32, 1)], dim=3)
    assert torch.equal(nodes.PVDMEncode.execute(pvdm, alpha).result[0]["samples"], latent["samples"])


# Progress, preview, cancel

def watched(monkeypatch, work):
    """(values, previews) that the progress bar was given during `work()`."""
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, node_id=None: seen.append((value, total, preview)))
    work()
    return [(value, total) for value, total, _ in seen], [preview for *_, preview in seen if preview is not None]


def test_one_bar_counts_the_steps_of_all_clips(pvdm, monkeypatch):
    monkeypatch.setattr(nodes.PVDMSampler, "hidden", Hidden, raising=False)
    values, previews = watched(monkeypatch, lambda: sample(pvdm, clips=3))
    assert values == [(number, 7) for number in range(1, 8)] and previews == []
    values, _ = watched(monkeypatch, lambda: sample(pvdm, clips=3, start_clip=frames(FRAMES)))
    assert values == [(number, 6) for number in range(1, 7)]
    values, _ = watched(monkeypatch, lambda: nodes.PVDMEncode.execute(pvdm, frames(3 * FRAMES)))
    assert values == [(1, 3), (2, 3), (3, 3)]


def test_a_finished_clip_is_previewed_where_previews_are_on(pvdm, three, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Auto)
    monkeypatch.setattr(nodes.PVDMSampler, "hidden", Hidden, raising=False)
    made = []
    _, previews = watched(monkeypatch, lambda: made.append(planes(pvdm, clips=2)))
    assert torch.equal(made[0], three[2]["samples"][:2])        # looking changes nothing
    assert [(kind, picture.size) for kind, picture, _ in previews] == [("JPEG", (4 * 32, 16))] * 2
    shown = torch.tensor(list(previews[1][1].tobytes())).view(16, 4, 32, 3)[:, 1].float() / 255
    assert (shown - three[0][FRAMES + 2]).abs().max() < 1 / 200       # the second of frames 0, 2, 4, 6 of the clip


def press_cancel_at(monkeypatch, network, call):
    """Interrupts as the button does, before this call of a network's forward. Returns the calls that were made."""
    calls = []
    forward = type(network.module).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            comfy.model_management.interrupt_current_processing()
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(type(network.module), "forward", counted)
    return calls


def test_a_cancel_ends_the_sampling_within_a_clip(pvdm, three, monkeypatch):
    calls = press_cancel_at(monkeypatch, pvdm.unet, 4)
    with pytest.raises(Cancelled):
        sample(pvdm, clips=3)
    assert len(calls) == 4
    monkeypatch.undo()
    assert torch.equal(planes(pvdm, clips=3), three[2]["samples"])


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_a_cancel_ends_the_work_on_a_clip_within_it(pvdm, three, monkeypatch, work):
    layers = []
    attention = type(pvdm.autoencoder.module.encoder.layers[0][0].fn)
    forward = attention.forward

    def counted(self, *args):
        layers.append(1)
        if len(layers) == 1:
            comfy.model_management.interrupt_current_processing()
        return forward(self, *args)
    monkeypatch.setattr(attention, "forward", counted)
    with pytest.raises(Cancelled):
        if work == "encode":
            nodes.PVDMEncode.execute(pvdm, frames(FRAMES))
        else:
            nodes.PVDMDecode.execute(pvdm, three[2], 0.0)
    assert len(layers) == 1
    assert not any(part._forward_pre_hooks for part in pvdm.autoencoder.module.modules())


# Weights

def test_loading_the_same_files_twice_shares_their_weights_until_a_file_changes(folder, pvdm):
    again = load()[0]
    assert again.unet.module is pvdm.unet.module and again.autoencoder.module is pvdm.autoencoder.module
    pvdm_help.write(folder, "other", seed=1)
    one = load("other")[0]
    assert one.unet.module is not pvdm.unet.module
    pvdm_help.write(folder, "other", seed=5)
    two = load("other")[0]
    assert two.unet.module is not one.unet.module
    assert relative_error(planes(two, clips=1), planes(one, clips=1)) > 1e-2
    assert torch.equal(planes(one, clips=1), planes(pvdm, clips=1))


@pytest.mark.parametrize("budget", [0.1, 2e5])
def test_partly_loaded_networks_give_what_fully_loaded_ones_give(pvdm, three, budget):
    patchers = [pvdm.unet.patcher, pvdm.autoencoder.patcher]
    for patcher in patchers:
        patcher.unpatch_model(patcher.offload_device)
        patcher.patch_model(patcher.load_device, lowvram_model_memory=budget)
        assert patcher.model.model_lowvram and patcher.loaded_size() <= budget
        patcher.partially_load = lambda *args, **kwargs: 0      # core would load the rest: the processor has room
    images, _, latent = sample(pvdm, clips=3)
    for patcher in patchers:
        del patcher.partially_load
        patcher.unpatch_model(patcher.offload_device)
    assert torch.equal(latent["samples"], three[2]["samples"]) and torch.equal(images, three[0])


def eps_of(pvdm):
    """What the diffusion network predicts of some noise."""
    x = torch.randn(1, 4, LENGTH, generator=torch.Generator().manual_seed(1))
    network = pvdm.unet
    return network.module(network.cast(x), torch.tensor([500]), pvdm.shape, network.cast(x.flip(2))).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_that_compute_in_half_precision_give_nearly_the_same(folder, monkeypatch, dtype):
    """Core chooses the types. Here it is told to, as its start options tell it."""
    pvdm_help.write(folder, "half", dtype=dtype)
    plain = load("half")[0]
    assert plain.unet.dtype == plain.autoencoder.dtype == torch.float32         # on a processor
    rounded = pvdm_help.unet().to(dtype).float()
    x = torch.randn(1, 4, LENGTH, generator=torch.Generator().manual_seed(1))
    assert relative_error(eps_of(plain), rounded(x, torch.tensor([500]), AUTOENCODER.shape, x.flip(2))) < 1e-5
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    monkeypatch.setattr(comfy.cli_args.args, f"{name}_unet", True)
    monkeypatch.setattr(comfy.cli_args.args, f"{name}_vae", True)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args: None)
    half, report = load("half")
    assert f"computes in {str(dtype)[6:]}, the diffusion model in {str(dtype)[6:]}." in report
    parameters = [*half.unet.module.parameters(), *half.autoencoder.module.parameters()]
    assert {parameter.dtype for parameter in parameters} == {dtype}
    bound = 20 * torch.finfo(dtype).eps
    assert 0 < relative_error(eps_of(half), eps_of(plain)) < bound
    coded, exact = (nodes.PVDMEncode.execute(one, frames(FRAMES)).result[0]["samples"] for one in (half, plain))
    assert 0 < relative_error(coded, exact) < bound
    images, _, latent = sample(half, clips=1)
    assert images.dtype == latent["samples"].dtype == torch.float32 and images.std() > 0.05


def test_weights_that_are_cast_for_each_call_compute_in_the_wider_type(folder, monkeypatch):
    pvdm_help.write(folder, "half", dtype=torch.float16)
    exact = planes(load("half")[0])
    monkeypatch.setattr(comfy.cli_args.args, "fp16_unet", True)
    cast = load("half")[0]
    assert cast.unet.dtype == torch.float32
    assert {parameter.dtype for parameter in cast.unet.module.parameters()} == {torch.float16}
    assert torch.equal(planes(cast), exact)


# What Load PVDM says

def test_the_report_says_what_an_artist_needs(folder):
    report = load()[1].splitlines()
    assert report == [
        "A clip is 8 frames of 32x16 at 8 frames per second; its planes are a LATENT of 1 x 4 x 1 x 56.",
        "small_autoencoder.safetensors: a PVDM autoencoder, small, 0.1 million weights in float32. Licence: "
        "Apache-2.0.",
        "small.safetensors: a PVDM diffusion model, small, 0.9 million weights in float32. Licence: Apache-2.0.",
        "The autoencoder computes in float32, the diffusion model in float32."]
    for name, network in (("model_last.pth", pvdm_help.autoencoder()), ("model_9.pth", pvdm_help.unet()),
                          ("ema_model_9.pth", pvdm_help.unet())):
        torch.save(pvdm_help.published(network), folder / name)
    report = nodes.LoadPVDM.execute("model_last.pth", "model_9.pth").result[1]
    for words in ("PVDM's authors published it for UCF-101", "do not say how many frames per second", "ema_model_9.pth "
                  "lies beside it.", "Licence: MIT, as the code of its authors says."):
        assert words in report
    assert "single clips" in load("single")[1]


def test_a_file_without_a_frame_rate_plays_at_the_packs_own(folder):
    pvdm_help.write(folder, "still", about=replace(ABOUT, fps=None))
    still = load("still")[0]
    assert still.fps is None and sample(still, clips=1)[1].get_frame_rate() == 8
    assert "frame_rate" not in nodes.PVDMEncode.execute(still, frames(FRAMES)).result[0]


def test_a_changed_file_is_loaded_again(folder):
    names = "small_autoencoder.safetensors", "small.safetensors"
    before = nodes.LoadPVDM.fingerprint_inputs(*names)
    assert before == nodes.LoadPVDM.fingerprint_inputs(*names)
    (folder / names[1]).touch()
    assert before != nodes.LoadPVDM.fingerprint_inputs(*names)


# What is refused

def refused(work):
    with pytest.raises(VideoLDMError) as caught:
        work()
    sentence = str(caught.value)
    assert sentence.endswith(".") and sentence.isprintable()
    return sentence


NAME = "small_autoencoder.safetensors and small.safetensors"


@pytest.mark.parametrize("changes, words", [
    ({"start_clip": frames(FRAMES - 1)}, f"The start clip has 7 frames, and {NAME} goes on from 8. Connect at least 8 "
                                         "frames."),
    ({"start_clip": frames(1)}, "The start clip has 1 frame, and"),
    ({"start_clip": frames(FRAMES, height=32)},
     f"The frames of the start clip have 32x32 pixels, and {NAME} was trained on 32x16. Scale the frames to 32x16"),
    ({"start_clip": frames(FRAMES)[..., :1]}, "The frames of the start clip have 1 channel"),
    ({"start_clip": frames(FRAMES) / 0}, "no numbers (NaN or infinity)"),
    ({"start_clip": frames(FRAMES), "start_planes": {"samples": torch.zeros(1, 4, 1, LENGTH)}},
     "PVDM Sampler goes on from a start clip or from planes, and both are connected."),
    ({"start_planes": {"samples": torch.zeros(1, 4, 8, 8)}}, "The connected LATENT of the size 1x4x8x8 does not hold"),
    ({"clips": 0}, "PVDM Sampler: clips is 0"), ({"steps": 1001}, "PVDM Sampler: steps is 1001"),
])
def test_a_video_that_cannot_be_made_is_refused(pvdm, changes, words):
    assert words in refused(lambda: sample(pvdm, **changes))


def test_single_clips_are_all_that_a_network_without_an_input_for_the_clip_before_makes(folder):
    single = load("single")[0]
    assert planes(single, clips=1).shape == (1, 4, 1, LENGTH)
    for changes in ({"clips": 2}, {"clips": 1, "start_clip": frames(FRAMES)}):
        assert "it makes single clips. Set clips to 1, and connect no start clip." in refused(
            lambda changes=changes: sample(single, **changes))


@pytest.mark.parametrize("images, words", [
    (frames(FRAMES + 3), f"11 frames do not divide into clips of 8, which {NAME} takes. Connect 8 or 16 frames."),
    (frames(5), "5 frames do not divide into clips of 8, which .* takes. Connect 8 frames."),
    (frames(FRAMES, width=40), "The frames have 40x16 pixels, and .* was trained on 32x16."),
    (frames(FRAMES, height=8), "The frames have 32x8 pixels, and .* was trained on 32x16."),
])
def test_frames_that_are_no_clips_of_the_model_are_refused(pvdm, images, words):
    assert re.search(words, refused(lambda: nodes.PVDMEncode.execute(pvdm, images)))


@pytest.mark.parametrize("size", [(1, 4, 16, 32), (1, 8, 1, LENGTH), (1, 4, 1, LENGTH + 1), (1, 4, 1, 1, LENGTH)])
def test_latents_that_are_no_planes_are_refused(pvdm, size):
    words = f"of the size {'x'.join(map(str, size))} does not hold planes of {NAME}, which are clips x 4 x 1 x 56."
    assert words in refused(lambda: nodes.PVDMDecode.execute(pvdm, {"samples": torch.zeros(size)}, 0.0))
    if size[1] == 4 and len(size) == 4:
        odd = {"samples": torch.zeros(1, 4, 1, LENGTH), latents.KIND: "SD15"}
        assert "does not hold planes" in refused(lambda: nodes.PVDMDecode.execute(pvdm, odd, 0.0))


def test_nodes_for_image_models_refuse_planes(three):
    vae = type("Vae", (), {"encode": None, "decode": None, "first_stage_model": None})()
    sentence = refused(lambda: TemporalDecode.execute(vae, three[2], 8, 4, 0, 0.0))
    assert sentence.startswith("The connected latents are planes of a PVDM") and "PVDM Decode" in sentence
    assert refused(lambda: latents.check_kind(three[2], None, "The key frames")).startswith("The key frames are planes")


def test_two_files_of_different_models_are_refused(folder):
    from video_ldm.temporal.pvdm.files import write_diffusion
    wide = replace(UNET, channels=8)
    write_diffusion(folder / "wide.safetensors", pvdm_help.unet(wide).state_dict(), wide, ABOUT)
    assert "wide.safetensors diffuses planes of 8 channels" in refused(
        lambda: nodes.LoadPVDM.execute("small_autoencoder.safetensors", "wide.safetensors"))
    assert "are swapped, or one is chosen twice" in refused(
        lambda: nodes.LoadPVDM.execute("small.safetensors", "small_autoencoder.safetensors"))
    assert "are swapped, or one is chosen twice" in refused(
        lambda: nodes.LoadPVDM.execute("small.safetensors", "small.safetensors"))
    assert "There is no file none.safetensors" in refused(
        lambda: nodes.LoadPVDM.execute("none.safetensors", "small.safetensors"))
