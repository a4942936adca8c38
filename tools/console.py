"""How a run over HTTP is shown in a terminal."""

import sys
import time


class ProgressLine:
    """Called with a client's events; one line per node, with its steps. In a log file it prints less often."""

    def __init__(self, prompt, stream=None):
        self.titles = {node_id: (node.get("_meta") or {}).get("title") or node["class_type"]
                       for node_id, node in prompt.items()}
        self.stream = stream or sys.stdout
        self.node, self.began, self.shown, self.steps = None, 0.0, 0.0, ""

    def __call__(self, kind, data):
        if kind == "executing":
            self.close()
            if data.get("node") is not None:
                self.node, self.began, self.shown, self.steps = data["node"], time.monotonic(), 0.0, ""
                self.show()
        elif kind == "progress" and data.get("node") == self.node:
            self.steps = f" {data['value']}/{data['max']}"
            interval = 0.1 if self.stream.isatty() else 10.0
            if time.monotonic() - self.shown > interval:
                self.show()

    def show(self):
        self.shown = time.monotonic()
        if self.stream.isatty():
            self.stream.write(f"\r  {self.titles.get(self.node, self.node)}{self.steps}   ")
        elif self.steps:
            self.stream.write(f"  {self.titles.get(self.node, self.node)}{self.steps}\n")
        self.stream.flush()

    def close(self):
        """End the current node's line with the time it took."""
        if self.node is not None:
            start = "\r" if self.stream.isatty() else ""
            seconds = time.monotonic() - self.began
            self.stream.write(f"{start}  {self.titles.get(self.node, self.node)}{self.steps}  {seconds:.1f} s\n")
            self.stream.flush()
        self.node = None
