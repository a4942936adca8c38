"""Latent Interpolate x4: three frames between every two key frames, once or twice.

There are two ways. Layers or a network that were trained with both ends known make the frames of each pair by
themselves, in clips of 5. LaVie's interpolation makes all frames of a clip at once, in windows of 61, and the key
frames anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..temporal.errors import VideoLDMError
from ..temporal.params import StackParams
from ..temporal.rollout import PER_KEY, interpolated_length
from ..temporal.schedules import keys_within
from .host import context, latents, sampling, sparse_control
from .host.api import io
from .host.compat import search_words
from .host.frame_conditioning import CallFrames, model_of, settings_of
from .host.free_init import refuse_free_init
from .host.inputs import checked
from .host.options import LayerSet, layer_sets
from .host.required_layers import require_layers
from .host.sockets import Conditioning, Latent, Model, Vae
from .host.texts import check_texts
from .host.windows import with_windows_between_keys

WINDOW = 5      # a key frame, three frames to make, the next key frame (docs/papers.md#interpolation)
ENDS = (0, -1)
SHARED = 4          # neighbouring windows of a clip that is made anew share one of so many of their key frames


@dataclass(frozen=True)
class InterpolationPass:
    """One interpolation of one clip. With `times` at 2 a clip goes through two passes."""

    model: Model
    settings: sampling.SamplerSettings
    temporal_prompt: Conditioning | None    # for the temporal layers alone
    rate: float                             # frames per second after this pass
    seed: int
    number: int                             # of this pass: 0, or 1 for the second
    times: int                              # how many passes there are
    clip: int                               # number of this clip in the batch
    clips: int                              # how many clips the batch has
    at_once: int                            # pairs of frames in a call; 0: as many as the memory holds
    grey: torch.Tensor | None               # mid-grey `c h w`, encoded, for a network that sees it in unknown frames
    keep: bool                              # where key frames are made anew: True puts the old ones back
    progress: sampling.RolloutProgress

    def frames_of(self, pairs: range, keys: int) -> CallFrames:
        """Which frames of the finished video the windows of some pairs hold. keys: key frames of this pass."""
        return self.finished_frames([PER_KEY * pair + frame for pair in pairs for frame in range(WINDOW)], keys)

    def finished_frames(self, made: Iterable[int], keys: int) -> CallFrames:
        """Which frames of the finished video some frames are that this pass makes. keys: key frames of this pass."""
        spacing = PER_KEY ** (self.times - 1 - self.number)     # finished frames from one of these frames to the next
        whole = PER_KEY * spacing * (keys - 1) + 1              # finished frames of the clip
        return CallFrames(tuple(self.clip * whole + n * spacing for n in made), self.clips * whole, whole,
                          PER_KEY ** self.times)


class LatentInterpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMInterpolate",
            display_name="Latent Interpolate x4",
            category="video ldm/sample",
            description="Makes three frames between every two: T frames become 4(T-1)+1, at four times the frame rate. "
                        "The key frames stay unchanged. Takes a MODEL with interpolation layers. The MODEL of LaVie's "
                        "interpolation, or of SparseCtrl, makes the key frames anew.",
            **search_words("frame interpolation", "rife", "film", "slow motion", "smooth", "frame rate", "fps",
                           "in between"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers with a file of interpolation "
                                                "layers, from Load Video Model with lavie_interpolation, or from Load "
                                                "SparseCtrl."),
                io.Conditioning.Input("positive", tooltip="What the video shows: the text of the key frames. Texts, "
                                                          "masks and ControlNet pictures may be one for all frames, "
                                                          "one for each output frame, or one for each key frame. One "
                                                          "for a key frame also serves the frames up to the next key "
                                                          "frame. Any other number is repeated in turn; Prompt "
                                                          "Travel's is refused."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent", tooltip="The key frames, one per batch item; several clips stay apart. "
                                                  "LaVie's interpolation takes those of any Stable Diffusion 1.x or "
                                                  "2.x model, AnimateDiff's too."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="The random noise of the new frames."),
                io.Int.Input("steps", default=20, min=1, max=10000,
                             tooltip="Denoising steps. Fewer are needed than for key frames, because both ends are "
                                     "known. LaVie's authors take 50."),
                io.Int.Input("times", default=1, min=1, max=2,
                             tooltip="1 makes 4 times as many frames, 2 makes 16 times. The second pass uses the same "
                                     "layers at the higher frame rate."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="How strictly the text is followed. The key frames say most already. "
                                       "LaVie's interpolation wants 4, SEINE 8."),
                io.Combo.Input("sampler", options=sampling.SAMPLERS, default="euler",
                               tooltip="Core's samplers. euler on ddim_uniform is DDIM with eta 0, the paper's choice "
                                       "here."),
                io.Combo.Input("scheduler", options=sampling.SCHEDULERS, default="ddim_uniform",
                               tooltip="How the noise levels are spaced."),
                io.Float.Input("fps", default=0.0, min=0.0, max=1000.0, step=0.01,
                               tooltip="Frame rate of the key frames. 0: the one that came with the LATENT."),
                io.Int.Input("windows", default=0, min=0, max=1000,
                             tooltip="How many pairs of key frames are worked on at once. 0: as many as the memory "
                                     "holds. Not used by LaVie's interpolation: it works on 61 frames at once."),
                io.Conditioning.Input("temporal_prompt", optional=True,
                                      tooltip="Another positive text for the temporal layers alone, as on Video LDM "
                                              "Sampler; as many as in positive."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Only for SEINE: encodes the mid-grey that it sees in the frames to make."),
                io.Boolean.Input("keep_key_frames", default=False, optional=True,
                                 tooltip="Only for LaVie's interpolation and SparseCtrl. Off: all frames are made "
                                         "anew, as their authors do. On: the key frames that came in are put back at "
                                         "their places."),
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
                temporal_prompt: Conditioning | None = None, vae: Vae | None = None,
                keep_key_frames: bool = False) -> io.NodeOutput:
        sparse_control.refuse_pictures(model, "Latent Interpolate x4")
        check_layers(require_layers(model), sparse_control.sparse_settings(model) is not None)
        check_texts(model, positive, negative, temporal_prompt)
        latents.check_kind(latent, model, "The key frames")
        rate = rate_of(latent, fps)
        clips = key_frames(latent, sampling.latent_channels(model))
        grey = context.encoded_grey(model, clips[0], vae)
        settings = sampling.SamplerSettings(steps, cfg, sampler, scheduler, positive, negative)
        anew = context.remakes_key_frames(model)
        if not anew:
            refuse_free_init(model, "Latent Interpolate x4", "The key frames already give the others their large "
                             "shapes.")
        calls = times if anew else sum(between_pairs(len(clips[0]), times))
        progress = sampling.RolloutProgress(model, len(clips) * calls, steps)
        make = interpolate_anew if anew else interpolate
        for step in range(times):
            rate *= PER_KEY
            clips = [make(clip, InterpolationPass(model, settings, temporal_prompt, rate,
                                                  (seed + 2 * number + step) % 2**64, step, times, number, len(clips),
                                                  windows, grey, keep_key_frames, progress))
                     for number, clip in enumerate(clips)]
        return io.NodeOutput(latents.with_frames(latent, model, torch.cat(clips), rate, len(clips[0])), rate)


def check_layers(sets: list[LayerSet], sparse: bool = False) -> None:
    """Refuse a MODEL without interpolation layers, or with layers that interpolate in different ways.

    sparse: a SparseCtrl on the MODEL sees the key frames, so any layers make the frames between.
    """
    for layers in sets:
        if not sparse and not interpolates(layers.params):
            raise VideoLDMError(f"The temporal layers on this MODEL ({layers.title}) make key frames, not the "
                                "frames between them. Load a file of interpolation layers onto the image model with "
                                "Load Temporal Layers, or lavie_interpolation with Load Video Model, and connect that "
                                "MODEL here.")
    anew = [layers for layers in sets if layers.params.remakes_key_frames]
    others = [layers for layers in sets if not layers.params.remakes_key_frames]
    if anew and others:
        raise VideoLDMError(f"This MODEL ({anew[0].title}) also has other temporal layers ({others[0].title}), which "
                            "interpolate in another way. Remove the Load Temporal Layers node.")


def interpolates(params: StackParams) -> bool:
    """Whether layers or their network were trained to make the frames between key frames."""
    return any(takes.positions is None or ENDS in takes.positions for takes in params.known_frames_inputs)


def rate_of(latent: Latent, fps: float) -> float:
    rate = fps or latent.get(latents.RATE)
    if not rate:
        raise VideoLDMError("The LATENT does not say its frame rate, and the interpolation needs it. Set fps to the "
                            "frame rate of the key frames.")
    return float(rate)


def key_frames(latent: Latent, channels: int) -> list[torch.Tensor]:
    """The key frames `t c h w` of each clip. Clips are interpolated by themselves. channels: of the MODEL's latents."""
    frames = latents.check_frames(latent["samples"], "The key frames")
    latents.check_channels(frames, channels, "The key frames")
    length = latent.get(latents.CLIP_FRAMES) or len(frames)
    if len(frames) > length and len(frames) % length:
        raise VideoLDMError(f"The LATENT holds clips of {length} frames, and its {len(frames)} frames do not divide "
                            "into them: it was cut or joined after sampling. Cut it by whole clips.")
    clips = latents.clips_of(latent, len(frames))
    if len(frames) < 2 * clips:
        raise VideoLDMError("There is one key frame, and interpolation makes the frames between two. Connect a LATENT "
                            "of 2 or more frames.")
    return list(frames.chunk(clips))


def between_pairs(frames: int, times: int) -> list[int]:
    """How many pairs of key frames each pass has."""
    counts = []
    for _ in range(times):
        counts.append(frames - 1)
        frames = interpolated_length(frames)
    return counts


def interpolate(keys: torch.Tensor, one_pass: InterpolationPass) -> torch.Tensor:
    """Key frames `t c h w` -> all frames `4(t-1)+1 c h w`.

    The noise of all windows is drawn at once, so it does not depend on how many windows a call has.
    """
    pairs = len(keys) - 1
    out = torch.zeros(interpolated_length(len(keys)), *keys.shape[1:])
    out[::4] = keys
    noise = sampling.noise_like(torch.zeros(pairs * WINDOW, *keys.shape[1:]), one_pass.seed)
    at_once = one_pass.at_once or sampling.batch_that_fits(one_pass.model, pairs, (WINDOW, *keys.shape[1:]))
    for first in range(0, pairs, at_once):
        some = range(first, min(first + at_once, pairs))
        part = noise[some.start * WINDOW:some.stop * WINDOW]
        made = sample_windows(keys[some.start:some.stop + 1], part, one_pass, one_pass.frames_of(some, len(keys)))
        new = out[4 * some.start:4 * some.stop].unflatten(0, (len(some), 4))
        new[:, 1:] = made[:, 1:-1]
        one_pass.progress.advance(len(some))
    return out


def sample_windows(keys: torch.Tensor, noise: torch.Tensor, one_pass: InterpolationPass,
                   frames: CallFrames) -> torch.Tensor:
    """Key frames `k+1 c h w` -> windows `k 5 c h w`, in one sampling."""
    known = torch.stack([keys[:-1], keys[1:]], dim=1).flatten(0, 1)
    model = model_of(one_pass.model, WINDOW, one_pass.temporal_prompt, one_pass.rate, frames)
    made = sampling.sample(context.with_context_frames(model, known, ENDS, grey=one_pass.grey), one_pass.seed,
                           settings_of(one_pass.settings, frames), torch.zeros_like(noise), noise,
                           one_pass.progress.callback)
    return made.unflatten(0, (-1, WINDOW))


def trained_windows(sets: list[LayerSet]) -> tuple[int, int]:
    """Frames of a window, and the frames that windows share, for a network that makes all frames anew.

    A window is as long as the clips of training. For LaVie's that is 61 frames: 16 key frames, of which 4 are shared.
    """
    length = max(min(layers.params.frames for layers in sets), WINDOW)
    shared = max(keys_within(length) // SHARED, 1)
    return length, interpolated_length(shared)


def interpolate_anew(keys: torch.Tensor, one_pass: InterpolationPass) -> torch.Tensor:
    """Key frames `t c h w` -> all frames `4(t-1)+1 c h w`, made in one sampling. A long clip is divided in each step.

    The noise of all frames is drawn at once, so it does not depend on the windows.
    """
    length = interpolated_length(len(keys))
    frames = one_pass.finished_frames(range(length), len(keys))
    noise = sampling.noise_like(torch.zeros(length, *keys.shape[1:]), one_pass.seed)
    model = model_of(one_pass.model, length, one_pass.temporal_prompt, one_pass.rate, frames)
    model = with_windows_between_keys(model, *trained_windows(layer_sets(model)))
    made = sampling.sample(context.with_key_frames(model, keys), one_pass.seed, settings_of(one_pass.settings, frames),
                           torch.zeros_like(noise), noise, one_pass.progress.callback)
    if one_pass.keep:
        made[::PER_KEY] = keys.to(made)
    one_pass.progress.advance()
    return made


NODES = [LatentInterpolate]
