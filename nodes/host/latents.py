"""What a LATENT of frames is, and what it says beside them: its frame rate, and how long its clips are.

Clips of a batch follow one another. What is stored is a clip's length and not their number, so that it stays true of a
batch from which core's nodes have cut some clips, or which they have repeated.
"""

from torch import Tensor

from ...temporal.errors import VideoLDMError

RATE, CLIP_FRAMES = "frame_rate", "clip_frames"     # frames per second; frames of one clip
OF_THE_BATCH = ("noise_mask", "batch_index", CLIP_FRAMES)       # entries that do not hold for other frames


def check_frames(frames: Tensor, what: str) -> Tensor:
    """Frames `t c h w` as they are; refused where another kind of video model made them. what: "The key frames"."""
    if frames.ndim != 4:
        raise VideoLDMError(f"{what} have {frames.ndim} dimensions; frames of Stable Diffusion have 4 (frames, channels, "
                            "height, width). They come from another kind of video model.")
    return frames


def check_channels(frames: Tensor, channels: int, what: str) -> Tensor:
    """Frames `t c h w` as they are; refused where their VAE belongs to another model. what: "The key frames"."""
    if frames.shape[1] != channels:
        raise VideoLDMError(f"{what} have {frames.shape[1]} latent channels, and this model's have {channels}. Encode "
                            "them with the VAE that belongs to the model.")
    return frames


def clips_of(latent: dict, frames: int) -> int:
    """How many clips a LATENT of so many frames holds; one that was cut within a clip is one clip."""
    length = latent.get(CLIP_FRAMES) or frames
    return frames // length if frames and frames % length == 0 else 1


def with_frames(latent: dict | None, samples: Tensor, rate: float, clip_frames: int) -> dict:
    """A LATENT of other frames that keeps what else was said of those it was made from."""
    kept = {key: value for key, value in (latent or {}).items() if key not in OF_THE_BATCH}
    return {**kept, "samples": samples, RATE: rate, CLIP_FRAMES: clip_frames}
