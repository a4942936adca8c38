"""A progress line on stderr, without any extra requirement."""

import sys
import time

BAR = 24
QUIET_SECONDS = 30      # between lines when stderr is a file, where a line cannot be redrawn


def clock(seconds):
    """75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Redraws one line in a terminal; elsewhere prints a line now and then."""

    def __init__(self, title, total, start=0, stream=None, enabled=True):
        self.title, self.total, self.start = title, total, start
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self.terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self.begun = time.monotonic()
        self.drawn = None if self.terminal else self.begun

    def update(self, done, figures=None, force=False):
        """Draw `done` of the total and a dict of figures, unless a line was drawn a moment ago."""
        now = time.monotonic()
        pause = 0.2 if self.terminal else QUIET_SECONDS
        if not self.enabled or (not force and self.drawn is not None and now - self.drawn < pause):
            return
        self.drawn = now
        line = self.line(done, figures or {}, now - self.begun)
        self.stream.write(f"\r{line}\x1b[K" if self.terminal else line + "\n")
        self.stream.flush()

    def line(self, done, figures, seconds):
        """'title [####----] 120/1000 loss 0.1234 3.20 steps/s 4:35 left'"""
        filled = BAR * done // max(self.total, 1)
        parts = [self.title, f"[{'#' * filled}{'-' * (BAR - filled)}]", f"{done}/{self.total}"]
        parts += [f"{name} {value:.4g}" for name, value in figures.items()]
        if done > self.start and seconds > 0:
            speed = (done - self.start) / seconds
            parts += [f"{speed:.2f} steps/s", f"{clock((self.total - done) / speed)} left"]
        return " ".join(parts)

    def close(self):
        if self.enabled and self.terminal:
            self.stream.write("\n")
            self.stream.flush()
