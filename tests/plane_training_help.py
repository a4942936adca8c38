"""Small networks and frames for the tests of PVDM's trainings."""


import torch

from video_ldm.temporal import pvdm
from video_ldm.temporal.training.discriminator import PatchDiscriminator
from video_ldm.temporal.training.loop import StepContext
from video_ldm.temporal.training.planes import (
    PlaneAutoencoderTerms,
)
from video_ldm.tests.small import randomise

T = 4
SMALL = pvdm.AutoencoderParams(frames=T, height=8, width=8, patch=4, channels=8, plane_channels=2, depth=1, heads=2,
                               head_width=4, plane_depth=1, plane_heads=2, plane_head_width=4, plane_hidden=8)
UNET = pvdm.UNetParams(channels=2, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_levels=(),
                       row=SMALL.shape.length)
NO_JUDGE = PlaneAutoencoderTerms(perceptual=0.0, adversarial=0.0, features=0.0)
PIXELS_ONLY = PlaneAutoencoderTerms(pixels=1.0, perceptual=0.0, adversarial=0.0, features=0.0)


def context(step=0):
    return StepContext.make(step, seed=0)


def autoencoder(seed=0):
    return randomise(pvdm.Autoencoder(SMALL), seed)


def network(seed=1, **more):
    return randomise(pvdm.PlaneUNet(pvdm.UNetParams(**(vars(UNET) | more))), seed)


def judge(dims, seed=2):
    torch.manual_seed(seed)
    return PatchDiscriminator(dims, channels=8, layers=1)


def frames(clips=2, length=T, seed=3):
    return torch.rand(clips, length, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
