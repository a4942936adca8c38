"""What of a node's outputs a workflow uses.

ComfyUI runs a node without telling it which of its outputs are connected. For outputs that cost much and may not be
wanted (every frame of a video in memory beside the video itself) the prompt is asked.
"""

import sys
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker

from .sockets import Hidden


def is_used(hidden: Hidden, slot: int) -> bool:
    """Whether the running node's output is connected, by its `cls.hidden` (prompt, unique_id). A node that is not in
    the prompt as it was sent, such as one in an expanded group, counts as connected."""
    prompt, node = getattr(hidden, "prompt", None) or {}, str(getattr(hidden, "unique_id", ""))
    return node not in prompt or node in users_of(prompt, slot)


def users_of(prompt: dict, slot: int) -> set[str]:
    """Ids of the nodes whose output number `slot` is an input of another."""
    links = (value for node in prompt.values() for value in node.get("inputs", {}).values())
    return {str(link[0]) for link in links if isinstance(link, list) and len(link) == 2 and link[1] == slot}


def used_in_running(kind: str, slot: int) -> list[str]:
    """Ids of the nodes of a kind in the running prompt whose output is connected: part of the fingerprint of a node
    that leaves unused outputs out, so that connecting one makes it run again."""
    running = server()
    if running is None:
        return []
    prompts = [item[2] for item in running.prompt_queue.get_current_queue()[0]]
    return sorted(node for prompt in prompts for node in users_of(prompt, slot)
                  if prompt.get(node, {}).get("class_type") == kind)


def server() -> Any:
    """The running ComfyUI; in scripts and tests there is none."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show_on_node(hidden: Hidden, text: str) -> None:
    """Write a text onto the running node in the page. hidden: its `cls.hidden` (unique_id)."""
    running, node = server(), getattr(hidden, "unique_id", None)
    if running is not None and node is not None and hasattr(running, "send_progress_text"):
        running.send_progress_text(text, node)


def left_out(message: str) -> ExecutionBlocker:
    """Stands in an output that was not made; whoever gets it all the same is not run, and says why."""
    return ExecutionBlocker(message)
