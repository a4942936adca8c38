"""The kinds of files that are written, and what each of them can hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

BT709, BT601 = 1, 6         # FFmpeg's numbers of colour matrices; 6 is SMPTE 170M, BT.601 for 525 lines
Options = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of file. A kind without a codec is an animation of Pillow's or a folder of pictures."""

    ending: str                                 # of the file's name; of a folder's name for a folder of pictures
    bits: int = 8                               # bits per colour that it keeps; frames are made with 8 or with 16
    alpha: bool = False                         # it can keep transparency
    pages_play: bool = True                     # every browser shows it
    sound: str = ""                             # FFmpeg's name of the sound's encoder; "": it has no sound
    codec: str = ""                             # FFmpeg's name of the pictures' encoder
    container: str = ""                         # FFmpeg's name of the container
    pixels: str = ""                            # FFmpeg's name of the format in which pictures are encoded
    alpha_pixels: str = ""                      # the same for pictures with transparency
    matrix: int = BT601                         # how colours become brightness and colour differences
    options: Callable[[int], Options] = field(default=lambda crf: {})       # for the encoder, by the widget's crf
    alpha_options: Mapping[str, str] = field(default_factory=dict)          # more of them, for transparency

    @property
    def frame_bits(self) -> int:
        """Bits per colour of the frames from which it is written."""
        return 8 if self.bits == 8 else 16


def _x264(crf: int) -> Options:
    # With crf 0 x264 uses a lossless profile that browsers do not play, so crf is at least 1. The default look-ahead of
    # 40 frames takes much memory. With 10 frames files are no larger.
    return {"crf": str(min(max(crf, 1), 51)), "preset": "medium", "rc-lookahead": "10"}


def _x264_deep(crf: int) -> Options:
    # swscale puts a colour sample between two pixels. H.264 without this note says that it lies on the left one.
    return {**_x264(crf), "x264-params": "chromaloc=1"}


def _vp9(crf: int) -> Options:
    return {"crf": str(crf), "deadline": "good", "cpu-used": "2", "row-mt": "1"}


def _av1(crf: int) -> Options:
    # Faster presets decide with 8 bits, and err by 2 of 255 where this one errs by 0.2.
    return {"crf": str(max(crf, 1)), "preset": "6"}


def _prores(profile: str) -> Callable[[int], Options]:
    # The name of its maker: some programs take no other ProRes.
    return lambda crf: {"profile": profile, "vendor": "apl0"}


# The 8-bit kinds keep BT.601, because older readers assume it for every file. The others are for editing programs,
# which expect BT.709.
KINDS = {
    "mp4": Kind(".mp4", sound="aac", codec="libx264", container="mp4", pixels="yuv420p", options=_x264),
    "webm": Kind(".webm", alpha=True, sound="libopus", codec="libvpx-vp9", container="webm", pixels="yuv420p",
                 alpha_pixels="yuva420p", options=_vp9, alpha_options={"auto-alt-ref": "0"}),
    "webp": Kind(".webp", alpha=True),
    "gif": Kind(".gif"),
    "mp4 10-bit": Kind(".mp4", 10, pages_play=False, sound="aac", codec="libx264", container="mp4",
                       pixels="yuv420p10le", matrix=BT709, options=_x264_deep),
    "webm 10-bit": Kind(".webm", 10, sound="libopus", codec="libsvtav1", container="webm", pixels="yuv420p10le",
                        matrix=BT709, options=_av1),
    "mov prores 422": Kind(".mov", 10, pages_play=False, sound="pcm_s24le", codec="prores_ks", container="mov",
                           pixels="yuv422p10le", matrix=BT709, options=_prores("hq")),
    "mov prores 4444": Kind(".mov", 10, True, False, "pcm_s24le", "prores_ks", "mov", "yuv444p10le", "yuva444p10le",
                            BT709, _prores("4444"), {"alpha_bits": "16"}),
    "png": Kind("frames", alpha=True, pages_play=False),
    "png 16-bit": Kind("frames", 16, alpha=True, pages_play=False),
}
FORMATS = {name: kind.ending for name, kind in KINDS.items()}       # widget value -> ending of the name
ANIMATIONS, SEQUENCES = ("webp", "gif"), ("png", "png 16-bit")


def with_alpha() -> str:
    """The names of the kinds that keep transparency, for sentences."""
    return ", ".join(name for name, kind in KINDS.items() if kind.alpha)
