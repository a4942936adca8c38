"""Four times the size: Video Upscale."""

from typing import Any

import torch

from ..temporal.clip_length import check_clip_length
from ..temporal.errors import VideoLDMError
from ..temporal.upscaler import FACTOR, TRAINED_LEVEL, PiecePlan, check_level, plan_pieces
from ..temporal.video import DEFAULT_RATE, is_same_rate
from .host import temporal_vae, upscaling, wiring
from .host.api import io
from .host.camera import refuse_camera
from .host.compat import search_words
from .host.decoded_outputs import IMAGE_SLOT, chosen_rate, pictures_and_video
from .host.decoding import ColoursKept, DecodeSettings, Decoding, FrameSource, Unfolding, check_tile
from .host.free_init import refuse_free_init
from .host.inputs import checked
from .host.made_for import checked_for_video
from .host.options import LayerSet, layer_sets
from .host.pictures import check_pictures
from .host.reuse import refuse_reuse
from .host.sampler_inputs import sampler_inputs
from .host.sampling import SamplerSettings
from .host.sockets import Audio, Conditioning, Model, Vae, Video
from .host.sounds import audio_of

TITLE = "Video Upscale"
LARGEST = 16384     # pixels of a side of a large frame, as of core's widgets


class VideoUpscale(io.ComfyNode):
    """The paper's text-to-video upsampler is the Stable Diffusion x4 upscaler with temporal layers, on 8 frames with a
    noise augmentation of 30 steps (docs/papers.md#upscalers).
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        common = sampler_inputs()
        return io.Schema(
            node_id="VideoLDMUpscale",
            display_name=TITLE,
            category="video ldm/upscale",
            description="Makes a video four times as wide and high with the Stable Diffusion x4 upscaler, or with one "
                        "in pixel space. It works piece by piece, on windows of frames and on tiles, and blends the "
                        "pieces in every step. So a video of any length and size needs the memory of one piece. With "
                        "temporal layers made for the upscaler its frames go together. Without them every frame is "
                        "upscaled by itself.",
            **search_words("upscaler", "super resolution", "x4", "enlarge", "4x", "upscale a video", "resolution"),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of x4-upscaler-ema.safetensors, or an upscaler from Load "
                                                "Video Model. Load Temporal Layers can add temporal layers to it."),
                io.Conditioning.Input("positive", tooltip="What the video shows, encoded by the CLIP of the "
                                                          "upscaler's checkpoint. The prompt of the video is best."),
                io.Conditioning.Input("negative", tooltip="What it should not show, encoded by the same CLIP."),
                io.Int.Input("noise_level", default=30, min=0, max=350,
                             tooltip="Noise on the small frames, in steps of the upscaler's schedule. More lets the "
                                     "upscaler invent more and hides faults of the small frames. The paper used 30, "
                                     "LaVie 50, Upscale-A-Video 120. The highest is 350 for the upscaler alone and "
                                     f"with the layers of these two. For layers trained with this pack it is "
                                     f"{TRAINED_LEVEL}."),
                io.Int.Input("window", default=8, min=1, max=4096,
                             tooltip="Frames that are upscaled together: 8 in the paper. Memory grows with it. "
                                     "Without temporal layers it is the batch and changes nothing else."),
                io.Int.Input("overlap", default=2, min=0, max=4095,
                             tooltip="The least number of frames that neighbouring windows share and fade over. More "
                                     "hides seams better and takes longer. Without temporal layers none are shared."),
                io.Int.Input("tile", default=1024, min=0, max=16384, step=64,
                             tooltip="Size of spatial tiles in pixels of the large frames. 0 upscales whole frames. "
                                     "Neighbouring tiles share a quarter of their size. Lower it if memory runs out; "
                                     "smaller tiles are slower."),
                io.Float.Input("fps", default=0.0, min=0.0, max=240.0, step=0.01,
                               tooltip="Frames per second of the VIDEO. 0 takes the rate of the connected video, else "
                                       f"{DEFAULT_RATE}."),
                *common[6:],
                io.Image.Input("images", optional=True,
                               tooltip="The small frames. Connect these or a video, not both."),
                io.Video.Input("video", optional=True,
                               tooltip="The small frames as a VIDEO. Its sound is kept. Connect this or images, not "
                                       "both."),
                io.Vae.Input("vae", optional=True,
                             tooltip="The VAE of the upscaler's checkpoint, which turns its latents into pictures. "
                                     "The VAE of the video's own model does not fit. None for an upscaler that makes "
                                     "pixels."),
                io.Boolean.Input("keep_colours", default=True, optional=True,
                                 tooltip="Gives every large frame the colours of its small one, area by area. Details "
                                         "stay. Without it the sky or a wall may change its colour. It takes a tenth "
                                         "of a second on the processor for a frame of 2048x1280, and the memory of two "
                                         "large frames."),
            ],
            outputs=[
                io.Image.Output("images_out", display_name="IMAGE",
                                tooltip="Every large frame at once, in memory: width x height x 12 bytes each, 3 GB "
                                        "for 100 frames of 2048x1280. Not made unless it is connected; connected "
                                        "later, the video is upscaled again."),
                io.Video.Output("video_out", display_name="VIDEO",
                                tooltip="The large frames as a stream. They are decoded while Save Video or Save Video "
                                        "File writes them, with one piece in memory."),
                io.String.Output("report", display_name="report",
                                 tooltip="What was upscaled, and how."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        return wiring.used_in_running("VideoLDMUpscale", IMAGE_SLOT)

    @classmethod
    @checked
    def execute(cls, model: Model, positive: Conditioning, negative: Conditioning, noise_level: int, window: int,
                overlap: int, tile: int, fps: float, seed: int, steps: int, cfg: float, sampler: str, scheduler: str,
                images: torch.Tensor | None = None, video: Video | None = None, vae: Vae | None = None,
                keep_colours: bool = True) -> io.NodeOutput:
        sets = layer_sets(model)
        refuse_reuse(model, TITLE)
        refuse_camera(model, TITLE)
        refuse_free_init(model, "Video Upscale", "The small frames already give the video its large shapes.")
        most = upscaling.most_noise(model)
        check_level(noise_level, *trained_levels(most, upscaling.usual_noise(model), sets))
        upscaling.check_conditioning(model, positive, "positive")
        upscaling.check_conditioning(model, negative, "negative")
        upscaling.check_vae(model, vae)
        check_tile(tile)
        small, rate, audio = small_frames(images, video)
        count, height, width = small.shape[:3]
        cuts = plan_pieces(count, height, width, window, overlap if sets else None, tile // FACTOR)
        for layers in sets:
            check_clip_length(layers.params, cuts.largest[0], "the pieces have",
                              "Set window to {limit}, and connect at least as many frames as a clip takes.")
        settings = SamplerSettings(steps, cfg, sampler, scheduler, checked_for_video(positive, count),
                                   checked_for_video(negative, count))
        made = upscaling.upscale(model, small, noise_level, cuts, seed, settings)
        report = report_of(model, small, noise_level, cuts, sets)
        if keep_colours:
            report += "\nColours are kept as the small frames have them."
        large: FrameSource
        if vae is None:
            large = Unfolding(made, TITLE)
        else:
            large = Decoding(vae, made, decode_settings(vae, window, overlap, tile))
        if keep_colours:
            large = ColoursKept(large, small)
        if audio and fps and not is_same_rate(fps, rate):
            audio = None
            report += f"\nIts sound was left out, because it belongs to {float(rate):g} frames per second."
        return io.NodeOutput(*pictures_and_video(large, chosen_rate(fps, rate), cls.hidden, audio), report)


def trained_levels(most: int, usual: int, sets: list[LayerSet]) -> tuple[int, int]:
    """The highest noise level that the upscaler and all its temporal layers were trained on, and the usual one.

    Args:
        most: the highest level of the upscaler.
        usual: the level that the upscaler is meant to be run with.
        sets: the temporal layers on it.
    """
    noise = [layers.noise for layers in sets]
    highest = [known.most if known else TRAINED_LEVEL for known in noise]
    return min([most, *highest]), next((known.usual for known in noise if known), usual)


def small_frames(images: torch.Tensor | None, video: Video | None) -> tuple[torch.Tensor, Any, Audio | None]:
    """The small frames `t h w 3` in 0..1, their frame rate or None if it is unknown, and their sound."""
    if images is not None and video is not None:
        raise VideoLDMError("Video Upscale takes images or a video, and both are connected. Disconnect one of them.")
    if images is None and video is None:
        raise VideoLDMError("Video Upscale has nothing to upscale. Connect images or a video.")
    rate = audio = None
    if video is not None:
        components = video.get_components()
        images, rate, audio = components.images, components.frame_rate, audio_of(video, components)
    if images is None or not len(images):
        raise VideoLDMError("The connected images are an empty batch. Connect at least one frame.")
    return check_pictures(images, "The small frames", LARGEST // FACTOR, smallest=1), rate, audio


def decode_settings(vae: Vae, window: int, overlap: int, tile: int) -> DecodeSettings:
    """How to decode the large latents. A plain VAE decodes frame by frame: the same pictures in less memory."""
    if temporal_vae.is_temporal(vae):
        return DecodeSettings(window, min(overlap, window - 1), tile, 1, TITLE)
    return DecodeSettings(1, 0, tile, 1, TITLE)


def report_of(model: Model, small: torch.Tensor, noise_level: int, cuts: PiecePlan, sets: list[LayerSet]) -> str:
    count, height, width = small.shape[:3]
    frames, tile_height, tile_width = cuts.largest
    tiles = len(cuts.rows) * len(cuts.columns)
    shortest = cuts.frames[-1].stop - cuts.frames[-1].start
    length = f"{frames}" if shortest == frames else f"{shortest} or {frames}"
    lines = [f"{count} frames of {width}x{height} upscaled to {FACTOR * width}x{FACTOR * height}, noise level "
             f"{noise_level}.",
             f"{len(cuts.frames)} windows of {length} frames, each in {tiles} tiles of {FACTOR * tile_width}x"
             f"{FACTOR * tile_height}."]
    if upscaling.makes_pixels(model) and noise_level != upscaling.usual_noise(model):
        lines.append(f"This upscaler was made to be run with noise level {upscaling.usual_noise(model)}.")
    for layers in sets:
        own = layers.params.frames
        trained = "" if own == frames else f", trained on clips of {own} frames"
        further = ", by frame or region as Layer Strength says" if layers.by_frame else ""
        lines.append(f"Temporal layers: {layers.title}, strength {layers.strength:g}{further}{trained}.")
        if layers.noise:
            lines.append(f"{layers.noise.author} used noise level {layers.noise.usual}.")
    if sets:
        lines.append("All frames were made from one noise, as these layers were trained." if
                     upscaling.shares_noise(model) else
                     "Every frame was made from noise of its own.")
    else:
        lines.append("No temporal layers: every frame was upscaled by itself, all from the same noise. Details may "
                     "flicker. Load Temporal Layers takes layers made for this upscaler.")
    return "\n".join(lines)


NODES = [VideoUpscale]
