"""PVDM Sampler, PVDM Encode and PVDM Decode on small random networks: what they make, and how it shows."""

from dataclasses import replace

import comfy.cli_args
import comfy.model_management
import comfy.utils
import pytest
import torch

from video_ldm.nodes import pvdm as nodes
from video_ldm.nodes.host import pvdm as host
from video_ldm.temporal.pvdm import SamplerParams, diffusion, roll_out
from video_ldm.tests import pvdm_help, pvdm_nodes_help
from video_ldm.tests.pvdm_help import AUTOENCODER, UNET
from video_ldm.tests.pvdm_nodes_help import FRAMES, LENGTH, Hidden, frames, load, planes, sample
from video_ldm.tests.small import relative_error

inference, folder, pvdm, three = (
    pvdm_nodes_help.inference, pvdm_nodes_help.folder, pvdm_nodes_help.pvdm, pvdm_nodes_help.three)     # fixtures


Cancelled = comfy.model_management.InterruptProcessingException



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
    assert [(kind, picture.size) for kind, picture, _ in previews] == [("JPEG", (3 * 32, 3 * 16))] * 2
    shown = torch.tensor(list(previews[1][1].tobytes())).view(3, 16, 3, 32, 3)[0, :, 2].float() / 255
    assert (shown - three[0][FRAMES + 2]).abs().max() < 1 / 200       # the third of the clip's eight frames


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
