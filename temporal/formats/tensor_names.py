"""The names of a file's tensors: unwrapping them, and asking what is there."""

import re
from collections.abc import Mapping

PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.diffusion_model.", "unet.")


def bare(key: str) -> str:
    """A key without what training wrappers and whole checkpoints put in front of a UNet's own names."""
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key[len(prefix):]
    return key


def bare_names(keys) -> dict[str, str]:
    """{bare key: key as the file has it}; of two keys that unwrap to one, the first keeps the bare name."""
    names = {}
    for key in keys:
        names.setdefault(bare(key), key)
    return names


class Keys:
    """Names and shapes of a file's tensors, searched with regular expressions that match from a name's start."""

    def __init__(self, shapes: Mapping[str, tuple]):
        self.shapes = {bare(key): tuple(shape) for key, shape in shapes.items()}
        self.text = "\n".join(self.shapes)
        self.whole = any(key.startswith("model.diffusion_model.") for key in shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def has(self, pattern: str) -> bool:
        anywhere = pattern.removeprefix(".*")       # the same, found many times faster
        return re.search(anywhere if anywhere != pattern else f"^(?:{pattern})", self.text, re.MULTILINE) is not None

    def all(self, pattern: str) -> bool:
        matcher = re.compile(pattern)
        return bool(self.shapes) and all(matcher.match(key) for key in self.shapes)

    def found(self, pattern: str) -> set[str]:
        """The distinct values of the pattern's first group."""
        return {match.group(1) for match in re.finditer(f"^(?:{pattern})", self.text, re.MULTILINE)}

    def shape(self, pattern: str) -> tuple:
        """Shape of the first tensor whose name matches, () where none does."""
        match = re.search(f"^(?:{pattern}).*$", self.text, re.MULTILINE)
        return self.shapes[match.group(0)] if match else ()
