"""Video and animation files. PyAV and imageio; nothing here knows ComfyUI."""

from .read import VideoFile, open_video, read_audio
from .sheet import Sheet, write_sheet
from .timing import DEFAULT_RATE, as_rate
from .write import FORMATS, Written, metadata_text, write_video

__all__ = ["DEFAULT_RATE", "FORMATS", "Sheet", "VideoFile", "Written", "as_rate", "metadata_text", "open_video",
           "read_audio", "write_sheet", "write_video"]
