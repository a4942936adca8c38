"""Stages of `train-demo` that run at the same time, each lane of them in a process of its own.

Networks as small as the demo's leave most of a GPU idle: one CPU core launches their many operations one by one, and
that takes the time. A lane does its stages in order. It waits where a stage needs what another lane makes.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import data

RUN = Path(__file__).resolve().parents[1] / "run.py"
LANES = (("render", "autoencoder", "latents", "image", "temporal", "prediction", "bundle"),     # the longest lane
         ("text", "features", "interpolation-data", "temporal-decoder", "temporal-attention"),
         ("render-large", "upscaler", "upscaler-temporal"),
         ("layout", "interpolation"),
         ("pvdm-render", "pvdm-autoencoder", "pvdm-planes", "pvdm-diffusion"))
NEEDS = {"autoencoder": ("render",), "latents": ("render", "autoencoder", "text"), "image": ("latents",),
         "temporal": ("latents", "image"), "temporal-attention": ("latents", "image"), "layout": ("latents", "image"),
         "prediction": ("latents", "temporal"), "interpolation": ("latents", "temporal", "interpolation-data"),
         "interpolation-data": ("latents",), "temporal-decoder": ("autoencoder",), "features": ("render",),
         "upscaler": ("render-large", "latents"), "upscaler-temporal": ("render-large", "latents", "upscaler"),
         "pvdm-autoencoder": ("pvdm-render",), "pvdm-planes": ("pvdm-render", "pvdm-autoencoder"),
         "pvdm-diffusion": ("pvdm-planes",),
         "bundle": ("prediction", "interpolation", "layout", "temporal-decoder", "upscaler-temporal", "pvdm-diffusion",
                    "features")}
POLL = 0.2                              # seconds


def side_by_side(argv):
    """Run all lanes with these arguments of `train-demo`. One that fails ends them all; its status is returned."""
    threads = str(max(1, (os.cpu_count() or 1) // len(LANES)))
    environment = dict(os.environ, OMP_NUM_THREADS=threads)
    processes = [subprocess.Popen([sys.executable, "-u", str(RUN), "_inside", "demo.train", *argv, "--lane", str(lane)],
                                  env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                 for lane in range(len(LANES))]
    relays = [threading.Thread(target=relay, args=(process.stderr,)) for process in processes]
    for thread in relays:
        thread.start()
    try:
        while processes:
            statuses = [process.poll() for process in processes]
            if failed := next(filter(None, statuses), None):
                return failed
            processes = [process for process, status in zip(processes, statuses) if status is None]
            time.sleep(POLL)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        for thread in relays:
            thread.join()
    return 0


def relay(lines):
    """Repeat a lane's progress on our stderr line by line. In a terminal lanes would overwrite each other's line."""
    for line in lines:
        sys.stderr.write(line)
    lines.close()


def wait_for(stage, files):
    """Return when everything is there that a stage needs."""
    while not all(finished(needed, files) for needed in NEEDS.get(stage, ())):
        time.sleep(POLL)


def missing_data(stage, files) -> list[str]:
    """The stages that prepare data for this one and are not done yet, in order."""
    missing, data_stages = [], data_files(files)
    for needed in NEEDS.get(stage, ()):
        if needed in data_stages and not finished(needed, files):
            missing += [*missing_data(needed, files), needed]
    return list(dict.fromkeys(missing))


def finished(stage, files: data.Files) -> bool:
    """Whether all files of a stage are there. A file gets its name only when it is whole."""
    return all(path.exists() for path in data_files(files).get(stage, (files.weights(stage),)))


def data_files(files: data.Files) -> dict[str, tuple]:
    """The files of the stages that only prepare data."""
    return {"render": (files.frames,), "render-large": (files.large,), "latents": (files.latents, files.texts),
            "interpolation-data": (files.interpolation,), "pvdm-render": (files.pvdm_frames, files.pvdm_boxes),
            "pvdm-planes": (files.pvdm_planes,)}
