"""Unfinished results, which ComfyUI's cache must not give back.

ComfyUI caches a node's outputs by its inputs and its fingerprint. A node that returns an unfinished result counts it
here, and uses the count as its fingerprint. So the next run of the same graph finds a new fingerprint, and runs the
node again.
"""

import json

from .sockets import Hidden

_counts: dict[str, int] = {}        # {widgets of a node: its unfinished results}, for this process, as the cache is


def unfinished_results(widgets: dict) -> int:
    """How many results of these widgets were unfinished. widgets: the arguments of `fingerprint_inputs`."""
    return _counts.get(widgets_text(widgets), 0)


def count_unfinished(hidden: Hidden) -> None:
    """Count an unfinished result of the running node. hidden: its `cls.hidden` (dynprompt, unique_id)."""
    prompt = getattr(hidden, "dynprompt", None)
    if prompt is not None:
        widgets = widgets_text(prompt.get_node(hidden.unique_id)["inputs"])
        _counts[widgets] = _counts.get(widgets, 0) + 1


def widgets_text(inputs: dict) -> str:
    """The widgets' values as text. Links are left out: ComfyUI does not pass their values to `fingerprint_inputs`."""
    return json.dumps({name: value for name, value in sorted(inputs.items())
                       if value is not None and not isinstance(value, list)}, default=repr)
