"""PVDM's nodes on small random networks, shared by their tests."""


import folder_paths
import pytest
import torch

from video_ldm.nodes import pvdm as nodes
from video_ldm.tests import pvdm_help
from video_ldm.tests.pvdm_help import AUTOENCODER, SINGLE

FRAMES, LENGTH = AUTOENCODER.frames, AUTOENCODER.shape.length


@pytest.fixture(scope="module", autouse=True)
def inference():
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pvdm")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    pvdm_help.write(folder)
    pvdm_help.write(folder, "single", unet_params=SINGLE)
    return folder


def load(name="small"):
    return nodes.LoadPVDM.execute(f"{name}_autoencoder.safetensors", f"{name}.safetensors").result


@pytest.fixture(scope="module")
def pvdm(folder):
    return load()[0]


def sample(pvdm, **changes):
    """(IMAGE, VIDEO, planes) of PVDM Sampler with few steps."""
    widgets = dict(seed=3, clips=2, steps=3, following_steps=2, eta=1.0, guidance=0.0, fps=0.0)
    return nodes.PVDMSampler.execute(pvdm, **{**widgets, **changes}).result


def planes(pvdm, **changes):
    return sample(pvdm, **changes)[2]["samples"]


@pytest.fixture(scope="module")
def three(pvdm):
    """Three clips: IMAGE, VIDEO, planes."""
    return sample(pvdm, clips=3)


def frames(count, seed=0, height=AUTOENCODER.height, width=AUTOENCODER.width):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


class Hidden:
    """`cls.hidden` of a running node, whose VIDEO is connected and whose IMAGE is not."""
    unique_id = "7"
    prompt = {"7": {"class_type": "a node", "inputs": {}},
              "8": {"class_type": "SaveVideo", "inputs": {"video": ["7", 1]}}}
