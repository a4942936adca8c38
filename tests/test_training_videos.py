"""Videos of an artist's own: how they become frames, windows of them, and PVDM trained on them from end to end."""

import os
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from video_ldm.demo import pvdm_videos
from video_ldm.demo.pvdm_videos import Design, Plan, digest, train
from video_ldm.temporal import pvdm
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_pvdm
from video_ldm.temporal.layers.factory import Factory
from video_ldm.temporal.pvdm import files as pvdm_files
from video_ldm.temporal.training.loop import StepContext
from video_ldm.temporal.training.planes import encode_windows
from video_ldm.temporal.training.video_files import (
    FrameSettings,
    TwoClips,
    VideoClips,
    cropped,
    decoded_videos,
    find_videos,
)
from video_ldm.temporal.video import write_video
from video_ldm.tests.small import randomise
from video_ldm.tests.video_help import clip, numbered, numbers

SETTINGS = FrameSettings(40, 40, 12, 4)


def context(step=0):
    return StepContext.make(step, seed=0)


def video(path, count=12, rate=12, size=40):
    write_video(path, numbered(count, size), rate, crf=4)
    return path


def decoded(path, cache, **settings):
    return decoded_videos(find_videos(path), cache, replace(SETTINGS, **settings))


def refusal(path, cache, **settings):
    with pytest.raises(VideoLDMError) as caught:
        decoded(path, cache, **settings)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*")) if cache.exists() else True
    return str(caught.value)


# Files to frames

def test_all_videos_of_a_folder_and_its_subfolders_are_decoded_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    video(folder / "b.mp4", 6), video(folder / "a.MP4", 8), video(folder / "more" / "c.mp4", 7)
    (folder / "notes.txt").write_text("no video")
    (folder / ".hidden" / "d.mp4").write_bytes(b"no video either")
    assert [file.name for file in find_videos(folder)] == ["a.MP4", "b.mp4", "c.mp4"]
    frames = decoded(folder, tmp_path / "cache")
    assert [part.shape for part in frames] == [(8, 40, 40, 3), (6, 40, 40, 3), (7, 40, 40, 3)]
    assert all(part.dtype == np.uint8 and isinstance(part, np.memmap) for part in frames)
    assert [numbers(part / 255) for part in frames] == [list(range(8)), list(range(6)), list(range(7))]


@pytest.mark.parametrize("rate, fps, shown", [
    (24, 12, range(0, 24, 2)), (24, 24, range(24)), (30, 12, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
    (Fraction(24000, 1001), 24, range(24)), (Fraction(30000, 1001), 15, range(0, 24, 2))],
    ids=["half", "the same", "two in five", "NTSC film", "half of NTSC"])
def test_frames_are_those_shown_at_the_wanted_rate(tmp_path, rate, fps, shown):
    write_video(tmp_path / "a.mp4", numbered(24), rate, crf=4)
    frames, = decoded(tmp_path / "a.mp4", tmp_path / "cache", fps=fps)
    assert numbers(frames / 255) == list(shown)


def test_frames_are_the_middle_of_the_picture_without_distortion():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 255
    assert cropped(wide, 20, 20)[:, 1:-1].min() == 255                  # the middle 40 of 100 columns
    assert cropped(wide, 20, 50).mean() == pytest.approx(255 * 0.4, abs=3)      # all of it
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    assert cropped(tall, 16, 16)[1:-1].min() == 255
    high = cropped(tall, 60, 20)                                        # 100 of 100 rows, 33 of 40 columns
    assert high.shape == (60, 20, 3) and high[:16].max() == 0 and high[20:40].min() == 255
    fine = np.zeros((64, 64, 3), np.uint8)
    fine[::2] = 255
    assert np.ptp(cropped(fine, 8, 8)[2:6]) <= 2                        # averaged, not every eighth row


def test_a_file_is_decoded_once_for_each_setting_and_again_when_it_changes(tmp_path):
    path, cache, lines = video(tmp_path / "a.mp4"), tmp_path / "cache", []
    for _ in range(2):
        first, = decoded_videos([path], cache, SETTINGS, report=lines.append)
    assert lines == ["Decoding 1 of 1: a.mp4"]
    assert len(decoded(path, cache, fps=6)[0]) == 6 and len(list(cache.iterdir())) == 2
    video(path, 9)
    os.utime(path, ns=(1, 1))
    assert len(decoded(path, cache)[0]) == 9 and len(first) == 12


def test_a_decoding_that_fails_leaves_no_file(tmp_path, monkeypatch):
    from video_ldm.temporal.video import VideoFile

    def broken(self, steps):
        yield np.zeros((40, 40, 3), np.uint8)
        raise VideoLDMError("a.mp4 is damaged.")
    path = video(tmp_path / "a.mp4")
    monkeypatch.setattr(VideoFile, "iterate", broken)
    assert refusal(path, tmp_path / "cache") == "a.mp4 is damaged."

    def full(self, steps):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(VideoFile, "iterate", full)
    assert "The frames of a.mp4 cannot be written to" in refusal(path, tmp_path / "cache")


def test_what_cannot_be_learned_from_is_refused_by_name_before_anything_is_decoded(tmp_path):
    folder, cache = tmp_path / "videos", tmp_path / "cache"
    assert f"There is no video or folder '{folder}'" in refusal(folder, cache)
    folder.mkdir()
    (folder / "notes.txt").write_text("text")
    assert f"There is no video in the folder '{folder}'. Put MP4 files there" in refusal(folder, cache)
    video(folder / "a.mp4")
    bad = folder / "z.mp4"
    bad.write_bytes(b"not a video" * 100)
    assert "z.mp4 cannot be read as a video" in refusal(folder, cache)
    bad.write_bytes(b"")
    assert "z.mp4 is empty" in refusal(folder, cache)
    video(bad, 3)
    assert "z.mp4 is too short: it has 3 frames at 12 a second, and a clip has 4" in refusal(folder, cache)
    video(bad, 12, rate=8)
    assert "z.mp4 has 8 frames a second, and 12 are to be learned" in refusal(folder, cache)
    video(bad, 12)
    bad.write_bytes(bad.read_bytes()[:-400])
    assert bad.name in refusal(folder, cache)
    bad.unlink()
    assert len(decoded(folder, cache)) == 1


def test_a_cut_off_video_is_refused_by_name(tmp_path):
    write_video(tmp_path / "z.webm", clip(60), 12, "webm", crf=4)
    data = (tmp_path / "z.webm").read_bytes()
    (tmp_path / "z.webm").write_bytes(data[:len(data) // 2])
    assert "z.webm is cut off" in refusal(tmp_path / "z.webm", tmp_path / "cache")


def test_settings_that_no_frame_has_are_refused():
    with pytest.raises(VideoLDMError, match="Frames are 1x1 or larger"):
        FrameSettings(0, 8, 8, 4)
    with pytest.raises(VideoLDMError, match="frame rate is 0"):
        FrameSettings(8, 8, 0, 4)


# Windows

def frames_of(count, first=1):
    """Frames whose pixels are their number, from 1."""
    return np.broadcast_to(np.arange(first, first + count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))


def values(clips):
    """The number of the first frame of each clip (b t 3 H W), where frames follow one another. 0: it is all black."""
    bytes_ = ((clips[:, :, 0, 0, 0] + 1) * 127.5).round()
    starts = []
    for row in bytes_:
        expected = row[0] + torch.arange(len(row)) if row.any() else torch.zeros(len(row))
        assert torch.equal(row, expected)
        starts.append(int(row[0]))
    return starts


def test_windows_of_one_clip_come_from_anywhere_in_each_video():
    clips = VideoClips([frames_of(6), frames_of(4, 101)], 4, 200)(context())
    assert clips.frames.shape == (200, 4, 3, 8, 8) and clips.weights is None
    found = values(clips.frames)
    assert set(found) == {1, 2, 3, 101} and 70 < found.count(101) < 130         # each video as often


def test_windows_of_two_clips_have_a_black_first_half_where_the_video_has_no_more():
    videos = TwoClips([frames_of(9), frames_of(5, 101), frames_of(7, 201)], 4, 300)
    x = videos(context())
    assert x.shape == (300, 8, 3, 8, 8) and torch.equal(x, videos(context()))
    first, second = values(x[:, :4]), values(x[:, 4:])
    assert set(zip(first, second)) == {(1, 5), (2, 6), (0, 101), (0, 102), (0, 201), (0, 202), (0, 203), (0, 204)}
    assert (x[[start == 0 for start in first], :4] == -1).all()
    assert len(videos(StepContext.make(0, 0, 1, 2))) == 150
    with pytest.raises(VideoLDMError, match="need videos of 4 frames"):
        TwoClips([frames_of(3)], 4, 1)


SMALL = pvdm.AutoencoderParams(frames=4, height=8, width=8, patch=4, channels=8, plane_channels=2, depth=1, heads=2,
                               head_width=4, plane_depth=1, plane_heads=2, plane_head_width=4, plane_hidden=8)


def test_planes_of_all_windows_are_those_of_each_window():
    network = randomise(pvdm.Autoencoder(SMALL))
    video = np.random.default_rng(0).integers(0, 255, (11, 8, 8, 3), np.uint8)
    planes = encode_windows(network, video, every=2, batch=3)
    assert planes.shape == (4, 2, SMALL.shape.length)           # windows from frames 0, 2, 4 and 6
    x = torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        for number, start in enumerate((0, 2, 4, 6)):
            assert torch.allclose(planes[number], network.encode(x[:, :, start:start + 4])[0], atol=1e-5)
    with pytest.raises(VideoLDMError, match="divide a clip of 4 frames, and 3 does not"):
        encode_windows(network, video, every=3)
    with pytest.raises(VideoLDMError, match="A clip has 4 frames, and this video 3"):
        encode_windows(network, video[:3])


# The example, from end to end

TINY = Plan(Design(channels=24, depth=1, heads=2, head_width=4, plane_depth=1, model_channels=32, channel_mult=(1, 2),
                   num_res_blocks=1, attention_levels=(), judge_channels=8),
            height=32, width=32, frames=4, fps=12, every=1, autoencoder_steps=3, adversarial_steps=1,
            diffusion_steps=2, autoencoder_batch=2, diffusion_batch=2, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work folder after the example ran to its end on two videos, one of them shorter than two clips."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "long.mp4", clip(24), 24, crf=10)
    write_video(folder / "videos" / "short.mp4", clip(5), 12, crf=10)
    assert train(TINY, folder / "videos", "mine", folder / "work", folder / "out")
    return folder


def loaded(folder, plan=TINY):
    """The autoencoder and the U-Net of the finished files, and what the files say."""
    files = [load_pvdm(folder / "out" / f"mine{part}.safetensors", kind) for part, kind in
             (("_pvdm_autoencoder", pvdm_files.AUTOENCODER), ("_pvdm", pvdm_files.DIFFUSION))]
    return *(file.network(Factory(device="meta")) for file in files), *files


def test_the_example_writes_two_files_that_load_and_make_video(trained):
    autoencoder, unet, *files = loaded(trained)
    assert [file.params for file in files] == [TINY.autoencoder, TINY.unet]
    assert [file.fps for file in files] == [12, 12] and files[1].about.grid == TINY.autoencoder.shape
    shape, steps = TINY.autoencoder.shape, pvdm.SamplerParams(2)
    noise = torch.randn(1, 4, shape.length, generator=torch.Generator().manual_seed(0))
    planes = list(pvdm.roll_out(2, steps, steps, lambda x, tau, cond: unet(x, tau, shape, cond), lambda number: noise,
                                pvdm.diffusion(), lambda number: torch.Generator().manual_seed(number)))
    video = torch.cat([autoencoder.decode(part) for part in planes], dim=2)
    assert video.shape == (1, 3, 8, 32, 32) and video.abs().max() <= 1


def test_the_files_hold_the_averaged_weights_of_both_trainings(trained):
    from video_ldm.temporal.training.checkpoint import load_checkpoint
    autoencoder, unet, *_ = loaded(trained)
    folders = {"autoencoder": ("autoencoder.", autoencoder)}
    diffusion, = (trained / "work").glob("diffusion-*")
    folders[diffusion.name] = ("unet.", unet)
    for folder, (prefix, network) in folders.items():
        tensors, state = load_checkpoint(trained / "work" / folder / "last.safetensors")
        assert state["step"] == (3 if folder == "autoencoder" else 2)
        for name, weight in network.named_parameters():
            assert torch.equal(weight, tensors[f"ema.{prefix}{name}"].half().float()), name


def test_planes_are_those_of_the_finished_autoencoder_and_of_every_window(trained):
    folder, = (trained / "work").glob("planes-*")
    planes = {path.name.split(".")[0]: np.load(path) for path in folder.iterdir()}
    assert {name: part.shape for name, part in planes.items()} == {"long": (9, 4, 48), "short": (2, 4, 48)}
    frames = {path.name.split(".")[0]: np.load(path) for path in (trained / "work" / "frames").iterdir()}
    autoencoder = loaded(trained)[0]
    assert frames["long"].shape == (12, 32, 32, 3)
    again = encode_windows(autoencoder, frames["long"])
    assert np.abs(again.numpy() - planes["long"]).max() < 5e-3         # the file's weights are half precision


def test_the_same_command_goes_on_where_it_stopped(trained, capsys, tmp_path):
    """Nothing is left to do. More steps of the diffusion are trained on the same planes."""
    before = {path: path.stat().st_mtime_ns for path in (trained / "work").rglob("*.npy")}
    assert train(replace(TINY, diffusion_steps=3), trained / "videos", "mine", trained / "work", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (trained / "work").rglob("*.npy")} == before
    shown = capsys.readouterr().out
    assert "Decoding" not in shown and "Encoding" not in shown and "Written" in shown
    assert not train(replace(TINY, diffusion_steps=5), trained / "videos", "mine", trained / "work", tmp_path,
                     max_minutes=0)
    shown = capsys.readouterr().out
    assert "PVDM diffusion: stopped at step 4 of 5. Run the same command again" in shown and "Written" not in shown


def test_another_autoencoder_gets_planes_and_a_diffusion_of_its_own(trained, tmp_path):
    folder = trained / "work"
    assert train(replace(TINY, autoencoder_steps=4), trained / "videos", "mine", folder, tmp_path)
    assert len(list(folder.glob("planes-*"))) == len(list(folder.glob("diffusion-*"))) == 2
    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    assert digest(weights) == digest(dict(reversed(weights.items()))) != digest(weights | {"a": torch.full((3,), 1e-7)})


def test_other_settings_in_the_same_folder_are_refused_before_anything_is_done(trained, tmp_path):
    with pytest.raises(VideoLDMError, match="holds a training with another width and fps.*another --folder"):
        train(replace(TINY, width=64, fps=6), trained / "videos", "mine", trained / "work", tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(VideoLDMError, match="plan.json' cannot be read"):
        train(TINY, trained / "videos", "mine", tmp_path)


@pytest.mark.parametrize("change, sentence", [
    (dict(width=24), "multiples of 16, and the frames of a clip a multiple of 2 and of 1. These are 24x32 and 4."),
    (dict(every=3), "a multiple of 2 and of 3"), (dict(every=0), "every is 0, which is too few"),
    (dict(diffusion_steps=0), "diffusion_steps is 0"), (dict(adversarial_steps=-1), "adversarial_steps is -1")])
def test_a_plan_that_no_network_has_is_refused(change, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        replace(TINY, **change)


def test_the_papers_design_is_the_papers():
    large, small = (Plan(pvdm_videos.DESIGNS[name], 256, 256, 16, 8, 1, 1, 0, 1, 1, 1)
                    for name in ("paper-l", "paper-s"))
    assert large.autoencoder == small.autoencoder == pvdm.RELEASED
    assert (large.unet, small.unet) == (pvdm.PVDM_L, pvdm.PVDM_S)


def test_the_command_says_what_is_wrong_in_a_sentence(tmp_path, capsys):
    assert pvdm_videos.main([str(tmp_path / "gone"), "--folder", str(tmp_path / "work")]) == 1
    shown = capsys.readouterr()
    assert "There is no video or folder" in shown.err and "Traceback" not in shown.err
    assert not (tmp_path / "work").exists()
