"""Reading and writing video and animation files, with PyAV and imageio. Nothing here imports ComfyUI."""

from .encode import preview_video
from .kinds import ANIMATIONS, FORMATS, KINDS, SEQUENCES, with_alpha
from .ping_pong import forth_and_back, number_of_frames
from .read import VideoFile, open_video
from .sequence import frame_name
from .sheet import Sheet, write_sheet
from .sound import LAYOUTS, Sound, check_sound_rate, file_sound, held_sound, read_audio, samples_of
from .texts import metadata_text
from .timing import DEFAULT_RATE, as_rate, is_same_rate
from .write import LONGEST_SIDE, Written, write_video

__all__ = ["ANIMATIONS", "DEFAULT_RATE", "FORMATS", "KINDS", "LAYOUTS", "LONGEST_SIDE", "SEQUENCES", "Sheet", "Sound",
           "VideoFile", "Written", "as_rate", "check_sound_rate", "file_sound", "forth_and_back", "frame_name",
           "held_sound", "is_same_rate", "metadata_text", "number_of_frames", "open_video", "preview_video",
           "read_audio", "samples_of", "with_alpha", "write_sheet", "write_video"]
