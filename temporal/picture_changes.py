"""How layers that move a given picture see it: two changes of the spatial network (docs/papers.md#moving-a-picture).

Both add to features of the network, so they leave its own weights, and LoRA on them, as they are. Without a picture in
the call they do nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad, relu

from .errors import VideoLDMError
from .layers import Factory, interleaved_sinusoid
from .picture_input import GivenPicture, affinities
from .slots import Site, unet_sites
from .spatial_changes import ChangeCall
from .unet_names import UNetNames


def with_added(output: Tensor, added: Tensor, changed: Tensor | None) -> Tensor:
    """Features `(b t) c h w` plus others. changed `(b t)`: the images that get them; None: all do."""
    result = output + added.to(output.dtype)
    return result if changed is None else torch.where(changed.to(output.device)[:, None, None, None], result, output)


@dataclass(frozen=True)
class PictureChannels:
    """PIA: the first convolution has five further input channels.

    They are the affinity of the frame to the picture and the picture's latents, which are the same in every frame. A
    convolution is a sum over its input channels. So the further channels are a convolution of their own, without bias,
    whose result is added to that of the model's own.
    """

    channels: int               # of the first convolution's output
    latent_channels: int = 4
    kernel: int = 3

    note, by_frame = "The image model's first convolution sees the given picture in every frame.", True

    def build(self, make: Factory) -> nn.Module:
        return make.conv2d(1 + self.latent_channels, self.channels, self.kernel, padding=self.kernel // 2, bias=False)

    def attach(self, call: ChangeCall, unet: Any, weights: nn.Module | None) -> list:
        assert weights is not None

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            picture = call.picture
            if not call.acting or picture is None:
                return None
            return with_added(output, weights(self.input_of(picture, output)), call.frames_changed(self))
        return [unet.input_blocks[0][0].register_forward_hook(hook)]

    def input_of(self, picture: GivenPicture, like: Tensor) -> Tensor:
        """The further channels `(b t) c+1 h w`: the affinity, then the picture's latents."""
        clips, _, height, width = picture.latents.shape
        frames = len(picture.numbers)
        values = affinities(picture.motion.amount, picture.frame, picture.numbers, picture.length).to(like)
        plane = values[None, :, None, None, None].expand(clips, -1, -1, height, width)
        latents = picture.latents.to(like)[:, None].expand(-1, frames, -1, -1, -1)
        return torch.cat([plane, latents], dim=2).flatten(0, 1)


@dataclass(frozen=True)
class PictureFeatures:
    """AnimateLCM image-to-video: an encoder turns the picture's latents into features for each level of the network.

    They are added in the second layer of each level of the input side, after its transformer (after the ResBlock where
    there is none) and before its motion module. So they reach the skip connection too.
    """

    channels: tuple[int, ...]   # of each level
    latent_channels: int = 4
    blocks: int = 2             # blocks of the encoder in each level, and ResBlocks in a level of the network

    note, by_frame = "Features of the given picture are added on the input side of the image model.", True

    def build(self, make: Factory) -> nn.Module:
        return PictureEncoder(self, make)

    def attach(self, call: ChangeCall, unet: Any, weights: nn.Module | None) -> list:
        """Each hook runs before those of the temporal layers, although these are installed first."""
        assert isinstance(weights, PictureEncoder)
        modules = unet_sites(unet)
        made: dict[str, Any] = {}       # the picture of the last call, and its features

        def features(level: int, like: Tensor) -> Tensor:
            assert call.picture is not None
            if made.get("picture") is not call.picture:
                made.update(picture=call.picture, features=weights(call.picture, like))
            found = made["features"][level]
            # Nodes such as deep shrink change the size of the features in some blocks.
            return found if found.shape[2:] == like.shape[2:] else interpolate(
                found.float(), like.shape[2:], mode="bilinear", antialias=True).to(found)

        def hook(level: int) -> Any:
            def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
                if not call.acting or call.picture is None:
                    return None
                return with_added(output, features(level, output), call.frames_changed(self))
            return add
        return [modules[site].module.register_forward_hook(hook(level), prepend=True)
                for level, site in enumerate(self.sites())]

    def sites(self) -> list[Site]:
        """Where the features of each level are added."""
        names = UNetNames(self.blocks)
        return [Site(*names.block("down", level, 1), "post_attn") for level in range(len(self.channels))]


class PictureEncoder(nn.Module):
    """From the picture's latents to features for each level, with an embedding of each frame's number."""

    def __init__(self, params: PictureFeatures, make: Factory) -> None:
        super().__init__()
        self.blocks = params.blocks
        self.conv_in = make.conv2d(params.latent_channels, params.channels[0], 3, padding=1)
        before = (params.channels[0], *params.channels)
        self.body = nn.ModuleList(
            EncoderBlock(before[level] if block == 0 else width, width, level > 0 and block == 0, make)
            for level, width in enumerate(params.channels) for block in range(params.blocks))

    def forward(self, picture: GivenPicture, like: Tensor) -> list[Tensor]:
        """The features `(b t) c h w` of each level, in the dtype of `like`."""
        x = self.conv_in(picture.latents.to(like))                              # the same for all frames
        table = interleaved_sinusoid(max(picture.numbers) + 1, x.shape[1], x.device)[list(picture.numbers)]
        frames = (picture.motion.motion_scale * table).to(x.dtype)[None, :, :, None, None]
        x = (x[:, None] + frames).flatten(0, 1)
        features = []
        for number, block in enumerate(self.body, 1):
            x = block(x)
            if number % self.blocks == 0:
                features.append(x)
        return features


class EncoderBlock(nn.Module):
    """A residual block of the encoder, at half the size where it begins a level."""

    def __init__(self, inputs: int, outputs: int, halves: bool, make: Factory) -> None:
        super().__init__()
        self.halves = halves
        self.in_conv = make.conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.block1 = make.conv2d(outputs, outputs, 3, padding=1)
        self.block2 = make.conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.halves:     # a side that cannot be halved gets its last row or column twice
            x = avg_pool2d(pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate"), 2)
        if self.in_conv is not None:
            x = self.in_conv(x)
        return x + self.block2(relu(self.block1(x)))


def require_sites(name: str, title: str, change: PictureFeatures, channels: dict[Site, int]) -> None:
    """Raise VideoLDMError unless the motion modules of a file stand where its features go, with the same channels.

    Args:
        name: the file's name.
        title: what the file is, with an article.
        change: with the file's sizes.
        channels: of the motion modules, by site.
    """
    for site, width in zip(change.sites(), change.channels, strict=True):
        if channels.get(site) != width:
            raise VideoLDMError(f"{name} looks like {title}, but its picture encoder gives {width} channels to the "
                                f"motion module {site.name}, which has {channels.get(site, 'no place')}. The file is "
                                "damaged or from an unknown variant.")
