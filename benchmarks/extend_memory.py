"""Memory that Extend Video takes for a video of some length: `python run.py _inside benchmarks.extend_memory FRAMES`.

It prints the bytes at the peak, beyond the latents that come out. They are what the whole process holds, as measured.
With `count` behind FRAMES they are those of the tensors that the extension makes. This is exact, and slow. The models
are the bundled ones, with two steps per clip.
"""

from typing import Any

import psutil  # ComfyUI requires it

from ..demo import bundle, models, train
from ..nodes.host import models as host
from ..nodes.load import AS_TRAINED, LoadTemporalLayers
from ..nodes.longer import STOP, ExtendVideo
from .memory import Tally, growth

WARM_UP = 14        # frames of a first run: what is loaded and planned only once is not measured


def main(argv):
    model, clip, _ = host.load_demo(train.BUNDLE)
    model = LoadTemporalLayers.execute(model, bundle.LAYERS_FILE, 1.0, AS_TRAINED).result[0]
    text = [[clip.encode_from_tokens(clip.tokenize("a busy road by day")), {}]]
    out: list[Any] = []

    def extend(frames):
        out[:] = ExtendVideo.execute(model, text, text, models.FRAMES, models.WIDTH, models.HEIGHT, 1, 2, 1.0, "euler",
                                     "normal", frames, 1.0, 2, STOP).result

    extend(WARM_UP)
    frames, tally = int(argv[0]), Tally()
    if argv[1:] == ["count"]:
        with tally:
            extend(frames)
        most = tally.most["cpu"]
    else:
        held = psutil.Process().memory_info().rss
        most = held + growth(lambda: extend(frames))
    print(most - out[0]["samples"].numel() * out[0]["samples"].element_size())
    return 0
