"""The frame rate as a part of the timestep embedding: VideoCrafter's networks are told it
(docs/papers.md#videocrafter)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import Factory, timestep_sinusoid
from .spatial_changes import ChangeCall


@dataclass(frozen=True)
class FpsEmbedding:
    """A change of the spatial network: `emb + embedding(sinusoid(fps))`, for every frame of a clip."""

    width: int          # of the sinusoid: the channels of the network's first convolution
    emb_dim: int        # width of the timestep embedding
    usual: float        # the frame rate that its authors tell it
    note, by_frame = "It is told the frame rate of its clips.", True

    def build(self, make: Factory) -> nn.Module:
        return nn.Sequential(make.linear(self.width, self.emb_dim), nn.SiLU(),
                             make.linear(self.emb_dim, self.emb_dim))

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """Add the embedding of the frame rate to that of the timestep."""
        assert weights is not None

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not call.acting:
                return None
            told = self.usual if call.told_fps is None else call.told_fps
            fps = torch.as_tensor(told, dtype=torch.float32, device=output.device).reshape(-1)
            rows = weights(timestep_sinusoid(fps, self.width).to(output.dtype))
            # One row serves all frames. Otherwise there is one for each clip.
            told_emb = output + (rows if len(rows) == 1 else rows.repeat_interleave(call.frames, dim=0))
            changed = call.frames_changed(self)
            return told_emb if changed is None else torch.where(changed.to(output.device)[:, None], told_emb, output)
        return [unet.time_embed.register_forward_hook(hook)]
