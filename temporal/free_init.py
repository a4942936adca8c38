"""FreeInit: a clip is sampled several times, and each time begins with the low frequencies of the last result.

The result is brought back to the highest noise level with the first noise. Of this the low frequencies in time, height
and width are kept. The high frequencies come from new noise (docs/papers.md#freeinit).
"""

import torch
from torch import Tensor

DIMS = (1, 3, 4)        # time, height and width of clips `b t c h w`


def distances(frames: int, height: int, width: int, stop_space: float, stop_time: float) -> Tensor:
    """The squared distance of each frequency from zero, `t 1 h w`, in the order of torch.fft.

    1 is the highest frequency of an axis. Time is stretched by stop_space / stop_time, so that a distance of stop_space
    means stop_time in time. Where a size is odd, the authors' program is off by half a frequency. This is not.
    """
    def axis(size: int) -> Tensor:
        return 2 * torch.fft.fftfreq(size, dtype=torch.float64)
    time, rows, columns = axis(frames), axis(height), axis(width)
    return ((stop_space / stop_time * time[:, None, None]) ** 2 + rows[:, None] ** 2 + columns ** 2)[:, None]


def butterworth(squared: Tensor, stop: float, order: int) -> Tensor:
    return 1 / (1 + (squared / stop ** 2) ** order)


def gaussian(squared: Tensor, stop: float, order: int) -> Tensor:
    return (-squared / (2 * stop ** 2)).exp()


def ideal(squared: Tensor, stop: float, order: int) -> Tensor:
    """1 up to the stop frequency, as in the paper. The authors' program compares with 2 stop, not with stop^2."""
    return (squared <= stop ** 2).to(squared)


FILTERS = {"butterworth": butterworth, "gaussian": gaussian, "ideal": ideal}


def low_pass(kind: str, shape: tuple[int, int, int], stop_space: float, stop_time: float, order: int) -> Tensor:
    """The part of each frequency that is kept, `t 1 h w`, in the order of torch.fft.

    Args:
        kind: a key of FILTERS.
        shape: frames, height and width.
        stop_space, stop_time: where the filter stops, from 0 to 1, the highest frequency. 0: nothing is kept.
        order: how steep the Butterworth filter is; the others have none.
    """
    if not stop_space or not stop_time:
        return torch.zeros(shape[0], 1, *shape[1:])
    return FILTERS[kind](distances(*shape, stop_space, stop_time), stop_space, order).float()


def join_frequencies(low: Tensor, high: Tensor, kept: Tensor) -> Tensor:
    """`low` where the filter is 1 and `high` where it is 0, by frequency.

    Args:
        low, high: clips `b t c h w`.
        kept: the filter, as low_pass gives it.
    """
    difference = torch.fft.fftn((low - high).float(), dim=DIMS)
    return high + torch.fft.ifftn(difference * kept, dim=DIMS).real.to(high)
