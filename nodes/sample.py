"""Sampling clips: Video LDM Sampler. It is core's KSampler with less wiring, and it knows the clips of a batch."""

from ..temporal.errors import VideoLDMError
from .host import context, frame_noise, latents, sampling
from .host.api import io
from .host.compat import search_words
from .host.frame_conditioning import frames_of_batch, temporal_texts
from .host.inputs import checked
from .host.options import with_clip_options
from .host.required_layers import fps_of, require_layers
from .host.sampler_inputs import noise_inputs, sampler_inputs
from .host.sockets import Conditioning, Latent, Model
from .host.texts import check_texts


class VideoLDMSampler(io.ComfyNode):
    """The paper samples text-to-video with DDIM at eta 1, 250 steps and guidance 8 (Video LDM, Table 6;
    docs/papers.md#settings). In core that is euler_ancestral, which takes the same step, with ddim_uniform."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        before = sampler_inputs()
        return io.Schema(
            node_id="VideoLDMSampler",
            display_name="Video LDM Sampler",
            category="video ldm/sample",
            description="Samples clips of video with a model that has temporal layers. The noise is KSampler's for the "
                        "same seed, and each frame has noise of its own, unless another kind is chosen. KSampler and "
                        "SamplerCustomAdvanced work with the same MODEL. This node also makes the latents, counts the "
                        "clips and passes the frame rate on.",
            **search_words("animatediff", "animate", "ksampler", "text to video", "txt2vid", "t2v", "vid2vid",
                           "video to video", "gif"),
            inputs=[
                *before[:6],
                io.Int.Input("clips", default=1, min=1, max=256,
                             tooltip="How many clips to make at once, each with noise of its own. Not used where a "
                                     "latent is connected."),
                *before[6:],
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="1 starts from noise alone; lower keeps more of the connected latent."),
                io.Latent.Input("latent", optional=True,
                                tooltip="Frames to start from: the latents of a video, one frame per batch item."),
                io.Conditioning.Input("temporal_prompt", optional=True,
                                      tooltip="Another positive text for the temporal layers alone: with a DreamBooth "
                                              "checkpoint, the prompt without its special token, encoded by the "
                                              "original CLIP."),
                *noise_inputs(),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="LATENT", tooltip="The frames, for VAE Decode."),
                io.Float.Output("fps", display_name="fps",
                                tooltip="Frames per second that the temporal layers were trained for, for Save Video "
                                        "File."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, positive: Conditioning, negative: Conditioning, frames: int, width: int, height: int,
                clips: int, seed: int, steps: int, cfg: float, sampler: str, scheduler: str, denoise: float,
                latent: Latent | None = None, temporal_prompt: Conditioning | None = None,
                noise: str = frame_noise.OWN, noise_mix: float = 1.0) -> io.NodeOutput:
        sets = require_layers(model)
        context.refuse_interpolation_network(model)
        check_texts(model, positive, negative, temporal_prompt)
        latent = clip_latent(model, latent, frames, clips, width, height, denoise)
        source = frame_noise.frame_noise(seed, noise, noise_mix, model, frames, node="Video LDM Sampler")
        fps = fps_of(sets)
        texts = temporal_texts(temporal_prompt, frames_of_batch(len(latent["samples"]), frames))
        clip_model = with_clip_options(model, frames, texts, fps)
        samples = sampling.ksample(clip_model, seed, steps, cfg, sampler, scheduler, positive, negative, latent,
                                   denoise, source.generate_noise(sampling.with_own_channels(model, latent)))
        return io.NodeOutput({**latent, "samples": samples, latents.RATE: fps, latents.CLIP_FRAMES: frames,
                              latents.KIND: latents.kind_of(model)}, fps)


def clip_latent(model: Model, latent: Latent | None, frames: int, clips: int, width: int, height: int,
                denoise: float) -> dict:
    """The latent to start from. Raises if it does not divide into clips."""
    if latent is None:
        if denoise < 1:
            raise VideoLDMError(f"denoise is {denoise:g}, which keeps part of a latent, and no latent is connected. "
                                "Connect one, or set denoise to 1.")
        return {"samples": sampling.empty_latent(model, clips * frames, width, height)}
    samples = latents.check_frames(latent["samples"], "The connected frames")
    latents.check_kind(latent, model, "The connected frames")
    if samples.count_nonzero():         # core fits an empty latent to the model
        latents.check_channels(samples, sampling.latent_channels(model), "The connected frames")
    if len(samples) % frames:
        raise VideoLDMError(f"The connected latent has {len(samples)} frames, which do not divide into clips of "
                            f"{frames}. Set frames to {len(samples)}, or to a number that divides it.")
    return latent


NODES = [VideoLDMSampler]
