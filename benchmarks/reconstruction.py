"""How well the image decoder and the temporal decoder restore encoded clips (Video LDM, Table 8 and I.3.1).

Clips have the frame rates of key frames and of interpolated video. The paper's driving decoder learns from video of 30
frames a second.
"""

import math

import numpy as np
import torch

from ..demo import bundle, models
from ..demo.features import features_of, load_network
from ..nodes.host import models as host
from ..nodes.host.decoding import DecodeSettings, Decoding
from ..nodes.host.temporal_vae import with_temporal_decoder
from ..temporal.errors import VideoLDMError
from ..temporal.families import load_decoder
from ..temporal.metrics import frechet_distance, motion_ratio
from .cascade import real_clips

WHOLE, OVERLAP = 64, 4                  # a window that holds any of these clips
LEAST_GAIN, LARGEST_LOSS = 1 / 3, 0.5   # of the distance; of the PSNR, in dB
IMAGE, TEMPORAL = "image decoder", "temporal decoder"


def decoders(arguments):
    """The table of both decoders on held-out clips, and sentences on what does not hold."""
    vae = host.load_autoencoder(arguments.models / "autoencoder.safetensors")
    try:
        temporal = with_temporal_decoder(vae, load_decoder(arguments.models / bundle.DECODER_FILE))
    except VideoLDMError as error:
        return f"Reconstruction is left out: {error}\n", []
    network = load_network(arguments.models / "features.safetensors")
    lines = [f"{arguments.clips} held-out clips, encoded and decoded; the distance is to the clips themselves.", "",
             "| frames a second | decoder | Frechet distance | motion, ratio to real | PSNR |", "|---|---|---|---|---|"]
    failures = []
    for rate in models.ALL_RATES:
        clips, rows = real_clips(range(arguments.clips), rate), {}
        real_features = features_of(network, clips)
        for name, decoder in ((IMAGE, vae), (TEMPORAL, temporal)):
            back = reconstructed(vae, decoder, clips)
            rows[name] = (frechet_distance(features_of(network, back), real_features), motion_ratio(back, clips),
                          psnr(back, clips))
        lines += [f"| {rate:g} | {name} | {row[0]:.3f} | {row[1]:.2f} | {row[2]:.2f} dB |"
                  for name, row in rows.items()]
        failures += [f"{line} ({rate:g} frames a second)" for line in verdict(rows)]
    return "\n".join(lines) + "\n", failures


def verdict(rows):
    (before, _, sharp), (after, _, blurred) = rows[IMAGE], rows[TEMPORAL]
    failures = []
    if after > before * (1 - LEAST_GAIN):
        failures.append(f"FAILED: the distance of the {TEMPORAL} ({after:.3f}) is not a third below that of the "
                        f"{IMAGE} ({before:.3f}).")
    if blurred < sharp - LARGEST_LOSS:
        failures.append(f"FAILED: the PSNR falls by more than {LARGEST_LOSS} dB, from {sharp:.2f} to {blurred:.2f}.")
    return failures


@torch.inference_mode()
def reconstructed(vae, decoder, clips):
    """uint8 clips (n t h w 3) through the encoder of one VAE and the decoder of another."""
    back = []
    for clip in clips:
        latents = vae.encode(torch.from_numpy(clip) / 255)
        frames = torch.cat(list(Decoding(decoder, latents, DecodeSettings(WHOLE, OVERLAP, 0, 1)).frames()))
        back.append((frames * 255).round().to(torch.uint8).numpy())
    return np.stack(back)


def psnr(clips, reference):
    """Peak signal to noise ratio of uint8 clips, in dB."""
    error = np.square(clips.astype(np.float32) - reference).mean(dtype=np.float64)
    return 10 * math.log10(255 ** 2 / error)
