"""What a node that loads files says of them is made from FAMILIES: its help page, and the sentence for other files."""

import re
from pathlib import Path

import pytest

from video_ldm.nodes.camera_motion import CameraMotion
from video_ldm.nodes.load import LoadTemporalLayers, LoadVideoModel, MotionLoRA
from video_ldm.nodes.pvdm import LoadPVDM
from video_ldm.nodes.sparse_control import LoadSparseControl
from video_ldm.temporal.families import FAMILIES, LOADERS, listing

PAGES = Path(__file__).resolve().parent.parent / "web" / "docs"
PAGE_OF = {"temporal": "VideoLDMLoadTemporalLayers", "motion_lora": "VideoLDMMotionLoRA",
           "decoder": "VideoLDMLoadTemporalDecoder", "layout": "VideoLDMSceneLayout",
           "video_model": "VideoLDMLoadVideoModel", "pvdm": "VideoLDMLoadPVDM",
           "sparse_control": "VideoLDMLoadSparseCtrl", "camera": "VideoLDMCameraMotion"}


def test_every_family_that_a_node_takes_is_taken_by_one_of_the_loaders():
    assert set(PAGE_OF) == set(LOADERS)
    assert {family.takes for family in FAMILIES} - {None} == set(LOADERS)


@pytest.mark.parametrize("takes", LOADERS)
def test_the_help_page_of_a_loader_lists_every_family_that_it_takes(takes):
    page = re.sub(r"\s+", " ", (PAGES / f"{PAGE_OF[takes]}.md").read_text(encoding="utf-8"))
    assert f"**Takes**: {listing(takes)}." in page


@pytest.mark.parametrize("node, takes", [(LoadTemporalLayers, "temporal"), (MotionLoRA, "motion_lora"),
                                         (LoadVideoModel, "video_model"), (LoadPVDM, "pvdm"),
                                         (LoadSparseControl, "sparse_control"), (CameraMotion, "camera")])
def test_the_description_of_a_loader_lists_every_family_that_it_takes(node, takes):
    assert listing(takes) in node.define_schema().description
