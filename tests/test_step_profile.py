"""bench --profile: times are given to the kind of layer that an operation runs in."""

import torch

from video_ldm.benchmarks.step_profile import IMAGE_MODEL, profiled, table
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.tests.small import batch, small_stack, small_unet

FRAMES = 4


@torch.no_grad()
def test_operations_belong_to_the_kind_of_layer_that_they_run_in():
    unet = small_unet()
    stack = small_stack(unet, FRAMES)
    x, timesteps, context, *_ = batch(1, FRAMES)

    def step():
        with open_call(unet, [(stack, CallSettings(FRAMES))], context):
            unet(x, timesteps, context=context)
    times = profiled(step, stack)
    kinds = {type(layer).__name__ for layer in stack.layers.values()}
    assert {part for part, _ in times} == kinds | {IMAGE_MODEL}
    assert all(time >= 0 for time in times.values()) and sum(times.values()) > 0
    # The convolutions over time are in the temporal ResBlocks, and 2-D ones are in the image model alone.
    assert any("conv3d" in operation or "convolution" in operation for part, operation in times
               if part == "TemporalResBlock")
    assert not any("conv2d" in operation for part, operation in times if part != IMAGE_MODEL)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in stack.layers.values())


def test_the_table_has_a_row_for_each_part_with_its_share():
    times = {("A", "mm"): 3000.0, ("A", "add"): 1000.0, (IMAGE_MODEL, "mm"): 12000.0}
    lines = table(times).splitlines()
    assert lines[2] == f"| {IMAGE_MODEL} | 12.0 ms | 75% | mm 12.00 ms |"
    assert lines[3] == "| A | 4.0 ms | 25% | mm 3.00 ms, add 1.00 ms |"
