"""Latents to pixels: Load Temporal Decoder, Temporal VAE Decode."""

from typing import Any

from ..temporal.families import load_decoder
from ..temporal.formats.decoder import DecoderFile
from ..temporal.video import DEFAULT_RATE
from .host import files, notes, temporal_vae, wiring
from .host.api import io
from .host.compat import search_words
from .host.decoded_outputs import IMAGE_SLOT, chosen_rate, pictures_and_video
from .host.decoding import DecodeSettings, Decoding
from .host.inputs import checked
from .host.latents import RATE, clips_of, refuse_planes
from .host.sockets import Audio, Latent, Vae


class LoadTemporalDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadTemporalDecoder",
            display_name="Load Temporal Decoder",
            category="video ldm/load",
            description="Gives a VAE a decoder that looks at neighbouring frames, so that a clip does not flicker. "
                        "Takes the decoder of Stable Video Diffusion, for the latents of Stable Diffusion 1.x and "
                        "2.x, or one trained with this pack. The input VAE is not changed, and encoding stays the "
                        "same bit for bit.",
            **search_words("svd", "flicker", "deflicker", "stable video diffusion", "video vae"),
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of your checkpoint. The output VAE encodes as this one does, and "
                                            "decodes with the file's decoder."),
                io.Combo.Input("file", **files.decoder_list(),
                               tooltip="A temporal decoder: svd.safetensors or svd_xt.safetensors in "
                                       "models/checkpoints, the VAE of one of them in models/vae, or a file in "
                                       "models/video_ldm. Of checkpoints only those with svd in their name are "
                                       "listed."),
            ],
            outputs=[
                io.Vae.Output("vae_out", display_name="VAE", tooltip="For Temporal VAE Decode. Core's VAE Decode takes "
                                                                     "it too, with seams where memory is short."),
                io.String.Output("report", display_name="report", tooltip="What was loaded, and a warning if the "
                                                                          "decoder does not seem to fit the VAE."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.path_fingerprint(files.resolve_decoder(file))

    @classmethod
    @checked
    def execute(cls, vae: Vae, file: str) -> io.NodeOutput:
        path = files.resolve_decoder(file)
        found = load_decoder(path)
        made = temporal_vae.with_temporal_decoder(vae, found)
        warning = temporal_vae.round_trip_warning(vae, made, found, (path, *files.path_fingerprint(path)))
        if warning:
            notes.warn(warning)
        return io.NodeOutput(made, report_of(found, warning))


def report_of(found: DecoderFile, warning: str | None) -> str:
    """What the artist should know about the decoder that was loaded."""
    fps = f" at {found.fps:g} frames per second" if found.fps else ""
    lines = [f"{found.name}: {found.title}, for latents of {found.latents}.",
             f"Trained on clips of {found.frames} frames{fps}; kernel {'x'.join(map(str, found.params.kernel))}."]
    if found.licence:
        lines.append(f"Licence: {found.licence}.")
    return "\n".join([*lines, f"Warning: {warning}"] if warning else lines)


class TemporalDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMTemporalDecode",
            display_name="Temporal VAE Decode",
            category="video ldm/decode",
            description="Decodes the frames of a clip together, in windows that fade into each other. A clip of any "
                        "length needs the memory of one window, and the result does not depend on how much memory is "
                        "free. With a VAE from Load Temporal Decoder frames do not flicker. With a plain VAE it "
                        "decodes frame by frame.",
            **search_words("svd", "flicker", "deflicker", "vae decode", "latent to video"),
            inputs=[
                io.Vae.Input("vae", tooltip="A VAE from Load Temporal Decoder, or a plain one."),
                io.Latent.Input("samples", tooltip="The frames of a clip, or of several clips one after another."),
                io.Int.Input("window", default=12, min=1, max=4096,
                             tooltip="Frames that are decoded together. Memory grows with it. A clip that fits one "
                                     "window has no seams. With a plain VAE it is the batch and changes nothing else."),
                io.Int.Input("overlap", default=4, min=0, max=4095,
                             tooltip="The least number of frames that neighbouring windows share and fade over. More "
                                     "hides seams better and takes longer: shared frames are decoded twice. A plain "
                                     "VAE needs none."),
                io.Int.Input("tile", default=0, min=0, max=8192, step=64,
                             tooltip="Size of spatial tiles in pixels, for frames that do not fit into memory. 0 "
                                     "decodes whole frames. Neighbouring tiles share a quarter of their size. If "
                                     "memory runs out at 0, tiles of 512, then 256 are used, and the log says so."),
                io.Float.Input("fps", default=0.0, min=0.0, max=240.0, step=0.01,
                               tooltip="Frames per second of the VIDEO. 0 takes the rate that the LATENT carries "
                                       f"(Video LDM Sampler writes it there), else {DEFAULT_RATE}."),
                io.Int.Input("clips", default=0, min=0, max=4096, optional=True,
                             tooltip="How many clips the LATENT holds, one after another. Each is decoded by itself. "
                                     "0 takes what the LATENT says (Video LDM Sampler writes it there), else one."),
                io.Audio.Input("audio", optional=True,
                               tooltip="Sound for the VIDEO, such as that of Load Video Frames. It begins with the "
                                       "first frame and ends with the last one at the latest."),
            ],
            outputs=[
                io.Image.Output("images", display_name="IMAGE",
                                tooltip="Every frame at once, in memory: width x height x 12 bytes each, 0.3 GB for "
                                        "100 frames of 512x512. Not made unless it is connected."),
                io.Video.Output("video", display_name="VIDEO",
                                tooltip="The frames as a stream. They are decoded while Save Video or Save Video File "
                                        "writes them, with one window in memory."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        return wiring.used_in_running("VideoLDMTemporalDecode", IMAGE_SLOT)

    @classmethod
    @checked
    def execute(cls, vae: Vae, samples: Latent, window: int, overlap: int, tile: int, fps: float,
                clips: int = 0, audio: Audio | None = None) -> io.NodeOutput:
        refuse_planes(samples, "The connected latents")
        frames = samples["samples"]
        settings = DecodeSettings(window, overlap, tile, clips or clips_of(samples, len(frames)))
        decoding = Decoding(vae, frames, settings)
        rate = chosen_rate(fps, samples.get(RATE))
        return io.NodeOutput(*pictures_and_video(decoding, rate, cls.hidden, audio))


NODES = [LoadTemporalDecoder, TemporalDecode]
