"""The nodes Load Temporal Decoder and Temporal VAE Decode: what they read from the graph, and what they give."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from video_ldm.nodes import decode as nodes
from video_ldm.nodes.host import decoding, temporal_vae, wiring
from video_ldm.nodes.upscale import VideoUpscale
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import decoder_help
from video_ldm.tests.decoder_help import (
    latents,
    small_vae,
    whole,
    write_decoder,
)

vae, made = decoder_help.vae, decoder_help.made      # fixtures


class Hidden:
    def __init__(self, used):
        link = {"save": {"class_type": "SaveImage", "inputs": {"images": ["7", 0]}}} if used else {}
        self.unique_id = "7"
        self.prompt = {"7": {"class_type": "VideoLDMTemporalDecode", "inputs": {"vae": ["1", 2], "window": 4}},
                       "video": {"class_type": "SaveVideo", "inputs": {"video": ["7", 1]}}, **link}


def run_node(monkeypatch, vae, used, latent=None, **settings):
    monkeypatch.setattr(nodes.TemporalDecode, "hidden", Hidden(used))
    latent = latent or {"samples": latents(6), "frame_rate": 4.0}
    widgets = {"window": 4, "overlap": 2, "tile": 0, "fps": 0.0, **settings}
    return nodes.TemporalDecode.execute(vae, latent, **widgets).result


def test_the_images_are_made_only_where_they_are_connected(made, monkeypatch):
    images, video = run_node(monkeypatch, made, used=True)
    assert torch.equal(images, whole(made, latents(6), 4, 2)) and torch.equal(video.get_components().images, images)
    monkeypatch.setattr(decoding.Decoding, "decode_piece", None)
    blocked, video = run_node(monkeypatch, made, used=False)
    assert type(blocked).__name__ == "ExecutionBlocker" and "Run it again" in blocked.message
    assert video.get_frame_count() == 6


def test_a_node_that_the_prompt_does_not_know_counts_as_connected():
    assert wiring.is_used(None, 0) and wiring.is_used(type("H", (), {"prompt": {"1": {}}, "unique_id": "2"}), 0)
    hidden = Hidden(False)
    assert not wiring.is_used(hidden, 0) and wiring.is_used(hidden, 1) and wiring.is_used(Hidden(True), 0)
    assert wiring.used_in_running("VideoLDMTemporalDecode", 0) == []       # nothing runs here


def test_the_rate_is_the_widgets_then_the_latents_then_the_usual_one(made, monkeypatch):
    for latent, fps, rate in (({"samples": latents(6), "frame_rate": 4.0}, 0.0, 4), ({"samples": latents(6)}, 0.0, 8),
                              ({"samples": latents(6), "frame_rate": 4.0}, 12.5, Fraction(25, 2))):
        assert run_node(monkeypatch, made, False, latent, fps=fps)[1].get_frame_rate() == rate


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_video_takes_a_sound_that_ends_with_its_frames(made, monkeypatch, used, channels):
    """6 frames at 4 a second last 1.5 seconds: 66150 samples at 44.1 kHz."""
    wave = torch.arange(channels * 88200).view(1, channels, 88200) / 1e6
    for length in (88200, 66150, 30000):
        audio = {"waveform": wave[..., :length], "sample_rate": 44100}
        video = run_node(monkeypatch, made, used, audio=audio)[1]
        assert video.get_audio()["sample_rate"] == 44100
        assert torch.equal(video.get_audio()["waveform"], wave[..., :min(length, 66150)])
    part = video.as_trimmed(0.25, 0.25)
    assert torch.equal(part.get_audio()["waveform"], wave[..., 11025:22050])
    assert part.get_components().audio is part.get_audio()
    assert run_node(monkeypatch, made, used)[1].get_audio() is None


@pytest.mark.parametrize("audio, sentence", [
    (5, "The sound is a int without a waveform"),
    ({"waveform": torch.zeros(1, 2, 3)}, "The sound is a dict without a waveform and a sample rate"),
    ({"waveform": None, "sample_rate": 8000}, "The waveform of the sound is a NoneType"),
    ({"waveform": torch.zeros(1, 2, 3, dtype=torch.int16), "sample_rate": 8000}, "is a tensor of torch.int16"),
    ({"waveform": torch.zeros(2, 3), "sample_rate": 8000}, "The sound is a tensor of shape"),
    ({"waveform": torch.zeros(2, 2, 3), "sample_rate": 8000}, "one sound of 1 to 8 channels"),
    ({"waveform": torch.zeros(1, 9, 3), "sample_rate": 8000}, "one sound of 1 to 8 channels"),
    ({"waveform": torch.zeros(1, 2, 3), "sample_rate": 0}, "has 0 samples a second; it must be"),
    ({"waveform": torch.zeros(1, 2, 3), "sample_rate": None}, "has None samples a second"),
    ({"waveform": torch.full((1, 2, 3), float("nan")), "sample_rate": 8000}, "values that are no numbers")])
def test_a_sound_that_no_video_can_have_is_refused_before_the_work(made, monkeypatch, audio, sentence):
    monkeypatch.setattr(decoding.Decoding, "decode_piece", None)
    with pytest.raises(VideoLDMError, match=sentence) as caught:
        run_node(monkeypatch, made, True, audio=audio)
    assert "\n" not in str(caught.value)


def test_the_clips_are_the_widgets_then_the_latents(made, monkeypatch):
    z = latents(6)
    by_latent, _ = run_node(monkeypatch, made, True, {"samples": z, "clip_frames": 3})
    by_widget, _ = run_node(monkeypatch, made, True, {"samples": z}, clips=2)
    one, _ = run_node(monkeypatch, made, True, {"samples": z, "clip_frames": 3}, clips=1)
    assert torch.equal(by_latent, by_widget) and not torch.equal(by_latent, one)


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(made, monkeypatch):
    def refuse(size, what, advice):
        assert size == 6 * 48 * 64 * 12
        raise VideoLDMError(f"{what}. {advice}")
    monkeypatch.setattr(nodes.files, "refuse_beyond_memory", refuse)
    with pytest.raises(VideoLDMError, match="6 frames of 64x48. Connect only the VIDEO output"):
        run_node(monkeypatch, made, True)


def test_the_report_of_the_loader_says_what_it_loaded_and_warns_where_it_does_not_fit(monkeypatch, caplog, tmp_path):
    file, plain, trips = write_decoder(tmp_path / "mine.safetensors"), small_vae(), []
    monkeypatch.setattr(nodes.files, "resolve_decoder", lambda name: file)
    monkeypatch.setattr(temporal_vae, "_outcomes", {})
    monkeypatch.setattr(temporal_vae, "round_trips", lambda own, new: trips.append((own, new)) or (30.0, 10.0))
    made, report = nodes.LoadTemporalDecoder.execute(plain, "mine.safetensors").result
    assert trips == [(plain, made)]                         # 30 dB are the VAE's own
    lines = report.splitlines()
    assert lines[0].endswith("for latents of the tests.") and lines[2] == "Licence: Apache-2.0."
    assert lines[1] == "Trained on clips of 6 frames at 8 frames per second; kernel 3x1x1."
    assert lines[3].startswith("Warning: mine.safetensors does not seem to fit the connected VAE: a test picture comes "
                               "back at 10 dB from it, at 30 dB from the VAE's own decoder.")
    assert lines[3].removeprefix("Warning: ") in caplog.text


@pytest.mark.parametrize("output, decoded, upscaled", [(0, ["7"], ["8"]), (1, [], [])])
def test_a_node_runs_again_when_its_images_are_connected_or_disconnected(monkeypatch, output, decoded, upscaled):
    running = {"7": {"class_type": "VideoLDMTemporalDecode", "inputs": {"vae": ["1", 2]}},
               "8": {"class_type": "VideoLDMUpscale", "inputs": {"video": ["7", 1]}},
               "9": {"class_type": "Save", "inputs": {"a": ["7", output], "b": ["8", output], "c": ["1", 0]}}}
    waiting = {**running, "9": {"class_type": "Save", "inputs": {"a": ["7", 0], "b": ["8", 0]}}}
    queue = SimpleNamespace(get_current_queue=lambda: ([(0, "first", running)], [(1, "second", waiting)]))
    monkeypatch.setattr(wiring, "server", lambda: SimpleNamespace(prompt_queue=queue))
    assert nodes.TemporalDecode.fingerprint_inputs() == decoded
    assert VideoUpscale.fingerprint_inputs() == upscaled


def test_a_part_of_the_video_is_that_part_of_the_images_where_these_are_connected(made, monkeypatch):
    images, video = run_node(monkeypatch, made, used=True)          # 6 frames at 4 a second
    part = video.as_trimmed(0.25, 0.5)
    assert part.get_frame_count() == 2 and torch.equal(part.get_components().images, images[1:3])
