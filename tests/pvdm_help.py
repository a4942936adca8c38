"""Small random PVDMs, their files, and what the node outputs hold."""

from pathlib import Path

import torch

from video_ldm.temporal.pvdm import Autoencoder, AutoencoderParams, PlaneUNet, UNetParams
from video_ldm.temporal.pvdm.files import PREFIX, About, write_autoencoder, write_diffusion
from video_ldm.tests.small import randomise

AUTOENCODER = AutoencoderParams(frames=8, height=16, width=32, patch=8, channels=32, plane_channels=4, depth=1, heads=2,
                                head_width=16, plane_depth=1, plane_heads=4, plane_head_width=4, plane_hidden=48)
UNET = UNetParams(channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,),
                  row=AUTOENCODER.shape.length)
SINGLE = UNetParams(channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,),
                    conditional=False, row=0)
ABOUT = About(fps=8.0, title="small", licence="Apache-2.0", grid=AUTOENCODER.shape)


def autoencoder(params=AUTOENCODER, seed=1) -> Autoencoder:
    return randomise(Autoencoder(params), seed).eval()


def unet(params=UNET, seed=2) -> PlaneUNet:
    """A network with weights small enough that a roll-out stays within its bounds."""
    return randomise(PlaneUNet(params), seed).eval()


def write(folder: Path, name="small", seed=1, about=ABOUT, unet_params=UNET, dtype=torch.float32) -> tuple[str, str]:
    """Write both files of a PVDM, and give their names."""
    files = f"{name}_autoencoder.safetensors", f"{name}.safetensors"
    write_autoencoder(folder / files[0], autoencoder(seed=seed).to(dtype).state_dict(), AUTOENCODER, about)
    write_diffusion(folder / files[1], unet(unet_params, seed + 1).to(dtype).state_dict(), unet_params, about)
    return files


def published(network) -> dict[str, torch.Tensor]:
    """The tensors of a network under the names of its authors' files."""
    prefix = PREFIX if isinstance(network, PlaneUNet) else ""
    return {prefix + name: tensor.clone() for name, tensor in network.state_dict().items()}
