"""Results that must not be taken from ComfyUI's cache as the result of their inputs: those that a cancel cut short.

ComfyUI keeps a node's outputs under its inputs and its fingerprint. A node that hands on an unfinished result counts it
here, and its fingerprint is that count: the next run of the same graph finds another fingerprint and makes the whole.
"""

import json

from .sockets import Hidden

_counts: dict[str, int] = {}        # of this process, as the cache is: widgets of a node -> unfinished results


def count(widgets: dict) -> int:
    """How many results of these widgets were unfinished. widgets: what `fingerprint_inputs` is given."""
    return _counts.get(key(widgets), 0)


def note(hidden: Hidden) -> None:
    """Count an unfinished result of the running node. hidden: its `cls.hidden` (dynprompt, unique_id)."""
    prompt = getattr(hidden, "dynprompt", None)
    if prompt is not None:
        widgets = key(prompt.get_node(hidden.unique_id)["inputs"])
        _counts[widgets] = _counts.get(widgets, 0) + 1


def key(inputs: dict) -> str:
    """The widgets' values, links left out: their values are not known where the fingerprint is asked for."""
    return json.dumps({name: value for name, value in sorted(inputs.items())
                       if value is not None and not isinstance(value, list)}, default=repr)
