"""Longer video. Context Frames makes a clip go on from given frames. Extend Video samples clip after clip."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..temporal.errors import VideoLDMError
from ..temporal.rollout import OVERLAP, plan_calls
from .host import context, latents, notes, picture, sampling, sparse_control, unfinished
from .host.api import io
from .host.compat import search_words
from .host.frame_conditioning import frames_of_clip, model_of, settings_of
from .host.inputs import checked
from .host.pictures import check_pictures
from .host.required_layers import fps_of, require_layers
from .host.sampler_inputs import sampler_inputs
from .host.sockets import Conditioning, Latent, Model, Vae
from .host.texts import check_texts

LARGEST = 8192      # pixels of a side of a context frame: the samplers make no larger ones
STOP, KEEP = "stop", "keep finished clips"


class ContextFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMContextFrames",
            display_name="Context Frames",
            category="video ldm/sample",
            description="Gives a video model some frames of the clip, the context frames. The model makes the other "
                        "frames to go with them. Temporal layers trained with context frames take them as an input at "
                        "every step, and so does a network with an input for them, such as SEINE, and SparseCtrl from "
                        "Load SparseCtrl. MuseV and makeavid-sd find them in the image model's own input. PIA and "
                        "AnimateLCM image-to-video see one picture, and make its frame anew. With other layers, such "
                        "as AnimateDiff's alone, a noise mask holds them in place. Works with any sampler.",
            **search_words("picture to video", "image to video", "img2vid", "i2v", "svd", "first frame", "last frame",
                           "keyframe", "inpaint frames"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers or Load Video Model."),
                io.String.Input("frames", default="0",
                                tooltip="The numbers of the context frames within the clip, one for each picture: 0 "
                                        "is the first, -1 the last. '0' starts from a picture, '0, 1' goes on from "
                                        "two frames, '0, -1' makes the frames between. Layers trained with context "
                                        "frames take the sets they were trained for. The report of Load Temporal "
                                        "Layers names them. SEINE and SparseCtrl take any."),
                io.Float.Input("guidance", default=1.0, min=0.0, max=20.0, step=0.1, round=0.01,
                               tooltip="Context guidance: above 1 the clip keeps more strictly to the context frames, "
                                       "at one more model call a step. 1 is off. Only for layers trained with context "
                                       "frames, and for SparseCtrl."),
                io.Latent.Input("latent", optional=True, tooltip="The context frames as latents, one per batch item."),
                io.Image.Input("image", optional=True, tooltip="The context frames as pictures; needs the VAE. "
                                                               "SparseCtrl for sketches takes them here, without a "
                                                               "VAE."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the pictures, and for SEINE the mid-grey that it "
                                                           "sees in the other frames."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="The model with these context frames."),
                io.String.Output("report", display_name="report", tooltip="How the frames enter the model."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, frames: str, guidance: float, latent: Latent | None = None,
                image: torch.Tensor | None = None, vae: Vae | None = None) -> io.NodeOutput:
        require_layers(model)
        context.refuse_interpolation_network(model)
        latents.check_kind(latent, model, "The context frames")
        positions = positions_of(frames)
        if sparse_control.sees_pictures(model):
            sketches = connected_sketches(latent, image)
            out = context.with_context_frames(model, sketches, positions, guidance)
            return io.NodeOutput(out, report_of(model, positions, guidance))
        context_latents = connected_latents(latent, image, vae)
        if context_latents is None:
            raise VideoLDMError("No context frames are connected. Connect a LATENT, or an IMAGE and its VAE.")
        latents.check_frames(context_latents, "The context frames")
        latents.check_channels(context_latents, sampling.latent_channels(model), "The context frames")
        grey = context.encoded_grey(model, context_latents, vae)
        out = context.with_context_frames(model, context_latents, positions, guidance, grey)
        return io.NodeOutput(out, report_of(model, positions, guidance))


def positions_of(text: str) -> tuple[int, ...]:
    """The frame numbers in the widget's text."""
    parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
    if not parts or not all(re.fullmatch(r"[+-]?\d{1,6}", part) for part in parts):
        raise VideoLDMError(f"'{text}' is no list of frame numbers. Write numbers with commas between them, such as 0, "
                            "1 or 0, -1.")
    return tuple(int(part) for part in parts)


def connected_latents(latent: Latent | None, image: torch.Tensor | None, vae: Vae | None) -> torch.Tensor | None:
    """Latents of the frames that are connected as LATENT or IMAGE. None if neither is."""
    if latent is not None and image is not None:
        raise VideoLDMError("Both a LATENT and an IMAGE of context frames are connected. Keep one of them.")
    if latent is not None:
        return latent["samples"]
    if image is None:
        return None
    if vae is None:
        raise VideoLDMError("An IMAGE of context frames is connected, and no VAE to encode it. Connect the VAE.")
    return vae.encode(check_pictures(image, "The context frames", LARGEST))


def connected_sketches(latent: Latent | None, image: torch.Tensor | None) -> torch.Tensor:
    """The pictures `n 3 h w` from 0 to 1 for a SparseCtrl that sees sketches."""
    if latent is not None:
        raise VideoLDMError("The SparseCtrl on this MODEL sees sketches as pictures, and a LATENT is connected. "
                            "Connect the sketches as IMAGE, at the size of the video. They need no VAE.")
    if image is None:
        raise VideoLDMError("No sketches are connected. Connect them as IMAGE, at the size of the video: white lines "
                            "on black, as scribble preprocessors make them.")
    return check_pictures(image, "The context frames", LARGEST).movedim(-1, 1).clamp(0, 1)


def report_of(model: Model, positions: Sequence[int], guidance: float) -> str:
    numbers = f"Frame{'s' * (len(positions) != 1)} {', '.join(map(str, positions))}"
    seen, sparse = f"{numbers}: {context.way_in(model)}", sparse_control.sparse_settings(model)
    guided = f" Context guidance {guidance:g}." if guidance != 1 else ""
    if picture.way_of_picture(model) is not None:
        return (f"{seen}. Every frame of the clip is made anew, this one too, so it is close to the picture and not "
                f"equal to it.{guided}")
    if sparse is not None:
        return (f"{seen} ({sparse.name}) at every step. The video's own frames there are made anew with the others: "
                f"close to what it sees, and not the same.{guided}")
    if context.takes_context(model):
        trained = "which were" if context.network_with_input(model) is None else "which was"
        return f"{seen}, {trained} trained with context frames.{guided}"
    ignored = " Context guidance does nothing there." if guided else ""
    return (f"{numbers}: held in place by ComfyUI's noise mask, for these temporal layers were not trained with "
            f"context frames.{ignored}")


class ExtendVideo(io.ComfyNode):
    """Video LDM, section 3.2 (docs/papers.md#prediction): the first call has one context frame, the others have the
    last two frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMExtend",
            display_name="Extend Video",
            category="video ldm/sample",
            description="Makes a video of any length, clip after clip. Each clip goes on from the last frames of the "
                        "one before. Starts from a picture, from a video, or from noise. Temporal layers trained with "
                        "context frames take those frames as an input, and so do SEINE's network and SparseCtrl. With "
                        "other layers, such as AnimateDiff's alone, a noise mask holds them. If the conditioning has a "
                        "text, a mask or a ControlNet picture for each frame of the video, every clip gets those of "
                        "its own frames.",
            **search_words("longer", "long video", "continue", "prediction", "autoregressive", "infinite",
                           "image to video", "i2v", "svd"),
            inputs=[
                *sampler_inputs(),
                io.Int.Input("length", default=48, min=2, max=100000,
                             tooltip="Frames of the whole video, including those it starts from."),
                io.Float.Input("context_guidance", default=1.0, min=0.0, max=20.0, step=0.1, round=0.01,
                               tooltip="Context guidance: above 1 each clip keeps more strictly to the frames it goes "
                                       "on from, at one more model call a step. 1 is off."),
                io.Int.Input("overlap", default=OVERLAP, min=1, max=64,
                             tooltip="How many frames each clip takes over from the one before. Two frames show the "
                                     "direction of motion; layers trained with this pack take 2. AnimateDiff often "
                                     "joins better with 4 to 8."),
                io.Combo.Input("on_cancel", options=[STOP, KEEP], default=STOP,
                               tooltip="What Cancel does. Stop: the graph stops, as always. Keep finished clips: the "
                                       "graph goes on with the clips that are finished. The node then says that the "
                                       "video is short, and the next run makes all of it."),
                io.Latent.Input("latent", optional=True, tooltip="The frames to start from, as latents: one picture, "
                                                                 "or a video to go on with."),
                io.Image.Input("image", optional=True, tooltip="The frames to start from, as pictures; needs the VAE."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the pictures. SEINE always needs it: it sees "
                                                           "mid-grey in the frames that are to be made."),
                io.Conditioning.Input("temporal_prompt", optional=True,
                                      tooltip="Another positive text for the temporal layers alone, as on Video LDM "
                                              "Sampler; one, or one for each frame of the video."),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="LATENT", tooltip="All frames, for Temporal VAE Decode, "
                                                                              "VAE Decode or Latent Interpolate x4."),
                io.Float.Output("fps", display_name="fps", tooltip="Frames per second, for Save Video File."),
                io.String.Output("report", display_name="report", tooltip="What was done."),
            ],
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        return unfinished.unfinished_results(inputs)

    @classmethod
    @checked
    def execute(cls, model: Model, positive: Conditioning, negative: Conditioning, frames: int, width: int, height: int,
                seed: int, steps: int, cfg: float, sampler: str, scheduler: str, length: int, context_guidance: float,
                overlap: int, on_cancel: str, latent: Latent | None = None, image: torch.Tensor | None = None,
                vae: Vae | None = None, temporal_prompt: Conditioning | None = None) -> io.NodeOutput:
        sets = require_layers(model)
        context.refuse_interpolation_network(model)
        sparse_control.refuse_pictures(model, "Extend Video")
        check_texts(model, positive, negative, temporal_prompt)
        latents.check_kind(latent, model, "The frames to start from")
        refuse_several_clips(latent)
        start = connected_latents(latent, image, vae)
        calls = plan_calls(length, frames, 0 if start is None else len(start), overlap)
        for known in sorted({call.known for call in calls} - {0}):
            context.check_trained(model, tuple(range(known)))
        fps = fps_of(sets)
        video = empty_video(model, start, length, width, height)
        grey = context.encoded_grey(model, video, vae)
        needs_input = context.samples_with_known_alone(model)
        progress = sampling.RolloutProgress(model, len(calls), steps, fps)
        settings = sampling.SamplerSettings(steps, cfg, sampler, scheduler, positive, negative)
        done = 0 if start is None else len(start)
        try:
            for number, call in enumerate(calls):
                of_clip = frames_of_clip(call.start, frames, length)
                clip_model = model_of(model, frames, temporal_prompt, fps, of_clip)
                if call.known or needs_input:
                    known = video[call.start:call.start + call.known]
                    clip_model = context.with_context_frames(clip_model, known, range(call.known), context_guidance,
                                                             grey)
                clip = sample_clip(clip_model, (frames, *video.shape[1:]), (seed + number) % 2**64,
                                   settings_of(settings, of_clip), progress)
                end = min(call.start + frames, length)
                video[call.start + call.known:end] = clip[call.known:end - call.start]
                done = end
        except sampling.Cancelled:
            if on_cancel == STOP or done == (0 if start is None else len(start)):
                raise
        out = latents.with_frames(latent, model, video[:done], fps, done)
        report = rollout_report(model, calls)
        if done < length:
            short = (f"Cancelled: {done} of {length} frames are finished and kept, and the video is short. Queue it "
                     "again for all frames.")
            unfinished.count_unfinished(cls.hidden)
            notes.warn(short)
            report = f"{report}\n{short}"
        return io.NodeOutput(out, fps, report)


def refuse_several_clips(latent: Latent | None) -> None:
    clips = latents.clips_of(latent, len(latent["samples"])) if latent is not None else 1
    if clips > 1:
        raise VideoLDMError(f"The LATENT to start from holds {clips} clips, and one video is extended at a "
                            "time. Sample one clip, or cut one out with Latent From Batch.")


def empty_video(model: Model, start: torch.Tensor | None, length: int, width: int, height: int) -> torch.Tensor:
    """A tensor for all frames, on the CPU. The frames to start from are in it."""
    if start is None:
        return sampling.empty_latent(model, length, width, height)
    latents.check_frames(start, "The frames to start from")
    latents.check_channels(start, sampling.latent_channels(model), "The frames to start from")
    video = torch.zeros(length, *start.shape[1:])
    video[:len(start)] = start
    return video


def sample_clip(model: Model, shape: tuple[int, ...], seed: int, settings: sampling.SamplerSettings,
                progress: sampling.RolloutProgress) -> torch.Tensor:
    """Sample one clip: latents of this shape."""
    clip = sampling.sample(model, seed, settings, torch.zeros(shape), callback=progress.callback)
    progress.finish(sampling.process_latent_in(model, clip))
    return clip


def rollout_report(model: Model, calls: list) -> str:
    return f"{len(calls)} clips. The frames that each goes on from are {context.way_in(model)}."


NODES = [ContextFrames, ExtendVideo]
