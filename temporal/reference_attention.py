"""Changes of the spatial network that MuseV and makeavid-sd bring (docs/formats.md#musev, docs/formats.md#makeavid-sd).

KNOWN_ATTENTION     MuseV: the spatial self-attention sees the known frames too
TRANSFORMER_EPS     makeavid-sd: the norms in front of the spatial transformers have another eps
"""

from dataclasses import dataclass

from torch import Tensor, cat, nn, where

from .layers import Factory
from .spatial_changes import ChangeCall, RegroupedKeys
from .unet import transformer_blocks, transformers


@dataclass(frozen=True)
class KnownAttention:
    """Spatial self-attention to the frame itself and to the known frames of its clip.

    Where no frame is known, nothing changes.
    """

    note = "Where Context Frames gives a frame, the image model's self-attention in every frame sees that frame too."
    by_frame, needs_known = False, True

    def build(self, make: Factory) -> None:
        return None

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """Hook the keys and values of every block, if a frame is known in this call."""
        if not call.known_places:
            return []
        return [handle for block in transformer_blocks(unet) for handle in OwnAndKnown(call).attach(block)]


class OwnAndKnown(RegroupedKeys):
    """Each frame sees itself and the known frames. A known frame sees itself twice, which changes nothing."""

    whole = "the whole known frames beside each frame"
    sees = "the known frames beside the frame itself"

    def group(self, clips: Tensor) -> Tensor:
        known = clips[:, list(self.call.known_places)].flatten(1, 2)[:, None]
        return cat([clips, known.expand(-1, clips.shape[1], -1, -1)], dim=2)


@dataclass(frozen=True)
class TransformerEps:
    """The norms in front of the spatial transformers have this eps, in place of Stable Diffusion's 1e-6.

    A norm of `a x` with eps e is a norm of x with eps `e / a^2`. So the input is scaled, and nothing on the network
    changes.
    """

    eps: float
    note, by_frame = "The norms in front of the image model's transformers have makeavid-sd's eps.", True

    def build(self, make: Factory) -> None:
        return None

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        def scale(module: nn.Module, args: tuple) -> tuple | None:
            if not call.acting:
                return None
            scaled = args[0] * (module.eps / self.eps) ** 0.5
            changed = call.frames_changed(self)
            if changed is None:
                return scaled, *args[1:]
            return where(changed.to(scaled.device)[:, None, None, None], scaled, args[0]), *args[1:]
        return [part.norm.register_forward_pre_hook(scale) for part in transformers(unet)]


KNOWN_ATTENTION = KnownAttention()
TRANSFORMER_EPS = TransformerEps(1e-5)
