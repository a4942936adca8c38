"""A VAE with a temporal decoder. It is a new VAE object, and shares no weights with the one it is made from."""

import copy
import hashlib
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from torch import nn

from ...temporal.decoder import DecoderParams, TemporalDecoder
from ...temporal.errors import VideoLDMError
from ...temporal.formats.decoder import DecoderFile
from . import compat
from .sockets import Vae

PICTURE = 64            # pixels along each side of the test picture
LOSS = 4.0              # dB by which a fitting decoder may be worse than the VAE's own on the test picture
GOOD = 20.0             # dB that are good enough, however good the VAE's own decoder is


def build_decoder(params: DecoderParams, dtype: torch.dtype | None = None, device: Any = None) -> TemporalDecoder:
    """ComfyUI's image decoder with temporal layers. Its weights are not initialised."""
    with torch.device(device or "cpu"):
        image = Decoder(**params.config()).to(dtype or torch.float32)
    return TemporalDecoder(image, params.kernel, compat.decoder_operations(), dtype, device)


def with_temporal_decoder(vae: Vae, file: DecoderFile) -> Vae:
    """A VAE that encodes bit for bit as `vae` does, and decodes with the file's decoder."""
    check_vae(vae, file)
    first_stage = compat.own_copy(vae.first_stage_model, vae.vae_dtype)
    decoder = build_decoder(file.params, vae.vae_dtype, "meta")
    # Copies: the tensors of safetensors are views of the file, and Windows cannot replace a file with views.
    decoder.load_state_dict({name: own(tensor, vae.vae_dtype) for name, tensor in file.tensors.items()}, assign=True)
    first_stage.decoder = decoder.requires_grad_(False).eval()
    if hasattr(first_stage, "post_quant_conv"):
        first_stage.post_quant_conv = post_quant_conv(file, vae.vae_dtype)
    made = copy.copy(vae)
    made.first_stage_model = first_stage
    made.patcher = compat.module_patcher(first_stage, vae.patcher)
    made.size = None
    made.model_size()
    return made


def own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to("cpu", dtype, copy=True)


def post_quant_conv(file: DecoderFile, dtype: torch.dtype) -> nn.Module:
    """The convolution before the decoder, as it was in training: Identity if there was none."""
    if not file.post_quant:
        return nn.Identity()
    channels = file.params.latent_channels
    conv = compat.decoder_operations().Conv2d(channels, channels, 1, dtype=dtype)
    conv.load_state_dict({part: own(tensor, dtype) for part, tensor in file.post_quant.items()})
    return conv.requires_grad_(False).eval()


def check_vae(vae: Vae, file: DecoderFile) -> None:
    """Refuse a VAE that is not built like Stable Diffusion's, or that has other latents than the file's."""
    network = getattr(vae, "first_stage_model", None)
    if network is None:
        raise VideoLDMError("The connected VAE is empty: its checkpoint holds none. Connect the VAE of Load VAE.")
    title = title_of(vae)
    if getattr(vae, "latent_dim", 2) != 2:
        raise VideoLDMError(f"The connected VAE ({title}) is one of a video model, which decodes time by itself. "
                            "Connect the VAE of a Stable Diffusion checkpoint.")
    if not all(hasattr(network, part) for part in ("encoder", "decoder")) or not hasattr(network.decoder, "conv_in"):
        raise VideoLDMError(f"The connected VAE ({title}) is not built like Stable Diffusion's, so its decoder cannot "
                            f"be replaced by that of {file.name}. Connect the VAE of a Stable Diffusion checkpoint.")
    file.check_vae(vae.latent_channels, vae.spacial_compression_decode(), title)
    if file.post_quant and not hasattr(network, "post_quant_conv"):
        raise VideoLDMError(f"{file.name} was trained behind the post_quant_conv of a VAE for {file.latents}, and the "
                            f"connected VAE ({title}) has none. Connect the VAE of a Stable Diffusion checkpoint.")


def title_of(vae: Vae) -> str:
    """A VAE's class and latent channels, for messages."""
    return f"{type(vae.first_stage_model).__name__}, {vae.latent_channels} latent channels"


def is_temporal(vae: Vae) -> bool:
    """Whether a VAE decodes the frames of a batch together: one made here, or core's for Stable Video Diffusion."""
    return any(name.endswith("time_mix_conv") for name, _ in vae.first_stage_model.named_modules())


# Does the decoder fit the VAE's latents? Their shape does not say: SDXL's have the shape of Stable Diffusion 1.x's.

_outcomes: dict[tuple, tuple[float, float]] = {}     # results of round_trips, for each pair of VAE and file


def round_trip_warning(vae: Vae, made: Vae, file: DecoderFile, stamp: tuple | None = None) -> str | None:
    """A warning if the new decoder gives a test picture back much worse than the VAE's own. None if it does not.

    Args:
        vae: the VAE with its own decoder.
        made: the VAE with the new decoder.
        file: the new decoder.
        stamp: a value that changes when the file does. With it, the result for a VAE of the same weights is kept.
    """
    if stamp is None or vae.patcher.patches:
        before, after = round_trips(vae, made)
    else:
        key = weights_digest(vae.first_stage_model), vae.vae_dtype, str(vae.device), stamp
        before, after = _outcomes[key] if key in _outcomes else _outcomes.setdefault(key, round_trips(vae, made))
    if after >= min(before - LOSS, GOOD):
        return None
    return (f"{file.name} does not seem to fit the connected VAE: a test picture comes back at {after:.0f} dB from it, "
            f"at {before:.0f} dB from the VAE's own decoder. It was trained for the latents of {file.latents}; those "
            "of SDXL, for one, have the same shape and another meaning.")


def round_trips(vae: Vae, made: Vae) -> tuple[float, float]:
    """PSNR in dB of the test picture after encoding and decoding: with the VAE's own decoder, and with the new one."""
    picture = test_picture(PICTURE)
    latents = vae.encode(picture)
    return psnr(vae.decode(latents), picture), psnr(made.decode(latents), picture)


def weights_digest(network: nn.Module) -> bytes:
    """A hash of a network's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def test_picture(size: int) -> torch.Tensor:
    """A picture (1 h w 3) in 0..1: a sky, a striped ground, and two discs of strong colour."""
    down, across = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    sky = torch.stack([0.45 + 0.3 * down, 0.6 + 0.2 * down, 0.9 - 0.1 * down], -1)
    stripes = 0.35 + 0.1 * torch.sign(torch.sin(40 * across / (down + 0.2)))
    picture = torch.where((down > 0.55)[..., None], stripes[..., None] * torch.tensor([1.0, 0.95, 0.85]), sky)
    for top, left, radius, colour in ((0.3, 0.3, 0.15, (0.85, 0.15, 0.1)), (0.65, 0.7, 0.2, (0.1, 0.5, 0.2))):
        disc = (down - top).square() + (across - left).square() < radius ** 2
        picture = torch.where(disc[..., None], torch.tensor(colour), picture)
    return picture[None]


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> float:
    error = (pictures.detach().float().cpu()[..., :3] - reference).square().mean().clamp_min(1e-10)
    return float(-10 * error.log10())
