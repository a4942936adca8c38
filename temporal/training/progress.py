"""The progress of a training on stderr: tqdm's bar in a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

QUIET_SECONDS = 30.0    # between lines when stderr is a file, where a line cannot be redrawn


class Progress:
    """Shows how far a training is.

    Args:
        title: what is trained.
        total: steps in all.
        start: steps that were done before this run.
        stream: stderr by default.
        enabled: False shows nothing, for processes beside the first.
    """

    def __init__(self, title: str, total: int, start: int = 0, stream=None, enabled: bool = True):
        self.title, self.total, self.start, self.enabled = title, total, start, enabled
        self.stream = stream or sys.stderr
        self.terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self.begun = self.shown = time.monotonic()
        self.bar: tqdm | None = None
        if enabled and self.terminal:
            self.bar = tqdm(desc=title, total=total, initial=start, file=self.stream, unit=" steps", mininterval=0.2,
                            dynamic_ncols=True)

    def update(self, done: int, figures: dict[str, float] | None = None, force: bool = False) -> None:
        """Show `done` of the total and a dict of figures, unless that was shown a moment ago. force: in any case."""
        if self.bar is not None:
            self.bar.set_postfix_str(described(figures or {}), refresh=False)
            self.bar.update(done - self.bar.n)
            if force:
                self.bar.refresh()
            return
        now = time.monotonic()
        if self.enabled and (force or now - self.shown >= QUIET_SECONDS):
            self.shown = now
            self.stream.write(self.line(done, figures or {}, now - self.begun) + "\n")
            self.stream.flush()

    def line(self, done: int, figures: dict[str, float], seconds: float) -> str:
        """'title:  50%|##5  | 60/120 [00:10<00:15,  4.00 steps/s, loss 0.1235]', as tqdm writes it."""
        return tqdm.format_meter(done, self.total, seconds, ncols=120, prefix=self.title, ascii=True, unit=" steps",
                                 initial=self.start, postfix=described(figures))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def described(figures: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in figures.items())
