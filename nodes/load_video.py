"""Video files in: Load Video Frames."""

import os
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..temporal.errors import VideoLDMError
from ..temporal.video import Sound, file_sound, open_video
from ..temporal.video.read import VideoFile
from ..temporal.video.remarks import interlaced_remark
from .host import files
from .host.api import io
from .host.compat import search_words
from .host.file_video import FileVideo
from .host.input_videos import list_videos
from .host.inputs import checked
from .host.lazy_video import HeldVideo
from .host.range_preview import range_preview
from .host.sockets import Video
from .host.sounds import as_audio

MOST_FRAMES, MOST_STRIDE = 10**9, 10**6
SLOWEST = Fraction(1, 1000)     # frames per second


class LoadVideoFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadVideo",
            display_name="Load Video Frames",
            category="video ldm/video",
            description="Reads frames of a video file (MP4, MOV, MKV, WebM, GIF, animated WebP): all, a range, or "
                        "every n-th. Videos from phones are turned upright, and uneven frame rates are made even.",
            **search_words("load gif", "import video", "video to frames", "video input", "vid2vid", "mp4", "webp"),
            inputs=[
                io.Combo.Input("file", options=list_videos(), upload=io.UploadType.video,
                               tooltip="A file in ComfyUI's input folder or in a folder below it. Upload takes MP4 and "
                                       "WebM. Put other kinds into the folder by hand."),
                io.Int.Input("start_frame", default=0, min=0, max=MOST_FRAMES,
                             tooltip="The first frame to read; 0 is the video's first."),
                io.Int.Input("frame_count", default=0, min=0, max=MOST_FRAMES,
                             tooltip="How many frames to read; 0 reads to the end. In memory a frame takes width x "
                                     "height x 12 bytes: 100 frames of 512x512 are 0.3 GB."),
                io.Int.Input("stride", default=1, min=1, max=MOST_STRIDE,
                             tooltip="Take every n-th frame. The fps output is divided by it, so motion keeps its "
                                     "speed: a 24 fps video at stride 3 gives 8 fps."),
                io.Boolean.Input("deinterlace", default=False, optional=True,
                                 tooltip="Makes whole pictures of interlaced frames (DV, DVD, television), whose lines "
                                         "stand apart where something moves. Other frames stay as they are. The report "
                                         "says if a video is interlaced."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames as one batch, all of them in memory."),
                io.Video.Output(display_name="video", tooltip="The same frames as VIDEO, with their sound."),
                io.Float.Output(display_name="fps", tooltip="Frames per second of these outputs."),
                io.Int.Output(display_name="frame_count", tooltip="How many frames were read."),
                io.String.Output(display_name="report", tooltip="What was read, and what was changed in reading."),
                io.Audio.Output(display_name="audio",
                                tooltip="The sound of these frames, sample by sample, in its channels. Nothing where "
                                        "the file has no sound."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, file: str, start_frame: int, frame_count: int, stride: int,
                deinterlace: bool = False) -> io.NodeOutput:
        path = files.input_file(file)
        video = open_video(path, files.check_cancelled)
        used = min(stride, video.frames)
        steps = video.select(start_frame, frame_count, used)
        rate = _rate(video, used)
        sound = _sound(video, steps, rate)
        files.refuse_beyond_memory(
            len(steps) * video.width * video.height * 12 + (sound.channels * sound.length * 4 if sound else 0),
            f"{len(steps)} frames of {video.width}x{video.height} from {video.name}{' with their sound' * bool(sound)}",
            "Lower frame_count, raise stride, or scale the video down first.")
        interlaced: list[int] = []
        images = torch.from_numpy(video.read(steps, files.progress(len(steps)), interlaced, deinterlace))
        audio = as_audio(sound)
        remarks = [_stride_remark(stride, used), video.change,
                   interlaced_remark(len(interlaced), len(steps), deinterlace)]
        report = "; ".join([f"{video.name}: {len(steps)} of {video.frames} frames, {video.width}x{video.height}, "
                            f"{float(rate):g} fps", *filter(None, remarks)])
        if len(steps) == video.frames and video.as_stored and not (deinterlace and interlaced):
            # Saving this VIDEO copies the file and encodes nothing.
            made: Video = FileVideo(str(video.source), images, rate, audio)
        else:
            made = HeldVideo(images, rate, audio)
        return io.NodeOutput(images, made, float(rate), len(steps), report, audio, ui=range_preview(images, rate))

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


def _rate(video: VideoFile, stride: int) -> Fraction:
    """Frames per second of every n-th frame. Raises VideoLDMError where a frame would last too long to be saved."""
    rate = video.rate / stride
    if rate < SLOWEST:
        raise VideoLDMError(f"{video.name}: with stride {stride} a frame lasts {float(1 / rate):.0f} seconds, and "
                            f"{float(1 / SLOWEST):.0f} are the most. Lower stride.")
    return rate


def _stride_remark(stride: int, used: int) -> str:
    return f"stride {stride} counted as {used}, because the video has no more frames" if used < stride else ""


def _sound(video: VideoFile, steps: np.ndarray, rate: Fraction) -> Sound | None:
    """The sound that is heard during the chosen frames. It lasts as long as they do at their own rate."""
    return file_sound(video, int(steps[0]) / video.rate, len(steps) / rate) if video.has_audio else None


NODES = [LoadVideoFrames]
