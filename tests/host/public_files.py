"""Small files under the names of public ones, so that the workflows that name them run as they are.

The checkpoint is whole: a UNet of one level, a text encoder of the real size, and the tiny autoencoder that ComfyUI
knows. All weights are random.
"""

import json
from pathlib import Path

import numpy as np
import torch

from video_ldm.temporal.video import write_video
from video_ldm.tests import camera_help, picture_help
from video_ldm.tests.host import checkpoints
from video_ldm.tests.small import randomise

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows" / "api"
SD15, DREAMBOOTH = "v1-5-pruned-emaonly-fp16.safetensors", "DreamShaper_8_pruned.safetensors"
# AnimateLCM's image-to-video layers need a second ResBlock in a level, which the other small checkpoints do not have
DEEP, NEEDS_DEEP = "two_resblocks.safetensors", "AnimateLCM_sd15_i2v.ckpt"
OWN_VIDEO = "your_video.mp4"
TEXT_ENCODER = dict(layers=12, width=768, hidden=3072, tokens=49408, positions=77)


def text_encoder_state(seed: int) -> dict:
    """CLIP-L as checkpoints of Stable Diffusion 1.5 have it, with small random weights."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden = TEXT_ENCODER["width"], TEXT_ENCODER["hidden"]

    def drawn(*shape):
        return torch.randn(*shape, generator=generator) * 0.02

    state = {"embeddings.token_embedding.weight": drawn(TEXT_ENCODER["tokens"], width),
             "embeddings.position_embedding.weight": drawn(TEXT_ENCODER["positions"], width)}
    norms = ["final_layer_norm"]
    for layer in range(TEXT_ENCODER["layers"]):
        block = f"encoder.layers.{layer}"
        norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
        shapes = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        for name, shape in {**shapes, "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}.items():
            state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"] = drawn(*shape), torch.zeros(shape[0])
    for norm in norms:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = torch.ones(width), torch.zeros(width)
    return {f"cond_stage_model.transformer.text_model.{key}": value for key, value in state.items()}


def checkpoint_state(seed: int = 0, unet: dict | None = None) -> dict:
    """A whole checkpoint of Stable Diffusion 1.5, in half precision. unet: the weights of another small UNet."""
    from comfy.taesd.taesd import TAESD
    unet = {f"{checkpoints.UNET_PREFIX}{key.removeprefix(checkpoints.UNET_PREFIX)}": value
            for key, value in (unet or checkpoints.unet_state(seed)).items()}
    vae = {f"first_stage_model.{key}": value for key, value in randomise(TAESD(latent_channels=4)).state_dict().items()}
    return checkpoints.as_type({**unet, **vae, **text_encoder_state(seed)}, torch.float16)


def write_public_files(server) -> None:
    """Put every file that the workflows on Stable Diffusion 1.5 name where the server's loaders find it."""
    half = torch.float16
    for seed, name in enumerate((SD15, DREAMBOOTH)):
        server.save_model("checkpoints", name, checkpoint_state(seed))
    server.save_model("checkpoints", DEEP, checkpoint_state(unet=picture_help.deep_unet_state()))
    torch.save(checkpoints.as_type(picture_help.i2v_state(), half), server.model_path("video_ldm", NEEDS_DEEP))
    motion = checkpoints.as_type(checkpoints.motion_state(), half)
    for name in ("mm_sd15_v2.safetensors", "animatediff_lightning_4step_comfyui.safetensors"):
        server.save_model("video_ldm", name, motion)
    server.save_model("video_ldm", "mm_sd15_v3.safetensors", checkpoints.as_type(camera_help.v3_state(), half))
    camera_help.write_for_unet(server.model_path("video_ldm", "CameraCtrl_pruned.safetensors"), half)
    without_table = {key: value for key, value in motion.items() if not key.endswith(".pe")}
    torch.save(without_table, server.model_path("video_ldm", "AnimateLCM_sd15_t2v.ckpt"))
    torch.save(checkpoints.as_type(picture_help.pia_state(), half), server.model_path("video_ldm", "pia.ckpt"))
    torch.save(checkpoints.motion_lora(), server.model_path("video_ldm", "v2_lora_ZoomIn.ckpt"))
    torch.save(checkpoints.domain_adapter(), server.model_path("loras", "v3_sd15_adapter.ckpt"))
    for name in ("AnimateLCM_sd15_t2v_lora.safetensors", "AnimateLCM_sd15_i2v_lora.safetensors",
                 "PixelArtRedmond15V-PixelArt-PIXARFK.safetensors"):
        server.save_model("loras", name, checkpoints.image_lora())
    torch.save(checkpoints.as_type(checkpoints.musev_state(), half),
               server.model_path("video_ldm", "diffusion_pytorch_model.bin"))
    server.save_model("controlnet", "control_v11p_sd15_canny_fp16.safetensors",
                      checkpoints.as_type(checkpoints.controlnet_state(), half))


def write_own_video(server, width: int = 64, height: int = 48, frames: int = 24) -> None:
    """A video of an artist's own, where workflows look for one: coarse noise at 24 frames a second."""
    shades = np.random.default_rng(1).integers(0, 255, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    write_video(server.input_path(OWN_VIDEO), iter(shades.repeat(8, axis=1).repeat(8, axis=2)), 24, "mp4", 18)


def write_own_picture(server, width: int = 64, height: int = 48) -> None:
    """A picture where workflows that begin with one look for it."""
    shades = torch.rand(height // 8, width // 8, 3, generator=torch.Generator().manual_seed(2))
    server.put_input_image("example.png", shades.repeat_interleave(8, 0).repeat_interleave(8, 1))


def workflow(name: str, size: int = 32, frames: int = 4, steps: int = 2) -> dict:
    """The API form of a workflow with small frames, few of them, and few steps."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    needs_deep = any(node["inputs"].get("file") == NEEDS_DEEP for node in prompt.values())
    for node in prompt.values():
        inputs = node["inputs"]
        if needs_deep and "ckpt_name" in inputs:
            inputs["ckpt_name"] = DEEP
        for key, value in {"steps": steps, "width": size, "height": size, "frames": frames,
                           "frame_count": frames}.items():
            if isinstance(inputs.get(key), int):        # Context Frames has `frames` too, a text of numbers
                inputs[key] = value
    return prompt
