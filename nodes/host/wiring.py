"""Which outputs of a node are connected.

ComfyUI does not tell a node which of its outputs are connected. Some outputs cost much: IMAGE holds every frame of a
video in memory. For these the node looks into the prompt.
"""

import sys
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker

from .sockets import Hidden


def is_used(hidden: Hidden, slot: int) -> bool:
    """Whether an output of the running node is connected.

    A node that is not in the prompt, such as one of an expanded group, counts as connected.

    hidden: its `cls.hidden` (prompt, unique_id). slot: the output's number.
    """
    prompt, node = getattr(hidden, "prompt", None) or {}, str(getattr(hidden, "unique_id", ""))
    return node not in prompt or node in users_of(prompt, slot)


def users_of(prompt: dict, slot: int) -> set[str]:
    """Ids of the nodes whose output number `slot` is connected."""
    links = (value for node in prompt.values() for value in node.get("inputs", {}).values())
    return {str(link[0]) for link in links if isinstance(link, list) and len(link) == 2 and link[1] == slot}


def used_in_running(kind: str, slot: int) -> list[str]:
    """Ids of the running prompt's nodes of a kind whose output is connected.

    A node that makes only the connected outputs has this in its fingerprint. Connecting an output then makes it run
    again.
    """
    running = server()
    if running is None:
        return []
    prompts = [item[2] for item in running.prompt_queue.get_current_queue()[0]]
    return sorted(node for prompt in prompts for node in users_of(prompt, slot)
                  if prompt.get(node, {}).get("class_type") == kind)


def server() -> Any:
    """The running ComfyUI server. None in scripts and tests."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def blocked_output(message: str) -> ExecutionBlocker:
    """The value of an output that was not made. A node that gets it does not run, and shows the message."""
    return ExecutionBlocker(message)
