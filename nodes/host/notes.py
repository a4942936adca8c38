"""What a node tells the artist on the page: its report, and what it warns of.

Most reports are an output that nobody connects. So the page shows them in the node, under its widgets
(web/js/notes.js), where they stay while the node does not run again. A page that is loaded anew shows them after the
node's next run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from comfy_execution.utils import get_executing_context

from .wiring import server

EVENT = "video_ldm.note"        # web/js/notes.js listens to it
REPORT = "report"               # the name of an output whose text the page shows

_warnings: ContextVar[list[str] | None] = ContextVar("video_ldm_warnings", default=None)
# What was warned of on a node of another pack that runs now: its run and id, and the texts.
_elsewhere: ContextVar[tuple[tuple[str, str], list[str]] | None] = ContextVar("video_ldm_elsewhere", default=None)


@contextmanager
def collected() -> Iterator[list[str]]:
    """A list that gets what is warned of while it is open. Open it around the work of one node."""
    found: list[str] = []
    token = _warnings.set(found)
    try:
        yield found
    finally:
        _warnings.reset(token)


def warn(text: str) -> None:
    """Tell the artist at once: in the log, and on the node that runs, which may be another pack's."""
    found = _warnings.get()
    if found is None:
        found = warnings_elsewhere()
    if text in found:
        return
    logging.warning("[Video LDM] %s", text)
    found.append(text)
    show("\n".join(f"Warning: {warning}" for warning in found))


def warnings_elsewhere() -> list[str]:
    """What was warned of so far on the running node of another pack. Core's KSampler may sample several times."""
    node, last = running_node(), _elsewhere.get()
    if node is None:
        return []
    if last is None or last[0] != node:
        last = node, []
        _elsewhere.set(last)
    return last[1]


def show(text: str) -> None:
    """Show a text in the running node."""
    send(EVENT, {"text": text})


def send(event: str, told: dict[str, Any]) -> None:
    """Tell the page something of the running node. Nothing happens in scripts and tests, where no server runs."""
    running, context = server(), get_executing_context()
    if running is not None and context is not None:
        running.send_sync(event, {"node": context.node_id, **told}, running.client_id)


def running_node() -> tuple[str, str] | None:
    """(id of the run, id of the node) of what ComfyUI executes now. None in scripts and tests."""
    context = get_executing_context()
    return None if context is None else (context.prompt_id, context.node_id)


def with_text(schema: Any, output: Any, warnings: list[str]) -> Any:
    """A node's output, with its warnings and report as text for the page.

    Args:
        schema: of the node.
        output: of its `execute`, a NodeOutput.
        warnings: what it warned of.
    """
    names = [declared.display_name or declared.id for declared in schema.outputs or []]
    report = output.result[names.index(REPORT)] if REPORT in names and output.result else None
    lines = [line for line in report.split("\n") if line.removeprefix("Warning: ") not in warnings] if report else []
    text = "\n".join([*(f"Warning: {warning}" for warning in warnings), *lines])
    if text:
        output.ui = {**(output.ui or {}), "text": (text,)}
    return output
