"""The bricks that temporal layers are made of: shapes are `b t c h w` in the papers, `(b t) ...` on the wire."""

from .attention import Attention, FeedForward, TemporalTransformer, TemporalTransformerBlock, attend
from .context import ContextDownsampler, FpsToken
from .conv import TemporalResBlock
from .mix import Mix
from .motion import MotionModule
from .position import interleaved_sinusoid, timestep_sinusoid
from .vsr import LevelModule, LevelParams, ResidualConv, ResidualConvParams, RotaryParams, RotaryTransformer

__all__ = [
    "Attention", "ContextDownsampler", "FeedForward", "FpsToken", "LevelModule", "LevelParams", "Mix", "MotionModule",
    "ResidualConv", "ResidualConvParams", "RotaryParams", "RotaryTransformer", "TemporalResBlock",
    "TemporalTransformer", "TemporalTransformerBlock", "attend", "interleaved_sinusoid", "timestep_sinusoid",
]
