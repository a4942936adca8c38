"""The inputs that all samplers of the pack have in common."""

from .api import io
from .frame_noise import FREE_NOISE, KINDS, MIXED, OWN, REPEATED, SHARED
from .sampling import SAMPLERS, SCHEDULERS


def sampler_inputs() -> list:
    """New objects of these inputs, in their order. Each schema needs objects of its own."""
    return [
        io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers."),
        io.Conditioning.Input("positive", tooltip="What the video shows."),
        io.Conditioning.Input("negative", tooltip="What it should not show."),
        io.Int.Input("frames", default=16, min=1, max=4096,
                     tooltip="Frames of one clip. Best is the number that the temporal layers were trained on. The "
                             "report of Load Temporal Layers says it."),
        io.Int.Input("width", default=512, min=16, max=8192, step=8,
                     tooltip="Width in pixels. Not used where a latent is connected."),
        io.Int.Input("height", default=512, min=16, max=8192, step=8,
                     tooltip="Height in pixels. Not used where a latent is connected."),
        io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                     tooltip="The random noise to begin with. The same seed gives the same video."),
        io.Int.Input("steps", default=25, min=1, max=10000,
                     tooltip="Denoising steps. More is slower and finer; the paper used 250."),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                       tooltip="How strictly the text is followed. The paper used 8; AnimateLCM wants 1 to 2."),
        io.Combo.Input("sampler", options=SAMPLERS, default="euler_ancestral",
                       tooltip="Core's samplers. euler_ancestral is the paper's DDIM with eta 1."),
        io.Combo.Input("scheduler", options=SCHEDULERS, default="ddim_uniform",
                       tooltip="How the noise levels are spaced. ddim_uniform is the paper's."),
    ]


def noise_inputs(optional: bool = True) -> list:
    """New objects of the inputs that choose the kind of noise. Optional: a graph that was saved without them runs."""
    return [
        io.Combo.Input("noise", options=list(KINDS), default=OWN, optional=optional,
                       tooltip=f"The noise that the frames begin with. {OWN}: KSampler's. {SHARED}: the same noise in "
                               f"every frame, so frames look more alike and move less. {MIXED}: a part is shared. "
                               f"{FREE_NOISE}: for Frame Windows, so that a long clip keeps its look: later windows "
                               f"get the noise of the first one, shuffled. {REPEATED}: the noise of the first window "
                               "again and again."),
        io.Float.Input("noise_mix", default=1.0, min=0.0, max=1000.0, step=0.1, round=0.01, optional=optional,
                       tooltip=f"For the noise '{MIXED}': how much the frames share. 0: nothing. 1: half of the "
                               "noise's power. 2: four fifths."),
    ]
