"""Loading: temporal layers onto a MODEL, motion LoRA, and the bundled demo models."""

from typing import Any

from ..temporal.clip_length import check_clip_length
from ..temporal.families import listing, load_motion_lora, load_temporal, load_video_model
from ..temporal.families.presets import with_preset
from ..temporal.formats.pixel_upscaler import UpscalerFile
from ..temporal.formats.temporal_file import TemporalFile
from ..temporal.norms import CHOICES, USUAL, with_norms
from ..temporal.slots import unet_sites
from .host import files, models, noise_schedule, placed_frames, upscaler_model, upscaling, video_network
from .host.api import io
from .host.attach import attach_layers
from .host.compat import search_words
from .host.image_model import context_dim, model_title, spatial_unet
from .host.inputs import checked
from .host.layer_weights import build_stack, layer_dtype
from .host.options import LayerSet
from .host.required_layers import refuse_own_layers
from .host.sockets import Model

DEMO_LAYERS, DEMO_UPSCALER = "video_ldm_driving.safetensors", "video_ldm_driving_upscaler.safetensors"
AS_TRAINED, AS_MODEL = "as trained", "the model's own"

MotionLoraType = io.Custom("VIDEO_LDM_MOTION_LORA")


class LoadTemporalLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadTemporalLayers",
            display_name="Load Temporal Layers",
            category="video ldm/load",
            description="Turns the connected Stable Diffusion model into a video model. Temporal layers from a file "
                        f"act on it while it samples; the image model itself stays unchanged. Takes "
                        f"{listing('temporal')}. LoRA, ControlNet and DreamBooth checkpoints combine with it in either "
                        "order.",
            **search_words("animatediff", "animate diff", "motion module", "motion model", "motion adapter",
                           "text to video", "txt2vid", "t2v", "lightning", "pia", "image to video", "i2v"),
            inputs=[
                io.Model.Input("model", tooltip="The image model: a Stable Diffusion checkpoint, with or without LoRA. "
                                                "It is not changed. The output MODEL is the video model."),
                io.Combo.Input("file", **files.loader_list("temporal", DEMO_LAYERS),
                               tooltip="A file in models/video_ldm or models/animatediff_models, or a bundled demo "
                                       "file."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01,
                               tooltip="1 is as trained. 0 is exactly the image model: unrelated frames. Below 1 "
                                       "motion is weaker, above 1 it is stronger."),
                io.Combo.Input("schedule", options=[AS_TRAINED, AS_MODEL], default=AS_TRAINED,
                               tooltip="The noise schedule to sample with. As trained: the betas that these layers "
                                       "were trained on; their motion needs them. A ModelSamplingDiscrete node before "
                                       "or after this one still sets what the MODEL predicts (v, lcm, ...). The "
                                       "model's own: keep the MODEL's betas."),
                MotionLoraType.Input("motion_lora", optional=True,
                                     tooltip="From the Motion LoRA node: camera motions such as zoom or pan."),
                io.Int.Input("frames_per_clip", default=0, min=0, max=4096, optional=True,
                             tooltip="How many frames of a batch make one clip, for core samplers. 0: the whole batch "
                                     "is one clip. Video LDM Sampler sets it by itself."),
                io.Combo.Input("norms", options=list(CHOICES), default=USUAL, optional=True,
                               tooltip="For AnimateDiff, PIA, Hotshot-XL and motion adapters: which frames the norms "
                                       "see. Usual for the file: as its authors' code does it; the report says how. "
                                       "Pooled in the layers: as diffusers does it with all of them. Pooled in the "
                                       "image model: for a motion adapter that was made from AnimateDiff v1."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="The video model, for any sampler."),
                io.String.Output("report", display_name="report", tooltip="What was loaded and how to use it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.fingerprint(file)

    @classmethod
    @checked
    def execute(cls, model: Model, file: str, strength: float, schedule: str, motion_lora: list | None = None,
                frames_per_clip: int = 0, norms: str = USUAL) -> io.NodeOutput:
        path = files.resolve(file)
        unet = spatial_unet(model)
        layers = with_norms(with_preset(load_temporal(path), file), norms)
        channels = {site: count for site, (_, count) in unet_sites(unet).items()}
        layers.check_base(channels, context_dim(model), model_title(model))
        refuse_own_layers(model, layers)
        if layers.params.takes_small_frames:
            upscaling.check_upscaler(model, f"{layers.name} is made for an upscaler and takes its small frames")
        if frames_per_clip:
            check_clip_length(layers.params, frames_per_clip, "frames_per_clip is",
                              "Set frames_per_clip to {limit}, or to 0.")
        loras = motion_lora or []
        # A motion LoRA patches the weights in place, so layers with one are not shared between MODELs.
        shared = None if loras else (path, *files.fingerprint(file), norms)
        stack = build_stack(layers.params, layers.tensors, layer_dtype(model, layers.dtype), shared)
        params = placed_frames.params_on(model, layers.params)
        record = LayerSet(params, layers.title, layers.name, layers.fps, layers.noise, strength)
        pairs = [(lora.fitting(layers.params), lora_strength) for lora, lora_strength in loras]
        out = attach_layers(model, stack, record, pairs, frames_per_clip)
        if schedule == AS_TRAINED:
            trained = layers.schedule
            out = noise_schedule.with_schedule(out, trained.beta_schedule, trained.linear_start, trained.linear_end,
                                               trained.prediction, layers.name)
        replaced = noise_schedule.schedule_wrapper(model) if schedule == AS_TRAINED else None
        return io.NodeOutput(out, report_of(layers, out, schedule, loras, replaced))


def report_of(layers: TemporalFile, model: Model, schedule: str, loras: list,
              replaced: noise_schedule.KeepTrainedBetas | None) -> str:
    """What the artist should know about a set of layers, one fact a line.

    Args:
        layers: the layers' file.
        model: the MODEL with the layers.
        schedule: the widget's value.
        loras: (motion LoRA, strength) of each.
        replaced: the trained schedule that earlier layers had put on the MODEL, if these replaced it.
    """
    lines = [
        f"{layers.name}: {layers.title}, {len(layers.params.bricks)} temporal layers.",
        f"Made for {layers.base.named}; on {model_title(model)}.",
        f"Trained on clips of {layers.params.frames} frames"
        + (f" at {layers.fps:g} frames per second." if layers.fps else "."),
        *noise_schedule.report(model, schedule == AS_TRAINED),
    ]
    current = noise_schedule.schedule_wrapper(model)
    if replaced is not None and current is not None and replaced.trained.words() != current.trained.words():
        lines.append(f"This noise schedule takes the place of that of {replaced.trained.title} "
                     f"({replaced.trained.words()}). Set schedule to the model's own to keep that one.")
    if layers.params.positions:
        lines.append(f"Positions were trained for up to {layers.params.positions} frames.")
    if layers.hint:
        lines.append(layers.hint.sentence())
    lines += [f"Motion LoRA {lora.name} at {strength:g}." for lora, strength in loras]
    if layers.licence:
        lines.append(f"Licence: {layers.licence}.")
    return "\n".join([*lines, *([layers.norms] if layers.norms else []), *layers.notes,
                      *placed_frames.report(layers.params, model)])


class MotionLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMMotionLoRA",
            display_name="Motion LoRA",
            category="video ldm/load",
            description="A LoRA for temporal layers: camera motions such as zoom, pan and roll. Takes "
                        f"{listing('motion_lora')}. Connect it to Load Temporal Layers. Chain several through "
                        "`previous`.",
            **search_words("camera", "zoom", "pan", "tilt", "roll", "motion", "animatediff"),
            inputs=[
                io.Combo.Input("file", **files.loader_list("motion_lora", kind=files.MOTION_LORA),
                               tooltip="A motion LoRA file in models/video_ldm or models/animatediff_motion_lora."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01,
                               tooltip="How much of the motion is added; negative reverses it."),
                MotionLoraType.Input("previous", optional=True, tooltip="Another Motion LoRA to use together with this "
                                                                        "one."),
            ],
            outputs=[MotionLoraType.Output("motion_lora", display_name="motion_lora",
                                           tooltip="For Load Temporal Layers, or for another Motion LoRA.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.fingerprint(file, files.MOTION_LORA)

    @classmethod
    @checked
    def execute(cls, file: str, strength: float, previous: list | None = None) -> io.NodeOutput:
        lora = load_motion_lora(files.resolve(file, files.MOTION_LORA))
        return io.NodeOutput([*(previous or []), (lora, strength)])


class LoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadDemo",
            display_name="Load Demo Models",
            category="video ldm/load",
            description="The plain image model of the tiny bundled cascade, which paints a road with cars. Load "
                        "temporal layers onto it with Load Temporal Layers, as onto a checkpoint of your own.",
            **search_words("demo", "example", "quickstart", "driving", "test model"),
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The image model. On its own it makes images."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="For CLIP Text Encode. It knows the demo's words "
                                                                    "only."),
                io.Vae.Output("vae", display_name="VAE", tooltip="For VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*models.load_demo(files.DEMO_FOLDER))


class LoadVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadVideoModel",
            display_name="Load Video Model",
            category="video ldm/load",
            description="Loads a whole network that is made for video, as a MODEL with its temporal layers. It needs "
                        f"no image checkpoint, only a CLIP and a VAE. Takes {listing('video_model')}. LoRA, ControlNet "
                        "and all samplers take its MODEL as any other. An upscaler's MODEL goes into Video Upscale.",
            **search_words("lavie", "modelscope", "zeroscope", "videocrafter", "seine", "text to video",
                           "picture to video", "img2vid", "i2v", "t2v", "video checkpoint"),
            inputs=[
                io.Combo.Input("file", **files.loader_list("video_model", DEMO_UPSCALER),
                               tooltip="A file in models/video_ldm, or a bundled demo file. Files of temporal layers "
                                       "belong into Load Temporal Layers."),
                io.Float.Input("fps", default=0.0, min=0.0, max=1000.0, step=0.01, optional=True,
                               tooltip="The frame rate of the clips. VideoCrafter 2, and 1 of 1024x576, are told it "
                                       "too: a low one makes fast motion. 0: what the authors use. The report names "
                                       "it."),
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The network. A video network's temporal layers "
                                                                       "act on it already."),
                io.String.Output("report", display_name="report", tooltip="What was loaded and how to use it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.fingerprint(file)

    @classmethod
    @checked
    def execute(cls, file: str, fps: float = 0.0) -> io.NodeOutput:
        path = files.resolve(file)
        loaded = load_video_model(path)
        if isinstance(loaded, UpscalerFile):
            return io.NodeOutput(upscaler_model.load_upscaler(loaded), report_of_upscaler(loaded))
        model = video_network.load_video_network(loaded, fps, (path, *files.fingerprint(file)))
        return io.NodeOutput(model, video_network.report_of(loaded, fps))


def report_of_upscaler(loaded: UpscalerFile) -> str:
    """What the artist should know about an upscaler, one fact a line."""
    params = loaded.params
    lines = [f"{loaded.name}: {params.title}, a video upscaler in pixel space. It needs no VAE.",
             f"Noise levels up to {params.most_noise}; {params.usual_noise} is what it was made to be run with.",
             "Without temporal layers every frame is upscaled by itself. Load Temporal Layers takes layers made "
             "for it."]
    if params.licence:
        lines.append(f"Licence: {params.licence}.")
    return "\n".join(lines)


NODES = [LoadTemporalLayers, MotionLoRA, LoadDemo, LoadVideoModel]
