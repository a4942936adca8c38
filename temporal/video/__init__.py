"""Reading and writing video and animation files, with PyAV and imageio. Nothing here imports ComfyUI."""

from .read import VideoFile, open_video
from .sheet import Sheet, write_sheet
from .sound import LAYOUTS, Sound, file_sound, held_sound, read_audio
from .timing import DEFAULT_RATE, as_rate
from .write import FORMATS, LONGEST_SIDE, Written, metadata_text, write_video

__all__ = ["DEFAULT_RATE", "FORMATS", "LAYOUTS", "LONGEST_SIDE", "Sheet", "Sound", "VideoFile", "Written", "as_rate",
           "file_sound", "held_sound", "metadata_text", "open_video", "read_audio", "write_sheet", "write_video"]
