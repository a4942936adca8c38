"""Windows of clips: which frames are drawn, from what files, with which text."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.training.batch import Batch, as_clips, drop_context, frames_as_images
from video_ldm.temporal.training.clips import Clips, as_frames, open_videos
from video_ldm.temporal.training.loop import StepContext

N, T = 5, 12


def numbered_videos():
    """Every value of a frame is 100 * video + frame."""
    numbers = 100 * np.arange(N)[:, None] + np.arange(T)[None, :]
    return np.broadcast_to(numbers[:, :, None, None, None], (N, T, 4, 2, 3)).astype(np.float32).copy()


def step(number=0, rank=0, world_size=1):
    return StepContext.make(number, 0, rank, world_size)


@pytest.fixture(params=["npy", "safetensors", "folder", "array"])
def videos(request, tmp_path):
    data = numbered_videos()
    if request.param == "array":
        return data
    if request.param == "npy":
        np.save(tmp_path / "clips.npy", data)
        return open_videos(tmp_path / "clips.npy")
    if request.param == "safetensors":
        save_file({f"video_{n}": torch.from_numpy(data[n]) for n in range(N)}, tmp_path / "clips.safetensors")
        return open_videos(tmp_path / "clips.safetensors")
    for n in range(N):
        np.save(tmp_path / f"{n}.npy", data[n])
    return open_videos(tmp_path)


def test_a_window_is_every_stride_th_frame_of_one_video_with_its_text(videos):
    texts = torch.arange(N, dtype=torch.float32).reshape(N, 1, 1).expand(N, 2, 3)
    latents, context = Clips(videos, frames=4, batch=64, stride=3, embeddings=texts)(step())[:2]
    assert latents.shape == (64, 4, 4, 2, 3) and latents.dtype == torch.float32 and context.shape == (64, 2, 3)
    video, frame = latents[:, :, 0, 0, 0].div(100, rounding_mode="floor"), latents[:, :, 0, 0, 0] % 100
    assert torch.all(video == video[:, :1]) and torch.equal(video[:, 0], context[:, 0, 0])
    assert torch.all(frame.diff(dim=1) == 3)
    assert set(frame[:, 0].tolist()) == {0, 1, 2} and set(video[:, 0].tolist()) == set(range(N))


def test_windows_depend_on_step_and_rank_alone(videos):
    clips = Clips(videos, frames=3, batch=8)
    assert torch.equal(clips(step(7)).latents, clips(step(7)).latents)
    assert not torch.equal(clips(step(7)).latents, clips(step(8)).latents)
    one, other = clips(step(7, 0, 2)).latents, clips(step(7, 1, 2)).latents
    assert one.shape[0] == 4 and not torch.equal(one, other)


def test_captions_point_into_the_texts_and_single_frames_are_images():
    texts = torch.tensor([10.0, 20.0]).reshape(2, 1, 1)
    clips = Clips(numbered_videos(), 4, 4, embeddings=texts, captions=[0, 1, 0, 1, 1])
    images, context = clips.images(32)(step())[:2]
    assert images.shape == (32, 4, 2, 3)
    expected = [[10.0, 20.0, 10.0, 20.0, 20.0][int(value) // 100] for value in images[:, 0, 0, 0]]
    assert context[:, 0, 0].tolist() == expected


def test_pixels_become_minus_one_to_one_and_half_floats_float32():
    pixels = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    assert torch.allclose(as_frames(pixels).flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert as_frames(np.zeros((2, 8, 9, 3), np.uint8)).shape == (2, 3, 8, 9)
    assert as_frames(torch.ones(2, 4, 2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert as_frames(np.ones((2, 4, 2, 3), np.float16)).dtype == torch.float32


def test_frames_of_clips_as_images_keep_the_text_of_their_clip():
    batch = Batch(torch.arange(6.0).reshape(2, 3, 1, 1, 1), torch.tensor([5.0, 6.0]).reshape(2, 1, 1))
    images, context = frames_as_images(batch)[:2]
    assert images.flatten().tolist() == [0, 1, 2, 3, 4, 5] and context.flatten().tolist() == [5, 5, 5, 6, 6, 6]
    assert frames_as_images(Batch(images, context)).latents is images


def test_flat_batches_are_cut_into_clips_and_an_indivisible_one_is_refused():
    assert as_clips(torch.zeros(8, 4, 2, 2), 4).shape == (2, 4, 4, 2, 2)
    with pytest.raises(VideoLDMError, match="batch of 10 frames does not divide into clips of 4"):
        as_clips(torch.zeros(10, 4, 2, 2), 4)
    with pytest.raises(VideoLDMError, match="number of frames given"):
        as_clips(torch.zeros(8, 4, 2, 2))
    with pytest.raises(VideoLDMError, match="have 4 frames, and the loss was set to 3"):
        as_clips(torch.zeros(2, 4, 4, 2, 2), 3)


def test_text_is_dropped_as_often_as_asked_and_replaced_by_the_null_context():
    texts, null = torch.ones(4000, 2, 3), torch.full((2, 3), 7.0)
    dropped = drop_context(texts, null, 0.1, torch.Generator().manual_seed(0))
    share = (dropped[:, 0, 0] == 7).float().mean()
    assert 0.08 < share < 0.12 and torch.all((dropped == 7).all(dim=(1, 2)) | (dropped == 1).all(dim=(1, 2)))
    assert drop_context(texts, None, 0.0, None) is texts
    with pytest.raises(VideoLDMError, match="Encode both with the same text encoder"):
        drop_context(texts, null[:1], 0.1, None)


@pytest.mark.parametrize("options, sentence", [
    (dict(frames=13), "need videos of 13 frames; 5 of 5 are shorter .number 0 has 12."),
    (dict(frames=5, stride=3), "need videos of 13 frames"),
    (dict(frames=4, batch=0), "must be 1 or more"),
    (dict(frames=4, embeddings=torch.zeros(4, 1, 1)), "5 videos came with 4 captions"),
    (dict(frames=4, embeddings=torch.zeros(2, 1, 1), captions=[0, 1, 2, 0, 0]), "rows of the 2 text embeddings"),
])
def test_impossible_windows_and_captions_are_refused(options, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        Clips(numbered_videos(), **({"batch": 2} | options))


def test_files_that_are_not_clips_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"<html>")
    (tmp_path / "a.safetensors").write_bytes(b"half")
    np.save(tmp_path / "code.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    for name in ("a.npy", "a.safetensors", "code.npy", "missing.npy"):
        with pytest.raises(VideoLDMError, match="cannot be read"):
            open_videos(tmp_path / name)
    with pytest.raises(VideoLDMError, match="no .npy file in the folder"):
        open_videos(tmp_path / "empty")
    with pytest.raises(VideoLDMError, match="is not a file of clips"):
        open_videos(tmp_path / "a.mp4")


def test_each_clip_is_told_the_frame_rate_of_its_video_at_its_stride():
    rates = [10.0, 20.0, 30.0, 40.0, 50.0]
    drawn = Clips(numbered_videos(), frames=3, batch=32, stride=4, fps=rates)(step())
    numbers = drawn.latents[:, 0, 0, 0, 0].div(100, rounding_mode="floor").int().tolist()
    assert drawn.fps.tolist() == [rates[number] / 4 for number in numbers] and len(set(numbers)) == N
    assert Clips(numbered_videos(), frames=3, batch=2)(step()).fps is None
    for wrong in ([10.0] * 4, [10.0] * 4 + [0.0]):
        with pytest.raises(VideoLDMError, match=f"5 videos came with {len(wrong)} frame rates"):
            Clips(numbered_videos(), 3, 1, fps=wrong)


def test_every_window_of_a_video_can_be_drawn_and_none_beyond():
    drawn = Clips(numbered_videos(), frames=4, batch=400, stride=3)(step()).latents[:, :, 0, 0, 0] % 100
    assert set(drawn[:, 0].tolist()) == {0, 1, 2} and set(drawn[:, -1].tolist()) == {9, 10, 11}


def test_weights_are_those_of_the_frames_drawn():
    clips = Clips(numbered_videos(), frames=4, batch=16, stride=2, weights=numbered_videos()[:, :, :1] + 0.5)
    drawn = clips(step())
    assert drawn.weights.shape == (16, 4, 1, 2, 3) and torch.equal(drawn.weights, drawn.latents[:, :, :1] + 0.5)
    with pytest.raises(VideoLDMError, match="5 videos came with weights of 5; each needs those of all its frames"):
        Clips(numbered_videos(), 4, 1, weights=numbered_videos()[:, 1:])
