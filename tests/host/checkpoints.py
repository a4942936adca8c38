"""Small random files of every kind that the host tests load, as ComfyUI's stock loaders detect them.

The UNet has the 320 channels and the text width of Stable Diffusion 1.5. It has one level of one ResBlock. There are
temporal layers of both families for it, and the files that an artist combines them with. Every function gives a state
dict or writes one file.
"""

import pickle
from dataclasses import replace

import torch
from safetensors.torch import save_file

from video_ldm.temporal.conditioning import add_context_input
from video_ldm.temporal.families import video_ldm
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.layers import MotionParams, interleaved_sinusoid
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.params import BOTH_ENDS, FIRST_FRAMES, StackParams
from video_ldm.temporal.slots import unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests import frozen_help
from video_ldm.tests.formats_help import adapter_names
from video_ldm.tests.small import SD15, randomise, unet_model

UNET = dict(SD15, model_channels=320, num_res_blocks=[1], channel_mult=(1,), transformer_depth=[1],
            transformer_depth_output=[1, 1])
EMB_DIM, TEXT, HEADS = 1280, 768, 8
FRAMES = 4
INPAINTING = 9          # input channels of an inpainting model
POSITIONS = 32
SCHEDULE = Schedule("linear", 0.00085, 0.012)       # Stable Diffusion's own, evenly spaced in sqrt(beta)
SD1 = Base("Stable Diffusion 1.x", TEXT)
UNET_PREFIX = "model.diffusion_model."


# Image models

def unet_state(seed: int = 0, **changes) -> dict:
    """State dict of a random UNet. `changes` to UNET make models of other kinds."""
    return randomise(unet_model({**UNET, **changes}), seed).state_dict()


def sd2_state() -> dict:
    """Stable Diffusion 2.x: text of width 1024."""
    return unet_state(context_dim=1024, use_linear_in_transformer=True, num_heads=-1, num_head_channels=64)


def sdxl_state() -> dict:
    """The smallest kin of SDXL that ComfyUI detects (Segmind Vega's depths), with zeros for weights."""
    config = dict(UNET, context_dim=2048, use_linear_in_transformer=True, num_heads=-1, num_head_channels=64,
                  adm_in_channels=2816, num_classes="sequential", num_res_blocks=[2, 2, 2], channel_mult=(1, 1, 1),
                  transformer_depth=[0, 0, 1, 1, 2, 2], transformer_depth_middle=-1,
                  transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2])
    shapes = {key: value.shape for key, value in unet_model(config, device="meta").state_dict().items()}
    return {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}


def sd3_state() -> dict:
    """A transformer instead of a UNet: Stable Diffusion 3's, one block of 64 channels."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    model = MMDiT(input_size=None, patch_size=2, in_channels=16, depth=1, out_channels=16, num_patches=64,
                  pos_embed_max_size=8, adm_in_channels=2048, pos_embed_scaling_factor=None,
                  context_embedder_config={"target": "torch.nn.Linear",
                                           "params": {"in_features": 64, "out_features": 64}},
                  dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    return {f"{UNET_PREFIX}{key}": value.clone() for key, value in randomise(model).state_dict().items()}


def as_type(state: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) for key, value in state.items()}


# What is combined with them

def image_lora(seed: int = 3, rank: int = 4) -> dict:
    """A LoRA on the spatial transformers, in the naming that trainers of Stable Diffusion use."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in ((key, value.shape) for key, value in meta_unet().state_dict().items()):
        if key.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "ff.net.2.weight")):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            state[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.1
            state[f"{name}.lora_down.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.1
            state[f"{name}.alpha"] = torch.tensor(float(rank))
    return state


def controlnet_state(seed: int = 4) -> dict:
    import comfy.cldm.cldm
    import comfy.ops
    config = {key: value for key, value in UNET.items() if key not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float32, device="cpu",
                                     operations=comfy.ops.disable_weight_init)
    return {f"control_model.{key}": value for key, value in randomise(net, seed).state_dict().items()}


def conditioning(seed: int, tokens: int = 7, width: int = TEXT) -> list:
    """A CONDITIONING of random text."""
    return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), {}]]


# Temporal layers

def meta_unet():
    return unet_model(UNET, device="meta")


def video_layers(seed: int = 1, mix_length: int = 1) -> TemporalStack:
    """Video LDM layers for UNET."""
    params = video_ldm_params(meta_unet(), EMB_DIM, TEXT, lambda channels: HEADS, FRAMES, mix_length)
    return randomise(TemporalStack(params), seed)


def write_video_layers(path, seed: int = 1, mix_length: int = 1, dtype: torch.dtype = torch.float32):
    stack = video_layers(seed, mix_length).to(dtype)
    video_ldm.write(path, stack, stack.params, schedule=SCHEDULE, base=SD1, fps=4.0)


def write_context_layers(path, positions=FIRST_FRAMES, frames: int = FRAMES, fps_width: int = 0, seed: int = 8,
                         dtype: torch.dtype = torch.float32):
    """Prediction layers for UNET. BOTH_ENDS, 5 frames and TEXT as fps_width make them interpolation layers."""
    params = add_context_input(replace(video_layers().params, frames=frames), 1, positions, channels=16,
                               fps_width=fps_width)
    stack = randomise(TemporalStack(params), seed).to(dtype)
    video_ldm.write(path, stack, params, schedule=SCHEDULE, base=SD1, fps=None if fps_width else 4.0)


def write_interpolation_layers(path, **options):
    write_context_layers(path, BOTH_ENDS, 5, TEXT, **options)


def motion_layers(seed: int = 2, table_length: int = 0, pool: bool = False) -> TemporalStack:
    """AnimateDiff motion modules for UNET."""
    bricks = tuple((site, MotionParams(channels, HEADS, 1, 2, table_length, False))
                   for site, (_, channels) in unet_sites(meta_unet()).items() if site.slot == "post_attn")
    params = StackParams("AnimateDiff v2", bricks, 16, POSITIONS, (POOLED_NORMS,) if pool else ())
    return randomise(TemporalStack(params), seed)


def motion_key(key: str) -> str:
    """The name AnimateDiff's files have for a stack's key: input block 1, middle, outputs 0 and 1 of one level."""
    _, site, suffix = key.split(".", 2)
    part, index = site.split("_")[:2]
    if part == "middle":
        return f"mid_block.motion_modules.0.{suffix}"
    if part == "input":
        return f"down_blocks.0.motion_modules.{int(index) - 1}.{suffix}"
    return f"up_blocks.0.motion_modules.{index}.{suffix}"


def motion_state(seed: int = 2, positions: int = POSITIONS, learned: bool = False) -> dict:
    """A file like AnimateDiff v2's: its tables hold the sinusoid, or, `learned`, something else."""
    stack = motion_layers(seed)
    state = {motion_key(key): value for key, value in stack.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for key in [key for key in state if key.endswith("to_q.weight")]:
        table = interleaved_sinusoid(positions, state[key].shape[1])[None]
        table = torch.randn(table.shape, generator=generator) * 0.1 if learned else table
        state[key.removesuffix("to_q.weight") + "pos_encoder.pe"] = table
    return state


def motion_adapter(**options) -> dict:
    """The same modules as `motion_state` in the naming of diffusers' MotionAdapter."""
    return adapter_names(motion_state(**options))


def domain_adapter(seed: int = 6, rank: int = 4) -> dict:
    """A LoRA on every attention of the image model, in the layout of AnimateDiff v3's domain adapter."""
    from comfy.utils import unet_to_diffusers
    generator, state, shapes = torch.Generator().manual_seed(seed), {}, meta_unet().state_dict()
    for theirs, ours in unet_to_diffusers(UNET).items():
        stem = theirs.removesuffix(".weight").removesuffix(".0")
        if ours in shapes and theirs.endswith(".weight") and ".attn" in theirs and ".to_" in stem:
            name = ".processor.to_".join(stem.rsplit(".to_", 1)) + "_lora"
            rows, columns = shapes[ours].shape
            state[f"{name}.up.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
            state[f"{name}.down.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
    return state


def motion_lora(seed: int = 5, rank: int = 4) -> dict:
    """A Motion LoRA on every attention of the motion modules, AnimateDiff's own layout."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, weight in motion_layers().state_dict().items():
        to = next((to for to in ("q", "k", "v", "out") if key.endswith((f"to_{to}.weight", f"to_{to}.0.weight"))), None)
        if to is not None:
            name = motion_key(key).rsplit(f"to_{to}", 1)[0] + f"processor.to_{to}_lora"
            state[f"{name}.up.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            state[f"{name}.down.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
    return state


def musev_state(seed: int = 6, unet_seed: int = 9) -> dict:
    """A file like MuseV's: a whole UNet whose spatial weights nobody needs, with layers for UNET."""
    unet = randomise(unet_model(UNET), unet_seed)
    stack = randomise(TemporalStack(frozen_help.musev_params(unet)), seed)
    return frozen_help.musev_file(unet, frozen_help.loud(stack))


def makeavid_state(seed: int = 7, unet_seed: int = 9) -> dict:
    """A file like makeavid-sd's: a whole inpainting UNet, with layers for UNET."""
    unet = randomise(unet_model({**UNET, "in_channels": INPAINTING}), unet_seed)
    return frozen_help.makeavid_file(unet, randomise(TemporalStack(frozen_help.makeavid_params(unet)), seed))


# Files that are no temporal layers

def vae_state() -> dict:
    """The names by which a VAE is told."""
    return {f"first_stage_model.{name}": torch.zeros(4) for name in
            ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.mid.block_1.norm1.weight",
             "quant_conv.weight")}


def controlnet_names() -> dict:
    """The names by which a ControlNet is told."""
    return {f"control_model.{name}": torch.zeros(4) for name in
            ("input_hint_block.0.weight", "zero_convs.0.0.weight", "input_blocks.0.0.weight",
             "middle_block_out.0.weight")}


def checkpoint_state() -> dict:
    """The names by which a whole Stable Diffusion checkpoint is told."""
    return {f"{UNET_PREFIX}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
            f"{UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
            f"{UNET_PREFIX}output_blocks.0.0.in_layers.0.weight": torch.zeros(4),
            "first_stage_model.decoder.conv_in.weight": torch.zeros(4),
            "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(4)}


def svd_state() -> dict:
    """The names by which the temporal part of Stable Video Diffusion is told: Video LDM's layout, an image for text."""
    block = "input_blocks.1.1"
    return {f"{block}.time_stack.0.attn1.to_q.weight": torch.zeros(320, 320),
            f"{block}.time_stack.0.attn2.to_k.weight": torch.zeros(320, 1024),
            f"{block}.time_mixer.mix_factor": torch.zeros(1)}


class RunsCode:
    """Unpickles by calling a function, as a malicious checkpoint does."""

    def __reduce__(self):
        return (print, ("this must never run",))


def write_spoilt_files(folder):
    """Files that are no model at all, under names that a model has."""
    (folder / "page.ckpt").write_bytes(b"<!DOCTYPE html>\n<html><body>Log in to download</body></html>")
    (folder / "empty.safetensors").write_bytes(b"")
    write_video_layers(folder / "cut.safetensors", dtype=torch.float16)
    whole = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "callbacks": RunsCode()}, folder / "code.ckpt")
    (folder / "bare.ckpt").write_bytes(pickle.dumps(RunsCode()))


def save(path, state: dict):
    save_file({key: value.contiguous() for key, value in state.items()}, path)
