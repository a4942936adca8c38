"""Graphs for the host tests, in the form that ComfyUI's API takes, and the library of small files that they name."""

import torch

from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES

IMAGE, SECOND = "image.safetensors", "second.safetensors"
VIDEO, MOTION = "video.safetensors", "motion.safetensors"
PREDICTION, BETWEEN = "prediction.safetensors", "between.safetensors"
LORA, MOTION_LORA, CONTROLNET = "lora.safetensors", "motion_lora.safetensors", "controlnet.safetensors"
POSITIVE, NEGATIVE, OTHER = "positive", "negative", "other"
WIDTH, HEIGHT = 24, 16          # latents of 2 x 3
AS_TRAINED, AS_MODEL = "as trained", "the model's own"


class Graph(dict):
    """A prompt that grows: `add` gives the first output of the new node, as a link for another node's input."""

    def add(self, class_type, **inputs):
        node = str(len(self) + 1)
        self[node] = {"class_type": class_type, "inputs": inputs}
        return [node, 0]

    # Core's loaders

    def image_model(self, name=IMAGE, weight_dtype="default"):
        return self.add("UNETLoader", unet_name=name, weight_dtype=weight_dtype)

    def text(self, name):
        """CONDITIONING that was saved: text encoders are large, and these tests are about models."""
        node, _ = self.add("LoadTrainingDataset", folder_name=name)
        return [node, 1]

    def lora(self, model, strength=1.0, name=LORA):
        return self.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)

    def empty_latent(self, frames=FRAMES):
        return self.add("EmptyLatentImage", width=WIDTH, height=HEIGHT, batch_size=frames)

    # This pack's nodes

    def layers(self, model, file=VIDEO, strength=1.0, schedule=AS_TRAINED, **optional):
        return self.add("VideoLDMLoadTemporalLayers", model=model, file=file, strength=strength, schedule=schedule,
                        **optional)

    def clip(self, model, positive=None, negative=None, **changes):
        """Video LDM Sampler with few steps. `changes` are other values of its widgets."""
        widgets = dict(frames=FRAMES, width=WIDTH, height=HEIGHT, clips=1, seed=7, steps=2, cfg=2.0, sampler="euler",
                       scheduler="normal", denoise=1.0)
        return self.add("VideoLDMSampler", model=model, positive=positive or self.text(POSITIVE),
                        negative=negative or self.text(NEGATIVE), **{**widgets, **changes})

    # Core's sampler

    def ksampler(self, model, positive=None, negative=None, latent=None, frames=FRAMES, **changes):
        """KSampler with the widgets of `clip`."""
        widgets = dict(seed=7, steps=2, cfg=2.0, sampler_name="euler", scheduler="normal", denoise=1.0)
        return self.add("KSampler", model=model, positive=positive or self.text(POSITIVE),
                        negative=negative or self.text(NEGATIVE), latent_image=latent or self.empty_latent(frames),
                        **{**widgets, **changes})


def write_library(server):
    """Put every file that graphs name where the server's loaders find it."""
    half = torch.float16
    image = checkpoints.unet_state()
    server.save_model("diffusion_models", IMAGE, checkpoints.as_type(image, half))
    server.save_model("diffusion_models", SECOND, checkpoints.as_type(checkpoints.unet_state(seed=1), half))
    server.save_model("loras", LORA, checkpoints.image_lora())
    server.save_model("controlnet", CONTROLNET, checkpoints.as_type(checkpoints.controlnet_state(), half))
    checkpoints.write_video_layers(server.model_path("video_ldm", VIDEO), dtype=half)
    checkpoints.write_context_layers(server.model_path("video_ldm", PREDICTION), dtype=half)
    checkpoints.write_interpolation_layers(server.model_path("video_ldm", BETWEEN), dtype=half)
    server.save_model("video_ldm", MOTION, checkpoints.as_type(checkpoints.motion_state(), half))
    server.save_model("video_ldm", MOTION_LORA, checkpoints.motion_lora())
    for seed, name in enumerate((POSITIVE, NEGATIVE, OTHER), 11):
        write_text(server, name, checkpoints.conditioning(seed))


def write_text(server, name, conditioning):
    """CONDITIONING where LoadTrainingDataset finds it: the output folder, a newer ComfyUI's folder of datasets."""
    for parent in ("output", "datasets"):
        folder = server.base / parent / name
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")         # without it the newer one does not list the folder
        torch.save({"latents": [{"samples": torch.zeros(1, 4, 2, 3)}], "conditioning": [conditioning]},
                   folder / "shard_0000.pkl")


def out(link, slot):
    """Another output of the node of a link."""
    return [link[0], slot]
