"""Names for the types of ComfyUI's sockets and of its objects, for annotations.

ComfyUI's classes differ between its versions, and other packs bring classes of their own. So most names stand for any
type: they tell a reader what is meant.
"""

from typing import Any, TypeAlias

Model: TypeAlias = Any              # MODEL: ComfyUI's ModelPatcher
Clip: TypeAlias = Any               # CLIP
Vae: TypeAlias = Any                # VAE: comfy.sd.VAE
Conditioning: TypeAlias = list      # CONDITIONING: a list of [text `n l d`, options]
Latent: TypeAlias = dict[str, Any]  # LATENT: "samples" `(b t) c h w` and what else is known of them
Video: TypeAlias = Any              # VIDEO: a class of core's VideoInput
Audio: TypeAlias = Any              # AUDIO: a mapping of "waveform" `1 channels samples` and "sample_rate"
Patcher: TypeAlias = Any            # ComfyUI's ModelPatcher of anything: an image model, a VAE, temporal layers
ModelSampling: TypeAlias = Any      # core's object for a MODEL's noise schedule and prediction
Control: TypeAlias = Any            # core's ControlNet, as a conditioning carries it
Hidden: TypeAlias = Any             # `cls.hidden` of a running node
Executor: TypeAlias = Any           # what a wrapper gets from core: called, it goes on; `class_obj` is what core runs
