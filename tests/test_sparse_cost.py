"""What a step with SparseCtrl computes, counted in operations at the published sizes: 16 frames of 512x512."""

from pathlib import Path

import comfy.ldm.modules.attention as core_attention
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from video_ldm.nodes.host import sparse_control
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.families import sparsectrl
from video_ldm.temporal.formats.files import TensorFile
from video_ldm.temporal.formats.tensor_names import Keys
from video_ldm.temporal.layers import Factory, MotionParams
from video_ldm.temporal.params import StackParams
from video_ldm.temporal.slots import unet_sites
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import PUBLISHED
from video_ldm.tests.small import SD15_SIZE, unet_model

FRAMES = 16


def counted(run) -> int:
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def file_of(kind: str):
    """The published file, without numbers."""
    shapes = {key: tuple(shape) for key, shape in PUBLISHED[f"ad_v3_sd15_sparsectrl_{kind}"].items()}

    def read(keys):
        return {key: torch.empty(shapes[key], device="meta") for key in keys}
    file = TensorFile(Path(f"{kind}.ckpt"), shapes, {}, tuple(shapes), read)
    return sparsectrl.load(file, sparsectrl.detect(Keys(shapes), {}))


@pytest.fixture(scope="module")
def video_step() -> int:
    """Operations of a step of Stable Diffusion 1.5 with AnimateDiff v3's layers, for one condition."""
    unet = unet_model(SD15_SIZE, device="meta")
    bricks = tuple((site, MotionParams(channels, 8)) for site, (_, channels) in unet_sites(unet).items()
                   if site.slot == "post_attn" and site.part != "middle")
    stack = TemporalStack(StackParams("AnimateDiff v3", bricks, FRAMES, 32), Factory(device="meta"))

    def run():
        text = torch.empty(FRAMES, 77, 768)
        with open_call(unet, [(stack, CallSettings(FRAMES))], text):
            unet(torch.empty(FRAMES, 4, 64, 64), torch.empty(FRAMES), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_attention, "optimized_attention", core_attention.attention_pytorch)
        return counted(run)


@pytest.mark.parametrize("kind, seen, share", [("rgb", (5, 64, 64), 0.33), ("scribble", (4, 512, 512), 0.35)])
def test_a_step_computes_about_a_third_more(video_step, monkeypatch, kind, seen, share):
    monkeypatch.setattr(core_attention, "optimized_attention", core_attention.attention_pytorch)
    network = sparse_control.sparse_network(file_of(kind))
    found = counted(lambda: network(torch.empty(FRAMES, *seen), torch.empty(FRAMES), torch.empty(FRAMES, 77, 768),
                                    FRAMES))
    assert found / video_step == pytest.approx(share, abs=0.005)
