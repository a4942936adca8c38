"""Two sets of temporal layers on one network."""

import pytest
import torch

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.layers import MotionParams
from video_ldm.temporal.params import StackParams
from video_ldm.temporal.slots import unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.small import batch, randomise, relative_error, small_unet

FRAMES = 4


def stack_of(unet, pool, seed):
    bricks = tuple((site, MotionParams(attachment.channels, 8)) for site, attachment in unet_sites(unet).items()
                   if site.slot == "post_attn")
    params = StackParams("AnimateDiff", bricks, 16, 32, (POOLED_NORMS,) if pool else ())
    return randomise(TemporalStack(params), seed)


@pytest.mark.parametrize("clips", [3, FRAMES])
@torch.no_grad()
def test_norms_that_two_sets_pool_are_pooled_once(clips):
    """With as many clips as frames a second pooling would mix the clips and say nothing."""
    unet = small_unet()
    x, timesteps, context = batch(clips, FRAMES)
    settings = CallSettings(FRAMES)
    both, one, nothing = ([(stack_of(unet, pool, seed), settings) for seed, pool in enumerate(pools)]
                          for pools in ((True, True), (True, False), (False, False)))
    with open_call(unet, one, context):
        wanted = unet(x, timesteps, context=context)
    with open_call(unet, both, context):
        together = unet(x, timesteps, context=context)
    with open_call(unet, both[:1], context), open_call(unet, both[1:], context):
        nested = unet(x, timesteps, context=context)
    with open_call(unet, nothing, context):
        bare = unet(x, timesteps, context=context)
    assert torch.equal(together, wanted) and torch.equal(nested, wanted)
    assert relative_error(bare, wanted) > 1e-3
