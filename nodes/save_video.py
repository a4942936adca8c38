"""Video files out: Save Video File."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..temporal.errors import VideoLDMError
from ..temporal.video import (
    ANIMATIONS,
    DEFAULT_RATE,
    FORMATS,
    KINDS,
    SEQUENCES,
    Sheet,
    Sound,
    Written,
    as_rate,
    forth_and_back,
    frame_name,
    is_same_rate,
    number_of_frames,
    with_alpha,
    write_sheet,
    write_video,
)
from .host import files
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.pixels import broken_frames
from .host.save_preview import SavePreview
from .host.sockets import Video
from .host.video_sources import ImageSource, Source, sound_of, video_source

NOT_CONNECTED = object()
HIGHEST_FPS, HIGHEST_CRF, LARGEST_SHEET, MOST_PLAYS = 240, 63, 64, 1000
APART = 0.05        # seconds; a smaller difference between the ends of sound and pictures is not worth a remark


class SaveVideoFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMSaveVideo",
            display_name="Save Video File",
            category="video ldm/video",
            description="Writes frames or a VIDEO to a video file in the output folder, plays it in the node, and puts "
                        "a contact sheet beside it: MP4, WebM, WebP, GIF, 10-bit, ProRes or a folder of PNG frames, "
                        "with sound and transparency where the format has them. Drop an MP4, WebM or WebP, or the "
                        "contact sheet, onto ComfyUI to get the workflow back.",
            **search_words("gif", "mp4", "webm", "webp", "video combine", "export video", "save animation",
                           "images to video"),
            inputs=[
                io.Image.Input("images", optional=True,
                               tooltip="Frames to save, one batch. Connect these or a video, not both."),
                io.Video.Input("video", optional=True,
                               tooltip="Video to save, with its sound (MP4, WebM and MOV). Files and the pack's own "
                                       "videos are streamed, one frame at a time. Connect this or images, not both."),
                io.String.Input("filename_prefix", default="video/VideoLDM",
                                tooltip="Name in the output folder; folders (video/clip) and %date:yyyy-MM-dd%, "
                                        "%width%, %height% work as in Save Image."),
                io.Combo.Input("format", options=list(FORMATS), default="mp4",
                               tooltip="mp4: H.264, plays everywhere. webm: VP9, smaller and slower. webp: animated "
                                       "picture, lossless at crf 0. gif: 256 colours, at most 50 fps, cannot carry the "
                                       "workflow. webp and gif have no sound and need the whole clip in memory as "
                                       "bytes. mp4 10-bit (H.264) and webm 10-bit (AV1): finer steps of brightness. "
                                       "mov prores 422 and 4444: for editing programs. png and png 16-bit: a folder "
                                       "with a picture for each frame, no loss. webm, webp, mov prores 4444 and png "
                                       "keep transparency. mp4, webm and mov need even sides: at an odd side the last "
                                       "row or column is repeated. Nothing is scaled or cropped."),
                io.Float.Input("fps", default=0.0, min=0.0, max=float(HIGHEST_FPS), step=0.01,
                               tooltip="Frames per second. 0 takes the video's own rate. Images have no rate: connect "
                                       "the fps output of the node they come from, or set it here. An unknown rate "
                                       f"becomes {DEFAULT_RATE}."),
                io.Int.Input("crf", default=18, min=0, max=HIGHEST_CRF,
                             tooltip="Quality as constant rate factor. Lower is better and makes larger files; 18 "
                                     "looks like the original. mp4: 1 to 51. webm: 0 to 63. webp: the quality is 100 "
                                     "minus this, and 0 is lossless. gif, mov and png ignore it."),
                io.Int.Input("contact_sheet", default=16, min=0, max=LARGEST_SHEET,
                             tooltip="How many evenly spaced frames to put on the contact sheet, a PNG beside the "
                                     "video; 0 writes none."),
                io.Audio.Input("audio", optional=True,
                               tooltip="Sound for the video, in place of a VIDEO's own (MP4, WebM and MOV). It begins "
                                       "with the first frame. Longer sound is cut where the pictures end. Up to 8 "
                                       "channels are kept."),
                io.Int.Input("loop_count", optional=True, default=0, min=0, max=MOST_PLAYS,
                             tooltip="How often a webp or gif plays; 0 is for ever. Other formats ignore it: there the "
                                     "player decides."),
                io.Boolean.Input("ping_pong", optional=True, default=False,
                                 tooltip="Play forth and back: after the last frame come the others in reverse, "
                                         "without the first and last, so that a loop has no held frame. The frames "
                                         "stay in memory: width x height x 3 bytes each (6 for more than 8 bits, a "
                                         "third more with transparency). Sound is left out."),
            ],
            outputs=[
                io.String.Output(display_name="file", tooltip="Full path of the video, or of the folder of pictures."),
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
                images: torch.Tensor | None = None, video: Video | None = None, audio: dict | None = None,
                loop_count: int | None = 0, ping_pong: bool | None = False) -> io.NodeOutput:
        problem = _input_problem(images is not None, video is not None)
        if problem:
            raise VideoLDMError(problem)
        source = ImageSource(images) if video is None else video_source(video)
        rate, remarks = _choose_rate(fps, source.rate)
        remarks += [source.change] if source.change else []
        sound = _choose_sound(source, audio, format, rate, bool(ping_pong), remarks)
        metadata = files.workflow_metadata(cls.hidden)
        sheet = Sheet(max(contact_sheet, 1))
        target = files.output_target(filename_prefix, source.width, source.height)
        ending = FORMATS[format]
        frames, count = _frames(source, format, bool(ping_pong), sheet, remarks)
        if loop_count and format not in ANIMATIONS:
            remarks.append(f"loop_count is for {' and '.join(ANIMATIONS)}, and {format} ignores it")

        with nullcontext() if KINDS[format].pages_play else SavePreview(rate, sound) as player:
            written = write_video(target.path(ending), frames, rate, format, crf, metadata, sound,
                                  files.progress(count), loop_count or 0, player.add if player else None)
        remarks += _remarks_afterwards(source, written)
        picture = sheet.picture()
        shown = _shown(target, player, format)
        if contact_sheet:
            write_sheet(target.path("sheet.png"), picture, metadata)
            shown["contact_sheet"] = [target.result("sheet.png")]
        if written.frames == 1:
            remarks.append("it has one frame, so nothing moves: connect all frames of a clip")
        report = "; ".join([f"{target.stem + ending}: {written.frames} frames, {written.width}x{written.height}, "
                            f"{float(rate):g} fps", *remarks])
        if remarks:
            logging.info("Save Video File: %s", report)
        return io.NodeOutput(str(target.path(ending)), torch.from_numpy(picture)[None] / 255, report, ui=shown)

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None, images: Any = NOT_CONNECTED,
                        video: Any = NOT_CONNECTED) -> bool | str:
        # ComfyUI passes None for an input that is linked. Checked when the graph is queued, before any sampler runs.
        try:
            if isinstance(filename_prefix, str):
                files.check_prefix(filename_prefix)
        except VideoLDMError as error:
            return str(error)
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


def _choose_sound(source: Source, audio: dict | None, format: str, rate: Fraction, ping_pong: bool,
                  remarks: list[str]) -> Sound | None:
    """The sound to write, or None. Adds a remark if sound is left out, cut or too short.

    Args:
        source: what is saved. Its own sound is written if `audio` is None.
        audio: the AUDIO that is connected.
        format: a key of KINDS.
        rate: frames per second to write.
        ping_pong: whether the frames go forth and back.
        remarks: the report's remarks, which grow.
    """
    if audio is None and not source.has_sound:
        return None
    if not KINDS[format].sound:
        remarks.append(f"{format} has no sound, so it was left out")
        return None
    if ping_pong:
        remarks.append("its sound was left out, because the frames go forth and back")
        return None
    if audio is None and not is_same_rate(rate, source.rate):
        remarks.append(f"its sound was left out, because it belongs to {float(source.rate):g} fps")
        return None
    sound = source.sound if audio is None else sound_of(audio)
    if audio is not None:
        remarks += ["the sound has no samples, so the video is silent"] if sound is None else _length_remark(
            audio["waveform"].shape[2] / sound.rate, float(source.count / rate))
    return sound


def _length_remark(heard: float, seen: float) -> list[str]:
    """A remark on sound that is longer or shorter than the pictures. Both in seconds."""
    if heard > seen + APART:
        return [f"the sound of {heard:.2f} s was cut where the pictures end, after {seen:.2f} s"]
    if heard < seen - APART:
        return [f"the sound ends after {heard:.2f} s, and the pictures after {seen:.2f} s"]
    return []


def _frames(source: Source, format: str, ping_pong: bool, sheet: Sheet,
            remarks: list[str]) -> tuple[Iterable[np.ndarray], int]:
    """The frames to write, which the sheet sees, and their number. Adds remarks on what the format loses."""
    kind = KINDS[format]
    if source.alpha and not kind.alpha:
        remarks.append(f"alpha was lost, because {format} has none; {with_alpha()} keep it")
    if source.bits < kind.frame_bits:
        remarks.append(f"the video was read with {source.bits} bits per colour, so {format} has no finer steps")
    alpha = source.alpha and kind.alpha
    frames = _seen_by(sheet.add, source.frames(kind.frame_bits, alpha))
    if not ping_pong:
        return frames, source.count
    size = source.count * source.width * source.height * (4 if alpha else 3) * kind.frame_bits // 8
    files.refuse_beyond_memory(size, f"{source.count} frames of {source.width}x{source.height} forth and back",
                               "Switch ping_pong off, or save fewer frames.")
    return forth_and_back(frames), number_of_frames(source.count)


def _remarks_afterwards(source: Source, written: Written) -> list[str]:
    remarks = []
    if written.padded:
        remarks.append(f"{source.width}x{source.height} was padded to even sides")
    if source.broken:
        remarks.append(broken_frames(source.broken))
    return remarks


def _shown(target: files.Target, preview: SavePreview | None, format: str) -> dict[str, Any]:
    """What the page gets. `files`: what was written, where the page plays a preview in its place."""
    ending = FORMATS[format]
    if preview is None:
        return {"images": [target.result(ending)], "animated": (format != "gif",)}
    saved = target.result_within(ending, frame_name(0)) if format in SEQUENCES else target.result(ending)
    if preview.target is None:
        return {"files": [saved]}
    return {"images": [preview.target.result(".mp4")], "animated": (True,), "files": [saved]}


def _seen_by(look: Callable[[np.ndarray], None], frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for frame in frames:
        look(frame)
        yield frame


NODES = [SaveVideoFile]
