"""PVDM: clips as three planes, and a 2-D U-Net that diffuses them (2302.07685).

    planes.py       the planes of a clip as one row
    autoencoder.py  a clip to planes and back
    attention.py    its layers
    unet.py         the diffusion network
    sampling.py     DDIM, and videos of any length clip by clip
"""

from .autoencoder import RELEASED, Autoencoder, AutoencoderParams
from .planes import PlaneShape, join
from .sampling import SamplerParams, diffusion, roll_out, sample
from .unet import PVDM_L, PVDM_S, PlaneUNet, UNetParams

__all__ = ["PVDM_L", "PVDM_S", "RELEASED", "Autoencoder", "AutoencoderParams", "PlaneShape", "PlaneUNet",
           "SamplerParams", "UNetParams", "diffusion", "join", "roll_out", "sample"]
