"""Latent Interpolate x4: three frames between every two key frames, once or twice."""

import torch

from ..temporal.errors import VideoLDMError
from ..temporal.rollout import between
from .host import context, latents, sampling
from .host.api import io
from .host.options import with_clip_options
from .sample import require_layers, temporal_texts

WINDOW = 5      # a key frame, three frames to make, the next key frame (section 3.3)
ENDS = (0, -1)


class LatentInterpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
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
                io.Conditioning.Input("positive", tooltip="What the video shows: the text of the key frames."),
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
                                              "Sampler."),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="LATENT", tooltip="All frames, old and new, in order."),
                io.Float.Output("fps_out", display_name="fps", tooltip="The new frame rate, for Save Video File."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, steps, times, cfg, sampler, scheduler, fps, windows,
                temporal_prompt=None) -> io.NodeOutput:
        check_layers(require_layers(model))
        rate = rate_of(latent, fps)
        clips = key_frames(latent)
        settings = (steps, cfg, sampler, scheduler, positive, negative)
        texts = temporal_texts(temporal_prompt)
        progress = sampling.RolloutProgress(model, len(clips) * sum(between_pairs(len(clips[0]), times)), steps)
        for turn in range(times):
            rate *= 4
            clip_model = with_clip_options(model, WINDOW, texts, rate)
            clips = [interpolate(clip_model, clip, (seed + 2 * number + turn) % 2**64, settings, windows, progress)
                     for number, clip in enumerate(clips)]
        return io.NodeOutput(latents.with_frames(latent, torch.cat(clips), rate, len(clips[0])), rate)


def check_layers(sets):
    """Refuse a MODEL whose layers do not make what lies between two frames."""
    for layers in sets:
        if ENDS not in (layers.params.known_positions or ()):
            raise VideoLDMError(f"The temporal layers on this MODEL ({layers.title}) make key frames, not the "
                                "frames between them. Load a file of interpolation layers onto the image model with "
                                "Load Temporal Layers, and connect that MODEL here.")


def rate_of(latent, fps: float) -> float:
    rate = fps or latent.get(latents.RATE)
    if not rate:
        raise VideoLDMError("The LATENT does not say its frame rate, which the interpolation layers are told. Set fps "
                            "to the frame rate of the key frames.")
    return float(rate)


def key_frames(latent) -> list[torch.Tensor]:
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


def interpolate(model, keys, seed, settings, windows, progress) -> torch.Tensor:
    """`t c h w` -> `4(t-1)+1 c h w`. The noise of all windows is drawn at once: how many of them are sampled together
    does not change it."""
    pairs = len(keys) - 1
    out = torch.zeros(between(len(keys)), *keys.shape[1:])
    out[::4] = keys
    noise = sampling.noise_like(torch.zeros(pairs * WINDOW, *keys.shape[1:]), seed)
    at_once = windows or sampling.batch_that_fits(model, pairs, (WINDOW, *keys.shape[1:]))
    for first in range(0, pairs, at_once):
        count = min(at_once, pairs - first)
        part = noise[first * WINDOW:(first + count) * WINDOW]
        made = sample_windows(model, keys[first:first + count + 1], part, seed, settings, progress)
        new = out[4 * first:4 * (first + count)].unflatten(0, (count, 4))
        new[:, 1:] = made[:, 1:-1]
        progress.advance(count)
    return out


def sample_windows(model, keys, noise, seed, settings, progress) -> torch.Tensor:
    """`k+1 c h w` key frames -> `k 5 c h w` windows."""
    known = torch.stack([keys[:-1], keys[1:]], dim=1).flatten(0, 1)
    steps, cfg, sampler, scheduler, positive, negative = settings
    made = sampling.ksample(context.with_context_frames(model, known, ENDS), seed, steps, cfg, sampler, scheduler,
                            positive, negative, {"samples": torch.zeros_like(noise)}, 1.0, noise=noise,
                            callback=progress.callback)
    return made.unflatten(0, (-1, WINDOW))


NODES = [LatentInterpolate]
