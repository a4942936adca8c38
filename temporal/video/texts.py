"""The workflow as text, for the metadata of files."""

import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo


def metadata_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Each value as JSON text, as ComfyUI stores it.

    NaN becomes null. It is not JSON, and with it the browser could not read the workflow. Nodes that always run again
    leave NaN in a prompt.
    """
    def text(value: Any) -> str:
        if isinstance(value, str):
            return value
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))
    return {key: text(value) for key, value in metadata.items()}


def png_text(metadata: Mapping[str, Any]) -> PngInfo:
    """The metadata as PNG text chunks."""
    info = PngInfo()
    for key, text in metadata_text(metadata).items():
        info.add_text(key, text)
    return info
