"""Random windows of encoded clips, or of video frames, with the text of their clip.

    videos = open_videos("latents.npy")             # (n, T, c, h, w), read from disk as it is needed
    clips = Clips(videos, frames=8, batch=4, stride=2, embeddings=texts)
    batch = clips(step)                             # Batch((4, 8, c, h, w), (4, l, d))

Windows are drawn with replacement. The generator of the StepContext draws them, so a resumed run sees the same ones.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import VideoLDMError
from .batch import Batch


class SafetensorsVideos:
    """The tensors of a safetensors file, one video (T, ...) each, in the order of their names.

    A window is read from the disk when it is asked for.
    """

    def __init__(self, path):
        self.file = safe_open(str(path), framework="pt")
        self.names = sorted(self.file.keys())

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return _DiskVideo(self.file.get_slice(self.names[index]))


class _DiskVideo:
    def __init__(self, part):
        self.part = part

    def __len__(self):
        return self.part.get_shape()[0]

    def __getitem__(self, window):
        return self.part[window.start:window.stop][::window.step]


def open_videos(path):
    """The videos (T, ...) of a path, in order. Nothing is read before it is asked for.

    The path is an .npy file (n, T, ...), a .safetensors file with one tensor per video, or a folder with one .npy file
    per video; the latter two in the order of their names.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(path.glob("*.npy"))
            if not files:
                raise VideoLDMError(f"There is no .npy file in the folder '{path}'. Put one file per video there.")
            return [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        if path.suffix == ".safetensors":
            return SafetensorsVideos(path)
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except VideoLDMError:
        raise
    except (SafetensorError, OSError, ValueError, EOFError) as error:
        raise VideoLDMError(f"The clips '{path}' cannot be read: {error}. Check the file, or encode the videos "
                            "again.") from error
    raise VideoLDMError(f"'{path}' is not a file of clips. Use .npy, .safetensors, or a folder of .npy files.")


class Clips:
    """Draws batches of windows. Call it with a StepContext; `images` draws single frames.

    Args:
        videos: a sequence of arrays or tensors (T, c, h, w) of any floating type, or uint8 frames (T, h, w, c), which
            become -1..1.
        frames, stride: a window is every stride-th of (frames - 1) * stride + 1 neighbouring frames.
        batch: clips per step, over all processes.
        embeddings: texts (k, l, d).
        captions: the row of each video in `embeddings`; by default its own number.
        fps: frames per second of each video, for layers that have an input for the rate of their window.
        weights: for each video how much each pixel counts, (T, 1, h, w).
    """

    def __init__(self, videos, frames, batch, stride=1, embeddings=None, captions=None, fps=None, weights=None):
        self.videos, self.frames, self.batch, self.stride = videos, frames, batch, stride
        self.embeddings, self.captions, self.fps, self.weights = embeddings, captions, fps, weights
        self.span = (frames - 1) * stride + 1
        if min(frames, batch, stride) < 1:
            raise VideoLDMError(f"Frames, batch and stride must be 1 or more, not {frames}, {batch} and {stride}.")
        if len(videos) == 0:
            raise VideoLDMError("There are no videos to draw clips from.")
        short = [(index, len(videos[index])) for index in range(len(videos)) if len(videos[index]) < self.span]
        if short:
            raise VideoLDMError(f"Clips of {frames} frames with stride {stride} need videos of {self.span} frames; "
                                f"{len(short)} of {len(videos)} are shorter (number {short[0][0]} has {short[0][1]}). "
                                "Use shorter clips, a smaller stride, or leave those videos out.")
        self._check_captions()
        if fps is not None and (len(fps) != len(videos) or min(map(float, fps)) <= 0):
            raise VideoLDMError(f"{len(videos)} videos came with {len(fps)} frame rates; each needs one above 0.")
        if weights is not None and [len(part) for part in weights] != [len(video) for video in videos]:
            raise VideoLDMError(f"{len(videos)} videos came with weights of {len(weights)}; each needs those of all "
                                "its frames.")

    def __call__(self, step):
        """Batch of clips (b t c h w) on the step's device, b being this process's share."""
        windows, texts, weights = [], [], []
        for _ in range(step.share(self.batch)):
            index = self._draw(len(self.videos), step)
            video = self.videos[index]
            start = self._draw(len(video) - self.span + 1, step)
            span = slice(start, start + self.span, self.stride)
            windows.append(as_frames(video[span]))
            texts.append(index)
            if self.weights is not None:
                weights.append(as_frames(self.weights[index][span]))
        fps = None if self.fps is None else torch.tensor([float(self.fps[index]) / self.stride for index in texts])
        stacked = torch.stack(weights).to(step.device) if weights else None
        return Batch(torch.stack(windows).to(step.device), self._context(texts, step), fps, stacked)

    def images(self, batch):
        """Another sampler of the same videos: `batch` single frames per step, as images (n c h w)."""
        clips = Clips(self.videos, 1, batch, 1, self.embeddings, self.captions)

        def draw(step):
            drawn = clips(step)
            return Batch(drawn.latents.flatten(0, 1), drawn.context)
        return draw

    def _draw(self, count, step):
        return int(torch.randint(0, count, (), generator=step.generator))

    def _context(self, indices, step):
        if self.embeddings is None:
            return None
        rows = indices if self.captions is None else [int(self.captions[index]) for index in indices]
        return torch.stack([torch.as_tensor(self.embeddings[row]) for row in rows]).to(step.device, torch.float32)

    def _check_captions(self):
        if self.embeddings is None:
            return
        named = len(self.embeddings) if self.captions is None else len(self.captions)
        if named != len(self.videos):
            raise VideoLDMError(f"{len(self.videos)} videos came with {named} captions; each video needs one.")
        rows = range(len(self.embeddings)) if self.captions is None else [int(row) for row in self.captions]
        if min(rows) < 0 or max(rows) >= len(self.embeddings):
            raise VideoLDMError(f"Captions must be rows of the {len(self.embeddings)} text embeddings, and range from "
                                f"{min(rows)} to {max(rows)}.")


def as_frames(window):
    """A window as float32 (t c h w). uint8 (t h w c) becomes -1..1."""
    tensor = window if isinstance(window, torch.Tensor) else torch.from_numpy(np.array(window))
    if tensor.dtype == torch.uint8:
        return tensor.movedim(-1, 1).to(torch.float32) / 127.5 - 1.0
    return tensor.to(torch.float32)
