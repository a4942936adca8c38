"""The bricks that temporal layers are made of.

The papers write clips as `b t c h w`. In the network, frames are on the batch dimension: `(b t) ...`.
"""

from .attention import Attention, FeedForward, TemporalTransformer, TemporalTransformerBlock, TransformerParams
from .brick import BrickCall, BrickParams, GivenCall
from .context import ContextDownsampler, FpsToken
from .conv import ResBlockParams, TemporalResBlock
from .factory import TORCH, Factory, attend
from .frame_attention import FrameAttention, FrameAttentionParams, FrameResidual, FrameResidualParams
from .frame_conv import FrameConv, FrameConvParams
from .mix import Mix
from .modelscope import ClipTransformer, ClipTransformerParams, StagedConv, StagedConvParams
from .motion import MotionModule, MotionParams
from .musev import FrameEmbedding, WeightedConv, WeightedConvParams, WeightedTransformer, WeightedTransformerParams
from .position import interleaved_sinusoid, timestep_sinusoid
from .vsr import LevelModule, LevelParams, ResidualConv, ResidualConvParams, RotaryParams, RotaryTransformer

__all__ = [
    "TORCH", "Attention", "BrickCall", "BrickParams", "ClipTransformer", "ClipTransformerParams", "ContextDownsampler",
    "Factory", "FeedForward", "FpsToken", "FrameAttention", "FrameAttentionParams", "FrameConv", "FrameConvParams",
    "FrameEmbedding", "FrameResidual", "FrameResidualParams", "GivenCall", "LevelModule", "LevelParams", "Mix",
    "MotionModule", "MotionParams", "ResBlockParams", "ResidualConv", "ResidualConvParams", "RotaryParams",
    "RotaryTransformer", "StagedConv", "StagedConvParams", "TemporalResBlock", "TemporalTransformer",
    "TemporalTransformerBlock", "TransformerParams", "WeightedConv", "WeightedConvParams", "WeightedTransformer",
    "WeightedTransformerParams", "attend", "interleaved_sinusoid", "timestep_sinusoid",
]
