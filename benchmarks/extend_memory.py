"""Memory that Extend Video takes for videos of some lengths.

`python run.py _inside benchmarks.extend_memory FRAMES...` prints for each length the bytes at the peak, beyond the
latents that come out. They are what the whole process holds, as measured. With `count` before FRAMES they are those of
the tensors that the extension makes. This is exact, and slow. The models are the bundled ones, with two steps per clip.
"""

from functools import partial
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
    most_of, lengths = (counted, argv[1:]) if argv[0] == "count" else (measured, argv)
    for frames in lengths:
        most = most_of(partial(extend, int(frames)))
        print(most - out[0]["samples"].numel() * out[0]["samples"].element_size())
    return 0


def counted(work) -> int:
    with Tally() as tally:
        work()
    return tally.most["cpu"]


def measured(work) -> int:
    held = psutil.Process().memory_info().rss
    return held + growth(work)
