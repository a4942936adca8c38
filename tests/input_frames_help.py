"""Small networks that take known frames through their own input, as MODEL, and what the tests do with them.

The file of each kind has the published names. So Load Video Model loads it as an artist's. A test may put another input
for known frames on it: the forms of papers without published weights.
"""

from dataclasses import replace

import comfy.sample
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file

from video_ldm.nodes.host.attach import TemporalLayersWrapper
from video_ldm.nodes.host.options import layer_sets_in, transformer_options, with_clip_options
from video_ldm.nodes.load import LoadVideoModel
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.params import BOTH_ENDS, MASK_LAST, InputFramesParams
from video_ldm.tests.host import checkpoints
from video_ldm.tests.network_help import network_tensors

SIZE = (4, 2, 3)        # of a latent frame
SCALE = 0.18215         # from a LATENT to what the network sees
A4 = InputFramesParams(MASK_LAST, positions=BOTH_ENDS)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """MODELs by name: "seine", "lavie_interpolation", "lavie_base", and "a4": Video LDM's with both ends known."""
    folder = tmp_path_factory.mktemp("networks")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    found = {}
    for kind in ("seine", "lavie_interpolation", "lavie_base"):
        save_file(network_tensors(kind), folder / f"{kind}.safetensors")
        found[kind] = LoadVideoModel.execute(f"{kind}.safetensors").result[0]
    found["a4"] = with_input(found["seine"], A4, frames=5)
    states = {kind: {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
              for kind, model in found.items()}
    yield found
    for kind, model in found.items():
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
        unet = model.model.diffusion_model
        assert all(torch.equal(value, states[kind][key]) for key, value in unet.state_dict().items())


def with_input(model, input_frames, **changes):
    """The same MODEL with another input for known frames, and other changes of its params."""
    m = model.clone()
    options = transformer_options(m)
    options.update({key: replace(layers, params=replace(layers.params, input_frames=input_frames, **changes))
                    for key, layers in layer_sets_in(options).items()})
    return m


class Vae:
    """Stands for a VAE of Stable Diffusion. A picture's latents are its mean colours, and differ by place."""

    decode = first_stage_model = None       # every VAE has them

    def __init__(self):
        self.encoded = []

    def encode(self, pictures):
        self.encoded.append(pictures)
        cells = pictures[..., :3].unfold(1, 8, 8).unfold(2, 8, 8).mean((-2, -1)).movedim(-1, 1)
        place = torch.linspace(-1, 1, cells.shape[2] * cells.shape[3]).view(cells.shape[2:])
        return torch.cat([cells * 3 - 1, cells[:, :1] + place], dim=1)


def grey(size=SIZE):
    """What `Vae` makes of mid-grey, as the network sees it."""
    return SCALE * Vae().encode(torch.full((1, 8 * size[1], 8 * size[2], 3), 0.5))[0]


def frames_of(count, seed=5, size=SIZE):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def text(seed=11):
    return checkpoints.conditioning(seed)


def inputs_of(model):
    """A clone that notes the whole input of its network in every call, and the notes.

    The network itself does not run: its output is zero. So its layers have strength 0.
    """
    m, seen = model.clone(), []

    def network(x, *args, **kwargs):
        seen.append(x.clone())
        return torch.zeros_like(x[:, :4])

    def instead(executor, *args, **kwargs):
        executor.original = network
        return executor(*args, **kwargs)
    keyed = m.wrappers[WrappersMP.DIFFUSION_MODEL]
    m.wrappers = {**m.wrappers, WrappersMP.DIFFUSION_MODEL: {"test": [instead], **keyed}}      # outside of the layers'
    options = transformer_options(m)
    options.update({key: replace(layers, strength=0.0) for key, layers in layer_sets_in(options).items()})
    return m, seen


def sampled(model, frames, clips=1, steps=1, cfg=2.0, seed=7, size=SIZE, per_clip=True, **options):
    """Core's sampling of clips from noise."""
    latent = torch.zeros(clips * frames, *size)
    m = with_clip_options(model, frames) if per_clip else model
    return comfy.sample.sample(m, comfy.sample.prepare_noise(latent, seed), steps, cfg, "euler", "normal", text(),
                               text(12), latent, seed=seed, disable_pbar=True, **options)


# The network and DDIM by hand

def called(model, x, step, condition, frames):
    """The output of the network itself with its layers.

    Args:
        model: the MODEL.
        x: the network's whole input, further channels included.
        step: the number of the diffusion step.
        condition: a CONDITIONING.
        frames: of a clip.
    """
    stack, = (wrapper.stack for found in model.wrappers[WrappersMP.DIFFUSION_MODEL].values() for wrapper in found
              if isinstance(wrapper, TemporalLayersWrapper))
    context = condition[0][0].expand(len(x), -1, -1)
    unet = model.model.diffusion_model
    with torch.no_grad(), open_call(unet, [(stack, CallSettings(frames))], context):
        return unet(x, torch.full((len(x),), float(step)), context)


def ddim(model, noise, further, frames, steps, cfg):
    """Latents by DDIM with eta 0, from this noise: true linear betas 1e-4 to 0.02, steps 1, 1 + 1000 // steps, ...

    further: the further channels of every image.
    """
    kept = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    numbers = list(range(1, 1000, 1000 // steps))[::-1]
    x = (1 - kept[numbers[0]]).sqrt() * noise.double()
    for step, following in zip(numbers, [*numbers[1:], None]):
        signal, spread = kept[step].sqrt(), (1 - kept[step]).sqrt()
        given = torch.cat([x.float(), further], dim=1)
        with_text, without = (called(model, given, step, condition, frames) for condition in (text(), text(12)))
        eps = (without + cfg * (with_text - without)).double()
        x0 = (x - spread * eps) / signal
        x = x0 if following is None else kept[following].sqrt() * x0 + (1 - kept[following]).sqrt() * eps
    return (x / SCALE).float()
