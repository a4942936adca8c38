"""How a run over HTTP is shown in a terminal, or line by line in a file."""

import sys
import time

from tqdm import tqdm

QUIET_SECONDS = 10.0        # between two lines about one node where there is no terminal
WITH_STEPS = "{desc} {n_fmt}/{total_fmt} |{bar:24}| {elapsed}<{remaining}"
WITHOUT_STEPS = "{desc} {elapsed}"


class NodeProgress:
    """Called with a client's events, shows one line per node: a bar in a terminal, elsewhere lines now and then."""

    def __init__(self, prompt: dict, stream=None):
        self.titles = {node_id: (node.get("_meta") or {}).get("title") or node["class_type"]
                       for node_id, node in prompt.items()}
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.node: str | None = None    # the node that runs
        self.steps = ""                 # how far it is: " 3/20"
        self.began = self.shown = 0.0   # when the node began, and when its last line was printed
        self.bar: tqdm | None = None    # of the node that runs, in a terminal

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "executing":
            self.close()
            if data.get("node") is not None:
                self.open(data["node"])
        elif kind == "progress" and data.get("node") == self.node and self.node is not None:
            self.update(data["value"], data["max"])

    @property
    def title(self) -> str:
        return f"  {self.titles.get(self.node, self.node)}"

    def open(self, node: str) -> None:
        """Begin the line of a node."""
        self.node, self.began, self.shown, self.steps = node, time.monotonic(), 0.0, ""
        if self.terminal:
            self.bar = tqdm(desc=self.title, file=self.stream, bar_format=WITHOUT_STEPS, leave=False)

    def update(self, value: int, most: int) -> None:
        """Show that a node has done `value` of `most` steps."""
        self.steps = f" {value}/{most}"
        if self.bar is not None:
            self.bar.bar_format, self.bar.total = WITH_STEPS, most
            self.bar.update(value - self.bar.n)
        elif time.monotonic() - self.shown > QUIET_SECONDS:
            self.shown = time.monotonic()
            self.line("")

    def close(self) -> None:
        """End the current node's line with the time it took."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.node is not None:
            self.line(f"  {time.monotonic() - self.began:.1f} s")
        self.node = None

    def line(self, end: str) -> None:
        self.stream.write(f"{self.title}{self.steps}{end}\n")
        self.stream.flush()
