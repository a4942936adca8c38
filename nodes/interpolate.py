"""Latent Interpolate x4: three frames between every two key frames, once or twice."""

from dataclasses import dataclass

import torch

from ..temporal.errors import VideoLDMError
from ..temporal.rollout import between
from .host import context, latents, sampling
from .host.api import io
from .host.frame_conditioning import CallFrames, model_of, settings_of
from .host.inputs import checked
from .host.options import LayerSet
from .host.required_layers import require_layers
from .host.sockets import Conditioning, Latent, Model
from .host.texts import check_texts

WINDOW = 5      # a key frame, three frames to make, the next key frame (docs/papers.md#interpolation)
ENDS = (0, -1)


@dataclass(frozen=True)
class Turn:
    """One interpolation of one clip."""

    model: object                       # MODEL
    settings: sampling.SamplerSettings
    temporal_prompt: list | None        # CONDITIONING of the temporal layers alone
    rate: float                         # frames per second that this turn makes
    seed: int
    number: int                         # 0, or 1 where the frames that turn 0 made are interpolated again
    times: int                          # how many turns there are
    clip: int                           # which of the clips of the batch
    clips: int                          # how many there are
    at_once: int                        # pairs of frames in a call; 0: as many as the memory holds
    progress: sampling.RolloutProgress

    def frames_of(self, pairs: range, keys: int) -> CallFrames:
        """The frames of the finished video that the windows of some pairs are. keys: key frames of this turn."""
        spacing = 4 ** (self.times - 1 - self.number)       # finished frames between two of a window
        whole = 4 * spacing * (keys - 1) + 1                # finished frames of the clip
        inside = [(4 * pair + frame) * spacing for pair in pairs for frame in range(WINDOW)]
        return CallFrames(tuple(self.clip * whole + n for n in inside), self.clips * whole, whole, 4 ** self.times)


class LatentInterpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMInterpolate",
            display_name="Latent Interpolate x4",
            category="video ldm/sample",
            description="Makes three frames between every two: T frames become 4(T-1)+1, at four times the frame rate. "
                        "The frames that come in stay as they are, in their places. Takes a MODEL with interpolation "
                        "layers.",
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers with a file of interpolation "
                                                "layers."),
                io.Conditioning.Input("positive", tooltip="What the video shows: the text of the key frames. Texts, "
                                                          "masks and ControlNet pictures: one for all frames, one for "
                                                          "each frame that comes out, or one for each key frame, which "
                                                          "then also counts for the frames up to the next. Any other "
                                                          "number is repeated in turn."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent", tooltip="The key frames, one per batch item; several clips stay apart."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="The random noise of the new frames."),
                io.Int.Input("steps", default=20, min=1, max=10000,
                             tooltip="Denoising steps. Less is needed than for key frames: both ends are known."),
                io.Int.Input("times", default=1, min=1, max=2,
                             tooltip="1 makes 4 times as many frames, 2 makes 16 times: the same layers once more, "
                                     "told the higher frame rate."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="How strictly the text is followed. The key frames say most already."),
                io.Combo.Input("sampler", options=sampling.SAMPLERS, default="euler",
                               tooltip="Core's samplers. euler on ddim_uniform is DDIM with eta 0, the paper's choice "
                                       "here."),
                io.Combo.Input("scheduler", options=sampling.SCHEDULERS, default="ddim_uniform",
                               tooltip="How the noise levels are spaced."),
                io.Float.Input("fps", default=0.0, min=0.0, max=1000.0, step=0.01,
                               tooltip="Frame rate of the key frames. 0: the one that came with the LATENT."),
                io.Int.Input("windows", default=0, min=0, max=1000,
                             tooltip="How many pairs of key frames are worked on at once. 0: as many as the memory "
                                     "holds."),
                io.Conditioning.Input("temporal_prompt", optional=True,
                                      tooltip="Another positive text for the temporal layers alone, as on Video LDM "
                                              "Sampler; as many as in positive."),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="LATENT", tooltip="All frames, old and new, in order."),
                io.Float.Output("fps_out", display_name="fps", tooltip="The new frame rate, for Save Video File."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, positive: Conditioning, negative: Conditioning, latent: Latent, seed: int,
                steps: int, times: int, cfg: float, sampler: str, scheduler: str, fps: float, windows: int,
                temporal_prompt: Conditioning | None = None) -> io.NodeOutput:
        check_layers(require_layers(model))
        check_texts(model, positive, negative, temporal_prompt)
        rate = rate_of(latent, fps)
        clips = key_frames(latent)
        settings = sampling.SamplerSettings(steps, cfg, sampler, scheduler, positive, negative)
        progress = sampling.RolloutProgress(model, len(clips) * sum(between_pairs(len(clips[0]), times)), steps)
        for turn in range(times):
            rate *= 4
            clips = [interpolate(clip, Turn(model, settings, temporal_prompt, rate,
                                            (seed + 2 * number + turn) % 2**64, turn, times, number, len(clips),
                                            windows, progress))
                     for number, clip in enumerate(clips)]
        return io.NodeOutput(latents.with_frames(latent, torch.cat(clips), rate, len(clips[0])), rate)


def check_layers(sets: list[LayerSet]) -> None:
    """Refuse a MODEL whose layers do not make what lies between two frames."""
    for layers in sets:
        if ENDS not in (layers.params.known_positions or ()):
            raise VideoLDMError(f"The temporal layers on this MODEL ({layers.title}) make key frames, not the "
                                "frames between them. Load a file of interpolation layers onto the image model with "
                                "Load Temporal Layers, and connect that MODEL here.")


def rate_of(latent: Latent, fps: float) -> float:
    rate = fps or latent.get(latents.RATE)
    if not rate:
        raise VideoLDMError("The LATENT does not say its frame rate, which the interpolation layers are told. Set fps "
                            "to the frame rate of the key frames.")
    return float(rate)


def key_frames(latent: Latent) -> list[torch.Tensor]:
    """The key frames `t c h w` of each clip: there is nothing to make between the end of one and the next."""
    frames = latents.check_frames(latent["samples"], "The key frames")
    length = latent.get(latents.CLIP_FRAMES) or len(frames)
    if len(frames) > length and len(frames) % length:
        raise VideoLDMError(f"The LATENT holds clips of {length} frames, and its {len(frames)} frames do not divide "
                            "into them: it was cut or joined after sampling. Cut it by whole clips.")
    clips = latents.clips_of(latent, len(frames))
    if len(frames) < 2 * clips:
        raise VideoLDMError("There is one key frame, and interpolation makes what lies between two. Connect a LATENT "
                            "of 2 or more frames.")
    return list(frames.chunk(clips))


def between_pairs(frames: int, times: int) -> list[int]:
    """Pairs of key frames of each turn."""
    counts = []
    for _ in range(times):
        counts.append(frames - 1)
        frames = between(frames)
    return counts


def interpolate(keys: torch.Tensor, turn: Turn) -> torch.Tensor:
    """`t c h w` -> `4(t-1)+1 c h w`. The noise of all windows is drawn at once: how many of them are sampled together
    does not change it."""
    pairs = len(keys) - 1
    out = torch.zeros(between(len(keys)), *keys.shape[1:])
    out[::4] = keys
    noise = sampling.noise_like(torch.zeros(pairs * WINDOW, *keys.shape[1:]), turn.seed)
    at_once = turn.at_once or sampling.batch_that_fits(turn.model, pairs, (WINDOW, *keys.shape[1:]))
    for first in range(0, pairs, at_once):
        some = range(first, min(first + at_once, pairs))
        part = noise[some.start * WINDOW:some.stop * WINDOW]
        made = sample_windows(keys[some.start:some.stop + 1], part, turn, turn.frames_of(some, len(keys)))
        new = out[4 * some.start:4 * some.stop].unflatten(0, (len(some), 4))
        new[:, 1:] = made[:, 1:-1]
        turn.progress.advance(len(some))
    return out


def sample_windows(keys: torch.Tensor, noise: torch.Tensor, turn: Turn, frames: CallFrames) -> torch.Tensor:
    """`k+1 c h w` key frames -> `k 5 c h w` windows."""
    known = torch.stack([keys[:-1], keys[1:]], dim=1).flatten(0, 1)
    model = model_of(turn.model, WINDOW, turn.temporal_prompt, turn.rate, frames)
    made = sampling.sample(context.with_context_frames(model, known, ENDS), turn.seed,
                           settings_of(turn.settings, frames), torch.zeros_like(noise), noise,
                           turn.progress.callback)
    return made.unflatten(0, (-1, WINDOW))


NODES = [LatentInterpolate]
