"""How many frames are decoded and denoised for the frames of a video: what windows share is computed twice."""

import pytest
import torch

from video_ldm.benchmarks.per_frame import computed, least
from video_ldm.nodes.host.decoding import DecodeSettings, Decoding
from video_ldm.nodes.host.lazy_video import LazyVideo
from video_ldm.temporal.upscaler import plan_pieces, predict_in_pieces
from video_ldm.temporal.windows import window_slices
from video_ldm.tests import decoder_help
from video_ldm.tests.decoder_help import latents, with_random_decoder

FRAMES = (16, 64, 113, 256)
vae = decoder_help.vae       # fixture


def decoded(vae, monkeypatch, frames, window, overlap):
    """The lengths of the windows that are decoded for a clip, and the number of the latent of each frame that comes."""
    z = torch.arange(float(frames))[:, None, None, None].expand(-1, 4, 1, 1)
    lengths = []

    def decode_piece(self, part):
        lengths.append(len(part))
        return part[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
    monkeypatch.setattr(Decoding, "decode_piece", decode_piece)
    decoding = Decoding(vae, z, DecodeSettings(window, overlap, 0, 1))
    monkeypatch.setattr(decoding.vae, "process_output", lambda pictures: pictures)
    made = torch.cat(list(decoding.frames()))
    assert len(lengths) == decoding.steps()
    return lengths, made[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("window, overlap, counts", [
    (12, 4, {16: 24, 64: 96, 113: 168, 256: 384}),          # the usual settings of Temporal VAE Decode
    (8, 2, {16: 24, 64: 88, 113: 152, 256: 344})])          # those of Video Upscale
def test_a_temporal_decode_computes_what_the_fewest_windows_of_one_length_hold(vae, tmp_path, monkeypatch, window,
                                                                              overlap, counts):
    made = with_random_decoder(vae, tmp_path)
    for frames in FRAMES:
        lengths, seen = decoded(made, monkeypatch, frames, window, overlap)
        assert sum(lengths) == counts[frames] and set(lengths) == {window}
        assert seen == list(range(frames))
        assert computed(frames, window, overlap) == counts[frames] and computed(frames, window, None) == frames
        # An overlap of exactly this length would need shorter windows. It saves less than one window.
        assert 0 <= counts[frames] - least(frames, window, overlap) < window - overlap
        # One window less with this overlap would not reach the last frame.
        assert (len(lengths) - 1) * (window - overlap) + overlap < frames


@pytest.mark.parametrize("frames, window, lengths", [
    (9, 8, [5, 4]), (13, 12, [7, 6]), (113, 8, [8] * 8 + [7] * 7), (64, 8, [8] * 8), (5, 8, [5])])
def test_a_plain_vae_decodes_each_frame_once_in_windows_of_nearly_one_length(vae, monkeypatch, frames, window, lengths):
    seen_lengths, seen = decoded(vae, monkeypatch, frames, window, 4)
    assert seen_lengths == lengths and seen == list(range(frames))


def test_a_plain_vae_makes_the_same_pictures_in_windows_of_any_length(vae):
    z = latents(9)
    whole = torch.cat(list(Decoding(vae, z, DecodeSettings(9, 0, 0, 1)).frames()))
    decoding = Decoding(vae, z, DecodeSettings(4, 2, 0, 1))
    made = torch.cat(list(decoding.frames()))
    assert (made - whole).abs().max() < 1e-5
    video = LazyVideo(decoding.frames, 9, decoding.width, decoding.height, 8)
    assert torch.equal(video.as_trimmed(0.5, 0.5).get_components().images, made[4:8])       # across two windows


@pytest.mark.parametrize("layers, overlap, counts", [
    (True, 2, {16: 24, 64: 88, 113: 152, 256: 344}),
    (False, None, {16: 16, 64: 64, 113: 113, 256: 256})])
def test_video_upscale_denoises_frames_twice_with_layers_only(layers, overlap, counts):
    for frames, count in counts.items():
        cuts = plan_pieces(frames, 2, 2, 8, overlap, 0)
        calls = []

        def predict(frames, rows, columns, calls=calls):
            calls.append(frames.stop - frames.start)
            return torch.arange(float(frames.start), frames.stop)[:, None, None, None].expand(-1, 1, 2, 2)
        seen = predict_in_pieces(predict, cuts, 1)
        assert sum(calls) == count and max(calls) == cuts.largest[0] == 8
        assert seen[:, 0, 0, 0].tolist() == list(range(frames))


def test_windows_over_frames_that_do_not_see_each_other_are_the_fewest_and_share_none():
    for length in range(1, 40):
        for window in range(1, 12):
            spans = window_slices(length, window, None)
            sizes = [span.stop - span.start for span in spans]
            assert [place for span in spans for place in range(span.start, span.stop)] == list(range(length))
            assert len(spans) == -(-length // window) and max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)
