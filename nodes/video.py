"""Video files in and out: Load Video Frames, Save Video File."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..temporal.errors import VideoLDMError
from ..temporal.video import (
    DEFAULT_RATE,
    FORMATS,
    Sheet,
    Sound,
    as_rate,
    open_video,
    read_audio,
    write_sheet,
    write_video,
)
from ..temporal.video.read import VideoFile
from .host import files
from .host.api import InputImpl, io
from .host.inputs import checked
from .host.lazy_video import HeldVideo
from .host.pixels import broken_frames
from .host.sockets import Video
from .host.video_sources import ImageSource, video_source

CATEGORY = "video ldm/video"
NOT_CONNECTED = object()
MOST_FRAMES, MOST_STRIDE = 10**9, 10**6
HIGHEST_FPS, HIGHEST_CRF, LARGEST_SHEET = 240, 63, 64
MEMORY_CHECK = 2**24            # samples of sound that are read between two checks of the free memory
SOUND_FORMATS = ("mp4", "webm")


class LoadVideoFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadVideo",
            display_name="Load Video Frames",
            category=CATEGORY,
            description="Reads frames of a video file (MP4, MOV, MKV, WebM, GIF, animated WebP): all, a range, or "
                        "every n-th. Videos from phones are turned upright, and uneven frame rates are made even.",
            inputs=[
                io.Combo.Input("file", options=files.input_videos(), upload=io.UploadType.video,
                               tooltip="A file in ComfyUI's input folder. Upload takes MP4 and WebM. Put other kinds "
                                       "into the folder by hand."),
                io.Int.Input("start_frame", default=0, min=0, max=MOST_FRAMES,
                             tooltip="The first frame to read; 0 is the video's first."),
                io.Int.Input("frame_count", default=0, min=0, max=MOST_FRAMES,
                             tooltip="How many frames to read; 0 reads to the end. In memory a frame takes width x "
                                     "height x 12 bytes: 100 frames of 512x512 are 0.3 GB."),
                io.Int.Input("stride", default=1, min=1, max=MOST_STRIDE,
                             tooltip="Take every n-th frame. The fps output is divided by it, so motion keeps its "
                                     "speed: a 24 fps video at stride 3 gives 8 fps."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames as one batch, all of them in memory."),
                io.Video.Output(display_name="video", tooltip="The same frames as VIDEO, with their sound."),
                io.Float.Output(display_name="fps", tooltip="Frames per second of these outputs."),
                io.Int.Output(display_name="frame_count", tooltip="How many frames were read."),
                io.String.Output(display_name="report", tooltip="What was read, and what was changed in reading."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, file: str, start_frame: int, frame_count: int, stride: int) -> io.NodeOutput:
        path = files.input_file(file)
        video = open_video(path, files.check_cancelled)
        steps = video.select(start_frame, frame_count, stride)
        files.refuse_beyond_memory(
            len(steps) * video.width * video.height * 12,
            f"{len(steps)} frames of {video.width}x{video.height} from {video.name}",
            "Lower frame_count, raise stride, or scale the video down first.")
        images = torch.from_numpy(video.read(steps, files.progress(len(steps))))
        rate = video.rate / stride
        report = (f"{video.name}: {len(steps)} of {video.frames} frames, {video.width}x{video.height}, "
                  f"{float(rate):g} fps")
        if video.change:
            report += f"; {video.change}"
        return io.NodeOutput(images, _as_video(video, steps, images, rate), float(rate), len(steps), report)

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        if file is None:        # linked: its value is not known yet
            return True
        try:
            path = files.input_file(file)
        except VideoLDMError as error:
            return str(error)
        if not os.path.lexists(path):
            return f"There is no file '{file}' in ComfyUI's input folder. Upload it, or choose another one."
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **settings: Any) -> Any:
        return files.input_fingerprint(file) if file is not None else ""


def _as_video(video: VideoFile, steps: np.ndarray, images: torch.Tensor, rate: Fraction) -> Video:
    """A VIDEO of the frames that were read.

    Where all frames were read unchanged, it is the file itself: saving it then copies the file and encodes nothing.
    """
    if len(steps) == video.frames and video.as_stored:
        return InputImpl.VideoFromFile(str(video.source))
    sound = None
    if video.has_audio:
        sound = read_audio(video, float(int(steps[0]) / video.rate), float(len(steps) / rate), _sound_limit(video.name))
    audio = sound and {"waveform": torch.from_numpy(sound[0])[None], "sample_rate": sound[1]}
    return HeldVideo(images, rate, audio)


def _sound_limit(name: str) -> Callable[[int], None]:
    """A function check(total), called with the number of samples read so far. It raises if memory runs short."""
    checked = 0

    def check(total: int) -> None:
        nonlocal checked
        if total - checked >= MEMORY_CHECK:
            checked = total
            files.check_cancelled()
            # Up to eight channels of four bytes. Joining the pieces holds every sample in memory a second time,
            # and the samples read so far are in memory already.
            files.refuse_beyond_memory(total * 32, f"{total} samples of the sound of {name}", "Lower frame_count.")
    return check


class SaveVideoFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMSaveVideo",
            display_name="Save Video File",
            category=CATEGORY,
            description="Writes frames or a VIDEO to a video file in the output folder, plays it in the node, and puts "
                        "a contact sheet beside it. Drop an MP4, WebM or WebP, or the contact sheet, onto ComfyUI to "
                        "get the workflow back.",
            inputs=[
                io.Image.Input("images", optional=True,
                               tooltip="Frames to save, one batch. Connect these or a video, not both."),
                io.Video.Input("video", optional=True,
                               tooltip="Video to save, with its sound (MP4 and WebM). Files and the pack's own videos "
                                       "are streamed, one frame at a time. Connect this or images, not both."),
                io.String.Input("filename_prefix", default="video/VideoLDM",
                                tooltip="Name in the output folder; folders (video/clip) and %date:yyyy-MM-dd%, "
                                        "%width%, %height% work as in Save Image."),
                io.Combo.Input("format", options=list(FORMATS), default="mp4",
                               tooltip="mp4: H.264, plays everywhere. webm: VP9, smaller and slower. webp: animated "
                                       "picture, lossless at crf 0. gif: 256 colours, at most 50 fps, cannot carry the "
                                       "workflow. webp and gif have no sound, loop forever and need the whole clip in "
                                       "memory as bytes. mp4 and webm need even sides: at an odd side the last row or "
                                       "column is repeated. Nothing is scaled or cropped."),
                io.Float.Input("fps", default=0.0, min=0.0, max=float(HIGHEST_FPS), step=0.01,
                               tooltip="Frames per second. 0 takes the video's own rate. Images have no rate: connect "
                                       "the fps output of the node they come from, or set it here. An unknown rate "
                                       f"becomes {DEFAULT_RATE}."),
                io.Int.Input("crf", default=18, min=0, max=HIGHEST_CRF,
                             tooltip="Quality as constant rate factor. Lower is better and makes larger files; 18 "
                                     "looks like the original. mp4: 1 to 51. webm: 0 to 63. webp: the quality is 100 "
                                     "minus this, and 0 is lossless. gif ignores it."),
                io.Int.Input("contact_sheet", default=16, min=0, max=LARGEST_SHEET,
                             tooltip="How many evenly spaced frames to put on the contact sheet, a PNG beside the "
                                     "video; 0 writes none."),
            ],
            outputs=[
                io.String.Output(display_name="file", tooltip="Full path of the video."),
                io.Image.Output(display_name="contact_sheet",
                                tooltip="The contact sheet; with contact_sheet at 0, the first frame."),
                io.String.Output(display_name="report", tooltip="What was written: size, frames, rate and remarks."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, filename_prefix: str, format: str, fps: float, crf: int, contact_sheet: int,
                images: torch.Tensor | None = None, video: Video | None = None) -> io.NodeOutput:
        problem = _input_problem(images is not None, video is not None)
        if problem:
            raise VideoLDMError(problem)
        source = ImageSource(images) if video is None else video_source(video)
        rate, remarks = _choose_rate(fps, source.rate)
        audio = _choose_audio(source, format, rate, remarks)
        metadata = files.workflow_metadata(cls.hidden)
        sheet = Sheet(max(contact_sheet, 1))
        target = files.output_target(filename_prefix, source.width, source.height)
        ending = FORMATS[format]
        written = write_video(target.path(ending), _added_to(sheet, source.frames()), rate, format, crf, metadata,
                              audio, files.progress(source.count))
        if written.padded:
            remarks.append(f"{source.width}x{source.height} was padded to even sides")
        if source.broken:
            remarks.append(broken_frames(source.broken))
        shown = {"images": [target.result(ending)], "animated": (format != "gif",)}
        picture = sheet.picture()
        if contact_sheet:
            write_sheet(target.path("sheet.png"), picture, metadata)
            shown["contact_sheet"] = [target.result("sheet.png")]
        report = "; ".join([f"{target.stem + ending}: {written.frames} frames, {written.width}x{written.height}, "
                            f"{float(rate):g} fps", *remarks])
        if remarks:
            logging.info("Save Video File: %s", report)
        return io.NodeOutput(str(target.path(ending)), torch.from_numpy(picture)[None] / 255, report, ui=shown)

    @classmethod
    def validate_inputs(cls, filename_prefix: str, images: Any = NOT_CONNECTED,
                        video: Any = NOT_CONNECTED) -> bool | str:
        # ComfyUI passes None for an input that is linked. Checked when the graph is queued, before any sampler runs.
        return _input_problem(images is not NOT_CONNECTED, video is not NOT_CONNECTED) or True


def _input_problem(has_images: bool, has_video: bool) -> str | None:
    if has_images and has_video:
        return "Save Video File takes images or a video, and both are connected. Disconnect one of them."
    if not has_images and not has_video:
        return "Save Video File has nothing to save. Connect images or a video."
    return None


def _choose_rate(fps: float, own: Any) -> tuple[Any, list[str]]:
    """The rate to write, and remarks for the report. own: the rate of the source, None if unknown."""
    if fps > 0:
        return as_rate(fps), []
    if own:
        return as_rate(own), []
    return DEFAULT_RATE, [f"no frame rate was given, so {DEFAULT_RATE} fps is assumed: set fps, or connect it"]


def _choose_audio(source: Any, format: str, rate: Fraction, remarks: list[str]) -> Sound | None:
    """The sound to write, or None. Adds a remark if the source's sound is left out."""
    if source.sound is None or format not in SOUND_FORMATS:
        if source.sound is not None:
            remarks.append(f"{format} has no sound, so it was left out")
        return None
    if abs(float(rate / as_rate(source.rate)) - 1) > 0.001:
        remarks.append(f"its sound was left out, because it belongs to {float(source.rate):g} fps")
        return None
    return source.sound


def _added_to(sheet: Sheet, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for frame in frames:
        sheet.add(frame)
        yield frame


NODES = [LoadVideoFrames, SaveVideoFile]
