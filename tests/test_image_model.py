"""What a MODEL is, and whether temporal layers can act on it."""

from types import SimpleNamespace

import pytest
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host.image_model import COMPILED, refuse_compiled
from video_ldm.temporal.errors import VideoLDMError


@pytest.mark.parametrize("wrappers, network, compiled", [
    ({}, SimpleNamespace(), False),
    ({WrappersMP.APPLY_MODEL: {"another": []}}, SimpleNamespace(), False),
    ({WrappersMP.APPLY_MODEL: {COMPILED: []}}, SimpleNamespace(), True),
    ({}, SimpleNamespace(_orig_mod=None), True)])
def test_a_network_is_compiled_by_cores_wrapper_or_by_torch_itself(wrappers, network, compiled):
    model = SimpleNamespace(wrappers=wrappers, get_model_object=lambda name: network)
    if not compiled:
        return refuse_compiled(model)
    with pytest.raises(VideoLDMError, match="compiled by TorchCompileModel"):
        refuse_compiled(model)
