"""A LATENT of frames, with entries of the pack's own: its frame rate, the length of its clips, and its kind.

The clips of a batch follow one another. The LATENT carries the length of a clip and not the number of clips: core's
nodes may cut clips from a batch or repeat it, and the length still holds. The kind tells latents of SDXL from those of
Stable Diffusion 1.x, which have the same shape. A LATENT of core's nodes has none of these entries.
"""

from torch import Tensor

from ...temporal.errors import VideoLDMError
from .image_model import model_title
from .sockets import Model

KIND = "latent_kind"        # key: the kind of latents, as kind_of gives it, or PLANES
PLANES = "PVDM planes"      # the kind of PVDM's planes, which are no frames
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


def check_latents(model: Model, frames: Tensor) -> None:
    """Refuse latents that the MODEL's network cannot take. frames: of a sampling, as any sampler gives them."""
    what = "The latents to sample"
    check_channels(check_frames(frames, what), model.get_model_object("latent_format").latent_channels, what)


def kind_of(model: Model) -> str:
    """The kind of a MODEL's latents: the name of ComfyUI's class for them, as in "SD15"."""
    return type(model.get_model_object("latent_format")).__name__


def check_kind(latent: dict | None, model: Model, what: str) -> None:
    """Refuse a LATENT that is known to be of another kind than the MODEL's. what: as in check_frames."""
    kind = (latent or {}).get(KIND)
    refuse_planes(latent, what)
    if kind is not None and kind != kind_of(model):
        raise VideoLDMError(f"{what} are latents of another kind of model ({kind}), and this MODEL "
                            f"({model_title(model)}) takes those of {kind_of(model)}. Decode them with their own VAE, "
                            "and encode the pictures with the VAE of this MODEL.")


def refuse_planes(latent: dict | None, what: str) -> None:
    """Refuse a LATENT of PVDM's planes. what: as in check_frames."""
    if (latent or {}).get(KIND) == PLANES:
        raise VideoLDMError(f"{what} are planes of a PVDM, which are no latents of an image model. Decode them with "
                            "PVDM Decode, and encode the pictures with the VAE of this model where you need latents.")


def clips_of(latent: dict, frames: int) -> int:
    """How many clips a LATENT of `frames` frames holds. A LATENT that was cut within a clip counts as one clip."""
    length = latent.get(CLIP_FRAMES) or frames
    return frames // length if frames and frames % length == 0 else 1


def with_frames(latent: dict | None, model: Model, samples: Tensor, rate: float, clip_frames: int) -> dict:
    """A LATENT of new frames. It keeps the entries of `latent` that hold for the new frames too.

    Args:
        latent: the LATENT that the frames are made from, if any.
        model: the MODEL that made the frames.
        samples: the frames.
        rate: frames per second.
        clip_frames: frames of one clip.
    """
    kept = {key: value for key, value in (latent or {}).items() if key not in OF_THE_BATCH}
    return {**kept, "samples": samples, RATE: rate, CLIP_FRAMES: clip_frames, KIND: kind_of(model)}
