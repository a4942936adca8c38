"""A LATENT of frames, with two entries of the pack's own: its frame rate, and the length of its clips.

The clips of a batch follow one another. The LATENT carries the length of a clip and not the number of clips: core's
nodes may cut clips from a batch or repeat it, and the length still holds.
"""

from torch import Tensor

from ...temporal.errors import VideoLDMError

RATE, CLIP_FRAMES = "frame_rate", "clip_frames"     # keys: frames per second; frames of one clip
OF_THE_BATCH = ("noise_mask", "batch_index", CLIP_FRAMES)       # entries that hold for these frames only


def check_frames(frames: Tensor, what: str) -> Tensor:
    """Frames `t c h w` as they are. Raises if another kind of video model made them.

    what: the frames' name in an error sentence, such as "The key frames".
    """
    if frames.ndim != 4:
        raise VideoLDMError(f"{what} have {frames.ndim} dimensions; frames of Stable Diffusion have 4 (frames, "
                            "channels, height, width). They come from another kind of video model.")
    return frames


def check_channels(frames: Tensor, channels: int, what: str) -> Tensor:
    """Frames `t c h w` as they are. Raises if the VAE of another model encoded them. what: as in check_frames."""
    if frames.shape[1] != channels:
        raise VideoLDMError(f"{what} have {frames.shape[1]} latent channels, and this model's have {channels}. Encode "
                            "them with the VAE that belongs to the model.")
    return frames


def clips_of(latent: dict, frames: int) -> int:
    """How many clips a LATENT of `frames` frames holds. A LATENT that was cut within a clip counts as one clip."""
    length = latent.get(CLIP_FRAMES) or frames
    return frames // length if frames and frames % length == 0 else 1


def with_frames(latent: dict | None, samples: Tensor, rate: float, clip_frames: int) -> dict:
    """A LATENT of new frames, made from those of `latent`. It keeps entries that hold for the new frames too."""
    kept = {key: value for key, value in (latent or {}).items() if key not in OF_THE_BATCH}
    return {**kept, "samples": samples, RATE: rate, CLIP_FRAMES: clip_frames}
