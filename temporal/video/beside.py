"""Writing frames beside their making: an encoder has a thread of its own, and the caller's thread makes the frames.

While a window of frames is decoded or sampled, often on a graphics card, the frames of the window before it are encoded
on the processor. Frames are made in the caller's thread, because torch's modes and ComfyUI's node belong to a thread.
"""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

MOST_FRAMES = 32            # frames that may wait: more than a usual window brings at once
MOST_BYTES = 64 * 2**20     # bytes of frames that may wait: 8 frames of 2048x1280. One frame may wait whatever its size
Result = TypeVar("Result")


class _Stopped(Exception):
    """Making the frames has failed, so the work on them ends and is undone."""


class _Line(Generic[Result]):
    """The frames that wait between two threads, in order, and how the work on them went."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.frames: deque[np.ndarray] = deque()    # those that wait
        self.size = 0                               # bytes of them
        self.done = 0                               # frames whose work is finished
        self.complete = False                       # no further frame will come
        self.stopped = False                        # making them has failed
        self.over = False                           # the work has ended
        self.results: list[Result] = []
        self.errors: list[BaseException] = []

    def taken(self) -> Iterator[np.ndarray]:
        """The frames, for the thread that works on them. Asking for the next says that one is done."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.frames or self.complete or self.stopped)
                if self.stopped:
                    raise _Stopped
                if not self.frames:
                    return
                frame = self.frames.popleft()
                self.size -= frame.nbytes
                self.changed.notify()
            yield frame
            with self.changed:
                self.done += 1
                self.changed.notify()

    def work(self, work: Callable[[Iterator[np.ndarray]], Result]) -> None:
        """Run the work, in its thread."""
        try:
            self.results.append(work(self.taken()))
        except BaseException as error:
            self.errors.append(error)
        with self.changed:
            self.over = True
            self.frames.clear()
            self.changed.notify()

    def has_room(self, size: int) -> bool:
        return not self.frames or len(self.frames) < MOST_FRAMES and self.size + size <= MOST_BYTES

    def put(self, frame: np.ndarray, told: int) -> tuple[int, bool]:
        """Let a frame wait if there is room, else wait until there is, or until more than `told` frames are done.

        Returns how many frames are done, and whether the frame was taken.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.over or self.done > told or self.has_room(frame.nbytes))
            fits = not self.over and self.has_room(frame.nbytes)
            if fits:
                self.frames.append(frame)
                self.size += frame.nbytes
                self.changed.notify()
            return self.done, fits

    def end(self, **state: bool) -> None:
        """Say that no further frame comes, or that making them has failed."""
        with self.changed:
            vars(self).update(state)
            self.changed.notify()

    def rest(self, told: int) -> int:
        """Wait until more than `told` frames are done or the work has ended. Returns how many are done."""
        with self.changed:
            self.changed.wait_for(lambda: self.over or self.done > told)
            return self.done

    def result(self) -> Result:
        if self.errors:
            raise self.errors.pop()     # popped, so that the error and its traceback do not hold each other
        return self.results[0]


def beside(frames: Iterable[np.ndarray], work: Callable[[Iterator[np.ndarray]], Result],
           on_done: Callable[[int], None] | None = None) -> Result:
    """The result of `work(frames)`. It runs in a thread of its own while this thread makes the frames.

    A bounded number of frames waits in between. If either side fails, the other one is stopped, and the error of the
    first is raised here. The thread has ended when this returns or raises, and a generator of frames is closed.

    Args:
        frames: made in this thread. A frame must not be changed after it was given.
        work: takes every frame, in order.
        on_done: called in this thread with 1, 2, ... after the work on so many frames. It may raise.
    """
    line: _Line[Result] = _Line()
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        while told < done:
            told += 1
            if on_done is not None:
                on_done(told)
    thread = threading.Thread(target=contextvars.copy_context().run, args=(line.work, work), name="video_ldm encoder")
    thread.start()
    try:
        for frame in frames:
            taken = False
            while not taken and not line.over:
                done, taken = line.put(frame, told)
                tell(done)
            if line.over:
                break
        line.end(complete=True)
        while not line.over:
            tell(line.rest(told))
    except BaseException:
        line.end(stopped=True)
        raise
    finally:
        thread.join()
        if line.stopped:
            line.errors.clear()     # the work's own end tells nothing more
        if isinstance(frames, Generator):
            frames.close()
    made = line.result()
    tell(line.done)
    return made
