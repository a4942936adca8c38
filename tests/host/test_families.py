"""Every family of layers for an artist's own checkpoint, beside what artists use with it, in a running ComfyUI.

One table of families, one test for each condition. All files are small, random and in half precision, and each family
is sampled as its report says. What a server on a machine with room cannot be made to do is tested in process: weights
that are loaded in part (test_sparse_model, test_picture_nodes, test_placed_frames, test_attach_weights).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from video_ldm.temporal.families import family as family_module
from video_ldm.tests import picture_help, sparse_help
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import (
    CONTROLNET,
    FRAMES,
    HEIGHT,
    IMAGE,
    MOTION,
    NEGATIVE,
    POSITIVE,
    SECOND,
    WIDTH,
    Graph,
    out,
)
from video_ldm.tests.small import relative_error

LONG = 6                    # frames: two windows of 4 that share 2
STEPS = 2
INPAINTING, SECOND_INPAINTING = "families_inpainting.safetensors", "families_inpainting_2.safetensors"
DEEP, SECOND_DEEP = "families_deep.safetensors", "families_deep_2.safetensors"
PICTURE = "families_first.latent"


@dataclass(frozen=True)
class Family:
    """A file, what it is loaded on, and how it is sampled."""
    file: str
    tensors: Callable[[], dict]
    title: str                                      # what refusals call the file
    models: tuple[str, str] = (IMAGE, SECOND)       # two checkpoints that take it
    first_frame: bool = True                        # whether Context Frames gives it a picture
    lcm: bool = False                               # whether ModelSamplingDiscrete is set to lcm
    widgets: dict = field(default_factory=dict)     # of the sampler

    @property
    def is_sparse(self) -> bool:
        return "sparsectrl" in self.file

    def saved_as(self, precision: str) -> str:
        return f"{precision}_{self.file}"


def without_tables(tensors: dict) -> dict:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".pe")}


def sparse_tensors(kind: str) -> dict:
    return sparse_help.weights(sparse_help.shapes_for_unet(kind), gain=0.3)


FAMILIES = {
    "SparseCtrl": Family("sparsectrl_rgb.safetensors", lambda: sparse_tensors("rgb"),
                         "an AnimateDiff SparseCtrl file"),
    "PIA": Family("pia.safetensors", picture_help.pia_state, "a PIA file"),
    "AnimateLCM-I2V": Family("AnimateLCM_sd15_i2v.safetensors", picture_help.i2v_state,
                             "an AnimateLCM image-to-video file", (DEEP, SECOND_DEEP), lcm=True,
                             widgets={"sampler": "lcm", "cfg": 1.5}),
    "MuseV": Family("musev.safetensors", checkpoints.musev_state, "a MuseV UNet"),
    "makeavid-sd": Family("makeavid.safetensors", checkpoints.makeavid_state, "a makeavid-sd UNet",
                          (INPAINTING, SECOND_INPAINTING)),
    "Lightning as a motion adapter": Family(
        "animatediff_lightning_2step_diffusers.safetensors", checkpoints.motion_adapter,
        "an AnimateDiff motion adapter in diffusers' naming", first_frame=False,
        widgets={"scheduler": "sgm_uniform", "cfg": 1.0}),
    "AnimateLCM": Family("AnimateLCM_sd15_t2v.safetensors", lambda: without_tables(checkpoints.motion_state()),
                         "an AnimateLCM motion module", first_frame=False, lcm=True,
                         widgets={"sampler": "lcm", "cfg": 1.5}),
}
each = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def files(library):
    half = torch.float16
    for family in FAMILIES.values():
        tensors = family.tensors()
        for folder in ("video_ldm", "controlnet") if family.is_sparse else ("video_ldm",):
            library.save_model(folder, family.saved_as("half"), checkpoints.as_type(tensors, half))
            library.save_model(folder, family.saved_as("single"), checkpoints.as_type(tensors, torch.float32))
    for name, seed in ((INPAINTING, 0), (SECOND_INPAINTING, 1)):
        state = checkpoints.unet_state(seed, in_channels=checkpoints.INPAINTING)
        library.save_model("diffusion_models", name, checkpoints.as_type(state, half))
    for name, seed in ((DEEP, 0), (SECOND_DEEP, 1)):
        library.save_model("diffusion_models", name, checkpoints.as_type(picture_help.deep_unet_state(seed), half))
    generator = torch.Generator().manual_seed(3)
    library.put_input_latent(PICTURE, torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=generator))
    library.put_input_image("families_hint.png", torch.rand(HEIGHT, WIDTH, 3, generator=generator))


class Clips(Graph):
    """A graph of clips of one family. `file` is its file in another precision."""

    def __init__(self, name: str, precision: str = "half") -> None:
        super().__init__()
        self.family = FAMILIES[name]
        self.file = self.family.saved_as(precision)

    def image(self, number: int = 0):
        return self.image_model(self.family.models[number])

    def bare(self, image):
        """A video MODEL without what the file does: the layers that SparseCtrl needs, or layers of strength 0."""
        if self.family.is_sparse:
            return self.layers(image, MOTION)
        return self.layers(self.sampling(image), self.file, 0.0)

    def sampling(self, image):
        if not self.family.lcm:
            return image
        return self.add("ModelSamplingDiscrete", model=image, sampling="lcm", zsnr=False)

    def video(self, image):
        """A video MODEL with the family, and with a first frame where it takes one."""
        if self.family.is_sparse:
            model = self.add("VideoLDMLoadSparseCtrl", model=self.layers(image, MOTION), file=self.file, strength=1.0)
        else:
            model = self.layers(self.sampling(image), self.file)
        if not self.family.first_frame:
            return model
        return self.add("VideoLDMContextFrames", model=model, frames="0", guidance=1.0,
                        latent=self.add("LoadLatent", latent=PICTURE))

    def sampled(self, model, *texts, **changes):
        return self.clip(model, *texts, **{"steps": STEPS, **self.family.widgets, **changes})

    def control(self):
        """Both texts with a ControlNet."""
        found = self.add("ControlNetApplyAdvanced", positive=self.text(POSITIVE), negative=self.text(NEGATIVE),
                         control_net=self.add("ControlNetLoader", control_net_name=CONTROLNET), strength=1.0,
                         image=self.add("LoadImage", image="families_hint.png"), start_percent=0.0, end_percent=1.0)
        return found, out(found, 1)


@pytest.fixture(scope="module")
def alone(server):
    """`alone(name)`: a clip of a family on its first checkpoint, in a graph of its own. It is sampled once."""
    clips = {}

    def sampled(name):
        if name not in clips:
            graph = Clips(name)
            clips[name] = server.latent(graph, graph.sampled(graph.video(graph.image()))[0])
        return clips[name]
    return sampled


@each
def test_a_lora_before_or_after_gives_the_same_frames(server, client, alone, name):
    graph = Clips(name)
    image = graph.image()
    before, after = server.latents(graph, [graph.sampled(graph.video(graph.lora(image))),
                                           graph.sampled(graph.lora(graph.video(image)))])
    assert torch.equal(before, after) and relative_error(before, alone(name)) > 1e-3


@each
def test_two_checkpoints_in_one_graph_each_make_the_clip_that_they_make_alone(server, client, alone, name):
    def clips(*numbers):
        graph = Clips(name)
        return server.latents(graph, [graph.sampled(graph.video(graph.image(number))) for number in numbers])
    first, second = clips(0, 1)
    client.free()
    assert torch.equal(first, alone(name)) and torch.equal(second, clips(1)[0])
    assert relative_error(second, first) > 1e-2


@each
def test_windows_of_the_whole_clip_change_nothing_and_shorter_ones_make_a_longer_clip(server, client, alone, name):
    graph = Clips(name)
    video = graph.video(graph.image())
    parts = graph.add("VideoLDMFrameWindows", model=video, mode="windows", length=FRAMES, overlap=2,
                      schedule="static", fuse="pyramid", max_distance=8)
    if name == "MuseV":         # it was never trained without its first frame, which only the first window has
        assert torch.equal(server.latent(graph, graph.sampled(parts)[0]), alone(name))
        long = graph.sampled(parts, frames=LONG)
        with pytest.raises(NodeError, match="context frames are none, .* make a longer video with Extend Video"):
            server.latent(graph, long[0])
        return
    one, long, whole = server.latents(graph, [graph.sampled(parts), graph.sampled(parts, frames=LONG),
                                              graph.sampled(video, frames=LONG)])
    assert torch.equal(one, alone(name))
    assert len(long) == LONG and long.isfinite().all() and relative_error(long, whole) > 1e-3


@each
def test_a_controlnet_and_the_family_both_act(server, client, alone, name):
    graph = Clips(name)
    image = graph.image()
    both, control = server.latents(graph, [graph.sampled(graph.video(image), *graph.control()),
                                           graph.sampled(graph.bare(image), *graph.control())])
    assert both.isfinite().all()
    assert relative_error(both, alone(name)) > 1e-3 and relative_error(both, control) > 1e-3


@each
def test_the_first_of_two_clips_in_a_batch_is_as_alone(server, client, alone, name):
    graph = Clips(name)
    two = server.latent(graph, graph.sampled(graph.video(graph.image()), clips=2)[0])
    assert relative_error(two[:FRAMES], alone(name)) < 1e-4 and relative_error(two[FRAMES:], alone(name)) > 1e-2


@each
def test_a_file_in_half_precision_gives_nearly_the_frames_of_one_in_single_precision(server, client, alone, name):
    """Image models are in half precision in both. A server on the processor computes with them in single precision."""
    graph = Clips(name, "single")
    single = server.latent(graph, graph.sampled(graph.video(graph.image()))[0])
    graph = Clips(name)
    bare = server.latent(graph, graph.sampled(graph.bare(graph.image()))[0])
    assert relative_error(alone(name), single) < 1e-2 < relative_error(alone(name), bare)


@each
def test_the_plain_model_is_the_same_to_the_bit_after_a_clip_and_a_cancelled_one(server, client, alone, name):
    def images(number):
        graph = Graph()         # denoise keeps the node from ComfyUI's cache: core takes this for 1
        return server.latent(graph, graph.ksampler(graph.image_model(FAMILIES[name].models[0]),
                                                   denoise=1 - 1e-5 * number)[0])

    def clip(**changes):
        graph = Clips(name)
        return graph, graph.sampled(graph.video(graph.image()), **changes)[0]
    before = images(0)
    first = server.latent(*clip())
    assert torch.equal(images(1), before) and torch.equal(first, alone(name))
    assert len(server.cancelled(*clip(steps=500))) < 400
    assert torch.equal(images(2), before)
    client.free()
    assert torch.equal(server.latent(*clip()), first)


# The wrong node

LOADERS = {
    "VideoLDMLoadTemporalLayers": lambda graph, file: graph.layers(graph.image_model(), file),
    "VideoLDMLoadVideoModel": lambda graph, file: graph.add("VideoLDMLoadVideoModel", file=file),
    "VideoLDMMotionLoRA": lambda graph, file: graph.add("VideoLDMMotionLoRA", file=file, strength=1.0),
    "VideoLDMLoadSparseCtrl": lambda graph, file: graph.add(
        "VideoLDMLoadSparseCtrl", model=graph.layers(graph.image_model(), MOTION), file=file, strength=1.0),
    "VideoLDMLoadTemporalDecoder": lambda graph, file: graph.add(
        "VideoLDMLoadTemporalDecoder", vae=out(graph.add("VideoLDMLoadDemo"), 2), file=file),
    "VideoLDMSceneLayout": lambda graph, file: graph.add(
        "VideoLDMSceneLayout", file=file, boxes="0.5 0.4 0.2 0.3 red", light="day", crowdedness="any", width=64,
        height=64),
    "VideoLDMCameraMotion": lambda graph, file: graph.add(
        "VideoLDMCameraMotion", model=graph.layers(graph.image_model(), MOTION), file=file, move="still", amount=1.0,
        strength=1.0),
    "VideoLDMLoadPVDM": lambda graph, file: graph.add("VideoLDMLoadPVDM", autoencoder=file, diffusion=file),
}


@each
def test_every_other_loader_refuses_the_file_with_what_it_is_and_where_it_belongs(server, client, name):
    family = FAMILIES[name]
    assert len(LOADERS) == len(family_module.LOADERS)
    right = "VideoLDMLoadSparseCtrl" if family.is_sparse else "VideoLDMLoadTemporalLayers"
    advice = "Load SparseCtrl" if family.is_sparse else "Load Temporal Layers"
    for kind, load in LOADERS.items():
        if kind == right:
            continue
        graph = Graph()
        node = load(graph, family.saved_as("half"))
        graph.add("PreviewAny", source=node)
        with pytest.raises(NodeError) as caught:
            client.run(graph)
        error = caught.value
        assert (error.node_id, error.exception_type) == (node[0], "Video LDM")
        assert error.message.startswith(f"{family.saved_as('half')} is {family.title}") and advice in error.message
