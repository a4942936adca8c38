"""The frame rate that the samplers tell their layers and hand on."""

import pytest

from video_ldm.nodes.host.options import LayerSet
from video_ldm.nodes.host.required_layers import fps_of
from video_ldm.temporal.params import StackParams

PARAMS = StackParams("Video LDM", (), 16, None)


@pytest.mark.parametrize("rates, fps", [([8, 12], 12), ([12, None], 12), ([None, 10, None], 10), ([None], 8), ([], 8)])
def test_the_frame_rate_is_that_of_the_last_set_of_layers_that_says_one(rates, fps):
    assert fps_of([LayerSet(PARAMS, fps=rate) for rate in rates]) == fps
