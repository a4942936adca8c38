"""Memory that a PVDM takes for a video of some length: `python run.py bench --pvdm-memory`.

The video is sampled clip after clip and streamed into a file, as PVDM Sampler and Save Video do it. The network is
small and random, a step a clip. Each length has a process of its own. The columns are the peak of the whole process and
that of the work alone. Neither counts the planes of all clips, which are an output: 16 KB a clip at the demo's size.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil  # ComfyUI requires it
import torch

from ..demo import pvdm
from ..nodes.host import pvdm as host
from ..nodes.host.lazy_video import LazyVideo
from ..temporal.families import load_pvdm
from ..temporal.pvdm import Autoencoder, AutoencoderParams, PlaneUNet, SamplerParams, UNetParams
from ..temporal.pvdm import files as pvdm_files
from .memory import growth, own_pages

RUN = Path(__file__).resolve().parent.parent / "run.py"
FRAMES = (64, 2048)
WARM_UP = 4         # clips of a first run: what is loaded and planned only once is not measured
PARAMS = AutoencoderParams(frames=16, height=64, width=128, patch=8, channels=64, plane_channels=8, depth=1, heads=4,
                           head_width=16, plane_depth=1, plane_heads=4, plane_head_width=16, plane_hidden=128)
UNET = UNetParams(channels=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), heads=4,
                  row=PARAMS.shape.length)


def main(argv=None):
    if argv:            # the child: frames
        print(json.dumps(measure(int(argv[0]))))
        return 0
    print("| frames | whole process | the work alone |\n|---|---|---|", flush=True)
    for frames in FRAMES:
        whole, alone = child(frames)
        print(f"| {frames} | {whole / 1e6:.0f} MB | {alone / 1e6:.1f} MB |", flush=True)
    return 0


def child(frames: int) -> tuple[int, int]:
    """Bytes of the whole process and of the work alone, at their peak, measured in a process of its own."""
    command = [sys.executable, str(RUN), "_inside", "benchmarks.pvdm_memory", str(frames)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own_pages()).stdout
    whole, alone = json.loads(answer.splitlines()[-1])
    return whole, alone


def measure(frames: int) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        model = random_pvdm(Path(folder))
        path = Path(folder) / "video.mp4"
        make_video(model, WARM_UP, path)
        held, made = psutil.Process().memory_info().rss, []
        taken = growth(lambda: made.append(make_video(model, frames // PARAMS.frames, path)))
        planes = made[0].numel() * made[0].element_size()
    return held + taken - planes, taken - planes


@torch.inference_mode()
def make_video(model: host.Pvdm, clips: int, path: Path) -> torch.Tensor:
    """Sample a video and write it. Returns its planes."""
    once = SamplerParams(steps=1)
    rows = host.sample_clips(model, 0, clips, once, once, None, host.ClipProgress(model, clips, pvdm.FPS))
    decoding = host.PlaneDecoding(model, rows, "PVDM Sampler")
    LazyVideo(decoding.frames, decoding.count, decoding.width, decoding.height, pvdm.FPS).save_to(str(path))
    return rows


def random_pvdm(folder: Path) -> host.Pvdm:
    """A PVDM with random weights, read from its two files as Load PVDM reads them."""
    torch.manual_seed(0)
    about = pvdm_files.About(fps=pvdm.FPS, grid=PARAMS.shape)
    paths = folder / "autoencoder.safetensors", folder / "unet.safetensors"
    pvdm_files.write_autoencoder(paths[0], Autoencoder(PARAMS).state_dict(), PARAMS, about)
    pvdm_files.write_diffusion(paths[1], PlaneUNet(UNET).state_dict(), UNET, about)
    kinds = pvdm_files.AUTOENCODER, pvdm_files.DIFFUSION
    autoencoder, unet = (load_pvdm(path, kind) for path, kind in zip(paths, kinds))
    return host.load_pvdm(autoencoder, unet, paths)
