"""PVDM: Load PVDM, PVDM Sampler, PVDM Encode, PVDM Decode."""

from typing import Any

import torch

from ..temporal.errors import VideoLDMError
from ..temporal.families import listing, load_pvdm
from ..temporal.formats.temporal_file import dtype_name
from ..temporal.pvdm import SamplerParams
from ..temporal.pvdm.files import AUTOENCODER, DIFFUSION, AutoencoderFile, DiffusionFile, check_pair
from ..temporal.video import DEFAULT_RATE
from .host import files, wiring
from .host import pvdm as host
from .host.api import io
from .host.compat import search_words
from .host.decoded_outputs import IMAGE_SLOT, chosen_rate, pictures_and_video
from .host.inputs import checked
from .host.latents import RATE
from .host.pictures import check_pictures
from .host.pvdm import PlaneDecoding, Pvdm
from .host.sockets import Latent

CATEGORY = "video ldm/pvdm"
DEMO_AUTOENCODER = "video_ldm_driving_pvdm_autoencoder.safetensors"
DEMO_DIFFUSION = "video_ldm_driving_pvdm.safetensors"
MOST_CLIPS, MOST_STEPS, LARGEST_SIDE = 4096, 1000, 16384
IMAGE_TOOLTIP = ("Every frame at once, in memory: width x height x 12 bytes each. Not made unless it is connected.")
VIDEO_TOOLTIP = ("The frames as a stream. They are decoded while Save Video or Save Video File writes them, with one "
                 "clip in memory.")

PvdmType = io.Custom("VIDEO_LDM_PVDM")


def fps_input() -> io.Input:
    return io.Float.Input("fps", default=0.0, min=0.0, max=240.0, step=0.01,
                          tooltip="Frames per second of the VIDEO. 0 takes the rate that the PVDM was trained on, or "
                                  f"that the planes carry, else {DEFAULT_RATE}.")


class LoadPVDM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadPVDM",
            display_name="Load PVDM",
            category=CATEGORY,
            description="Loads a PVDM, a small generator that makes endless video of one kind of footage. It needs no "
                        f"Stable Diffusion model, no text and no VAE. Takes {listing('pvdm')}. A PVDM is two files "
                        "that were trained together.",
            **search_words("unconditional video", "endless video", "projected latent"),
            inputs=[
                io.Combo.Input("autoencoder", **files.loader_list(AUTOENCODER, DEMO_AUTOENCODER),
                               tooltip="The PVDM's autoencoder: a file in models/video_ldm, or a bundled demo file."),
                io.Combo.Input("diffusion", **files.loader_list(DIFFUSION, DEMO_DIFFUSION),
                               tooltip="The PVDM's diffusion model, trained on the planes of that autoencoder. Where "
                                       "there are a model_N.pth and an ema_model_N.pth, choose the second."),
            ],
            outputs=[
                PvdmType.Output("pvdm", display_name="PVDM", tooltip="For PVDM Sampler, PVDM Encode and PVDM Decode."),
                io.String.Output("report", display_name="report", tooltip="What was loaded: size and length of its "
                                                                          "clips, frame rate, licence."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, autoencoder: str, diffusion: str, **kwargs: Any) -> tuple:
        return files.fingerprint(autoencoder), files.fingerprint(diffusion)

    @classmethod
    @checked
    def execute(cls, autoencoder: str, diffusion: str) -> io.NodeOutput:
        paths = [files.resolve(name) for name in (autoencoder, diffusion)]
        first, second = load_pvdm(paths[0], AUTOENCODER), load_pvdm(paths[1], DIFFUSION)
        check_pair(first, second)
        report = report_of(first, second)
        stamps = tuple((path, *files.path_fingerprint(path)) for path in paths)
        loaded = host.load_pvdm(first, second, stamps)
        return io.NodeOutput(loaded, f"{report}\n{computes_in(loaded)}")


def report_of(autoencoder: AutoencoderFile, unet: DiffusionFile) -> str:
    """What the artist should know about a PVDM, one fact a line."""
    params, fps = autoencoder.params, unet.fps or autoencoder.fps
    rate = f" at {fps:g} frames per second" if fps else ""
    row = f"1 x {params.plane_channels} x 1 x {params.shape.length}"
    lines = [f"A clip is {params.frames} frames of {params.width}x{params.height}{rate}; its planes are a LATENT of "
             f"{row}."]
    for file in (autoencoder, unet):
        count = sum(tensor.numel() for tensor in file.tensors.values())
        title = f", {file.about.title}" if file.about.title else ""
        licence = f" Licence: {file.licence}." if file.licence else ""
        lines.append(f"{file.name}: {file.title}{title}, {count / 1e6:.1f} million weights in "
                     f"{dtype_name(file.dtype)}.{licence}")
    if not autoencoder.about.title and not unet.about.title:
        lines.append("The files do not say what they were trained on. PVDM's authors published it for UCF-101 "
                     "(sports) and SkyTimelapse (skies).")
    if not fps:
        lines.append(f"The files do not say how many frames per second their clips have: {DEFAULT_RATE} are taken, or "
                     "what you set.")
    if not unet.params.conditional:
        lines.append("It makes single clips: it has no input for the clip before.")
    return "\n".join([*lines, *autoencoder.notes, *unet.notes])


def computes_in(loaded: Pvdm) -> str:
    return (f"The autoencoder computes in {dtype_name(loaded.autoencoder.dtype)}, the diffusion model in "
            f"{dtype_name(loaded.unet.dtype)}.")


class PVDMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMPVDMSampler",
            display_name="PVDM Sampler",
            category=CATEGORY,
            description="Makes a video clip after clip, of any length: each clip goes on from the one before it. The "
                        "first comes from noise, or goes on from a clip that you connect. Memory does not grow with "
                        "the number of clips, unless IMAGE is connected.",
            **search_words("unconditional video", "endless video", "longer", "infinite"),
            inputs=[
                PvdmType.Input("pvdm", tooltip="From Load PVDM."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Each seed is another video. With the same seed, fewer clips are the beginning of "
                                     "more clips."),
                io.Int.Input("clips", default=4, min=1, max=MOST_CLIPS,
                             tooltip="How many clips to make. The report of Load PVDM says how many frames one has, "
                                     "usually 16."),
                io.Int.Input("steps", default=100, min=1, max=MOST_STEPS,
                             tooltip="Steps of the first clip, when it comes from noise. The authors use 100 to 400. "
                                     "1000 are those of the training."),
                io.Int.Input("following_steps", default=20, min=1, max=MOST_STEPS,
                             tooltip="Steps of each clip that goes on from another. The authors use 20 with a small "
                                     "PVDM, and up to 400."),
                io.Float.Input("eta", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="How much noise each step adds. 1 is what the authors use; 0 adds none. At 1000 "
                                       "steps it is always 1."),
                io.Float.Input("guidance", default=0.0, min=0.0, max=20.0, step=0.1, round=0.01,
                               tooltip="Above 0 a clip keeps more strictly to the clip before it, at one more call of "
                                       "the network a step. 0 is off, as the authors have it."),
                fps_input(),
                io.Image.Input("start_clip", optional=True,
                               tooltip="Frames to go on from, of the size that the PVDM makes. Its last 16 are taken "
                                       "(the length of a clip). The video begins with the new frames: join it to the "
                                       "start clip yourself."),
                io.Latent.Input("start_planes", optional=True,
                                tooltip="Planes of a clip to go on from, such as the planes of an earlier PVDM "
                                        "Sampler. The last clip of them is taken. The video begins with the new "
                                        "frames. Connect this or start_clip, not both."),
            ],
            outputs=[
                io.Image.Output("images", display_name="IMAGE",
                                tooltip=f"{IMAGE_TOOLTIP} Connected later, the video is sampled again."),
                io.Video.Output("video", display_name="VIDEO", tooltip=VIDEO_TOOLTIP),
                io.Latent.Output("planes", display_name="planes",
                                 tooltip="The planes of each clip, for Save Latent, for PVDM Decode, and to go on "
                                         "from."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        return wiring.used_in_running("VideoLDMPVDMSampler", IMAGE_SLOT)

    @classmethod
    @checked
    def execute(cls, pvdm: Pvdm, seed: int, clips: int, steps: int, following_steps: int, eta: float, guidance: float,
                fps: float, start_clip: torch.Tensor | None = None,
                start_planes: Latent | None = None) -> io.NodeOutput:
        refuse_single_clips(pvdm, clips, start_clip is not None or start_planes is not None)
        before = planes_before(pvdm, start_clip, start_planes)
        first, following = SamplerParams(steps, eta), SamplerParams(following_steps, eta, guidance)
        total = (steps if before is None else following_steps) + (clips - 1) * following_steps
        rate = float(chosen_rate(fps, pvdm.fps))
        rows = host.sample_clips(pvdm, seed, clips, first, following, before, host.ClipProgress(pvdm, total, rate))
        decoding = PlaneDecoding(pvdm, rows, "PVDM Sampler")
        return io.NodeOutput(*pictures_and_video(decoding, rate, cls.hidden), host.as_latent(rows, rate))


def refuse_single_clips(pvdm: Pvdm, clips: int, start: bool) -> None:
    """Refuse to go on from a clip with a network that has no input for it."""
    if not pvdm.unet_params.conditional and (clips > 1 or start):
        raise VideoLDMError(f"The diffusion model of {pvdm.name} has no input for the clip before, so it makes single "
                            "clips. Set clips to 1, and connect no start clip.")


def planes_before(pvdm: Pvdm, start_clip: torch.Tensor | None, start_planes: Latent | None) -> torch.Tensor | None:
    """The planes `1 c l` of the clip to go on from. None: there is none."""
    if start_clip is not None and start_planes is not None:
        raise VideoLDMError("PVDM Sampler goes on from a start clip or from planes, and both are connected. Disconnect "
                            "one of them.")
    if start_planes is not None:
        return host.planes_of(pvdm, start_planes)[-1:]
    if start_clip is None:
        return None
    frames = frames_for(pvdm, start_clip, "The frames of the start clip")
    if len(frames) < pvdm.frames:
        raise VideoLDMError(f"The start clip has {counted(len(frames), 'frame')}, and {pvdm.name} goes on from "
                            f"{pvdm.frames}. Connect at least {pvdm.frames} frames.")
    return host.encode_clips(pvdm, frames[-pvdm.frames:])


def frames_for(pvdm: Pvdm, images: torch.Tensor, what: str) -> torch.Tensor:
    """The colours of an IMAGE. Raises for pictures of another size than the PVDM was trained on.

    what: the pictures' name in an error sentence.
    """
    frames = check_pictures(images, what, LARGEST_SIDE, smallest=1)
    height, width = frames.shape[1:3]
    if (width, height) != (pvdm.params.width, pvdm.params.height):
        raise VideoLDMError(f"{what} have {width}x{height} pixels, and {pvdm.name} was trained on {pvdm.size}. Scale "
                            f"the frames to {pvdm.size}, with core's Upscale Image, for one.")
    return frames


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


class PVDMEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMPVDMEncode",
            display_name="PVDM Encode",
            category=CATEGORY,
            description="Turns frames into the planes of a PVDM: three small pictures for a clip. They can be saved, "
                        "mixed and edited as any LATENT, and PVDM Sampler can go on from them.",
            **search_words("video to latent", "planes"),
            inputs=[
                PvdmType.Input("pvdm", tooltip="From Load PVDM."),
                io.Image.Input("images", tooltip="Frames of the size that the PVDM was trained on. Their number must "
                                                 "divide into clips, usually of 16 frames; each is encoded by "
                                                 "itself."),
            ],
            outputs=[
                io.Latent.Output("planes", display_name="planes", tooltip="One row for each clip, values from -1 to "
                                                                          "1."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, pvdm: Pvdm, images: torch.Tensor) -> io.NodeOutput:
        frames = frames_for(pvdm, images, "The frames")
        if len(frames) % pvdm.frames:
            fewer = len(frames) - len(frames) % pvdm.frames
            advice = f"{fewer} or {fewer + pvdm.frames}" if fewer else str(pvdm.frames)
            raise VideoLDMError(f"{counted(len(frames), 'frame')} do not divide into clips of {pvdm.frames}, which "
                                f"{pvdm.name} takes. Connect {advice} frames.")
        rows = host.encode_clips(pvdm, frames, files.progress(len(frames) // pvdm.frames))
        return io.NodeOutput(host.as_latent(rows, pvdm.fps))


class PVDMDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMPVDMDecode",
            display_name="PVDM Decode",
            category=CATEGORY,
            description="Turns planes back into frames, clip by clip: the planes of PVDM Sampler or PVDM Encode, or "
                        "planes that core's LATENT nodes have mixed.",
            **search_words("latent to video", "planes"),
            inputs=[
                PvdmType.Input("pvdm", tooltip="From Load PVDM: the one that made the planes."),
                io.Latent.Input("planes", tooltip="Planes from PVDM Sampler or PVDM Encode. One row is one clip."),
                fps_input(),
            ],
            outputs=[
                io.Image.Output("images", display_name="IMAGE", tooltip=IMAGE_TOOLTIP),
                io.Video.Output("video", display_name="VIDEO", tooltip=VIDEO_TOOLTIP),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        return wiring.used_in_running("VideoLDMPVDMDecode", IMAGE_SLOT)

    @classmethod
    @checked
    def execute(cls, pvdm: Pvdm, planes: Latent, fps: float) -> io.NodeOutput:
        decoding = PlaneDecoding(pvdm, host.planes_of(pvdm, planes), "PVDM Decode")
        rate = chosen_rate(fps, planes.get(RATE), pvdm.fps)
        return io.NodeOutput(*pictures_and_video(decoding, rate, cls.hidden))


NODES = [LoadPVDM, PVDMSampler, PVDMEncode, PVDMDecode]
