"""The latents of an image model, as files of this pack state them."""

from dataclasses import dataclass
from typing import Any

from .metadata import entries_of, list_of, number


@dataclass(frozen=True)
class LatentParams:
    """Latents of the image LDM."""
    scale_factor: float                             # the VAE's latents are multiplied by it
    rgb_factors: tuple[tuple[float, ...], ...]      # linear map from latents to a preview's RGB
    rgb_bias: tuple[float, ...]                     # its bias


def read_latents(stored: Any, channels: int) -> LatentParams:
    """Latents in a file's metadata. Raises MetadataError for a wrong entry. channels: of the latents."""
    entries = entries_of(stored, "latent", tuple(LatentParams.__dataclass_fields__))
    rows = list_of(entries["rgb_factors"], "rgb_factors", channels, channels)
    return LatentParams(number(entries["scale_factor"], "scale_factor", 0, 1e6), tuple(map(colour, rows)),
                        colour(entries["rgb_bias"]))


def colour(value: Any) -> tuple[float, ...]:
    return tuple(number(part, "a colour", -1e6, 1e6) for part in list_of(value, "a colour", 3, 3))
