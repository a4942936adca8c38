"""The names of a file's tensors: removing wrappers' prefixes, and searching."""

import re
from collections.abc import Iterable, Mapping

PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.diffusion_model.", "unet.", "controlnet.")


def bare(key: str) -> str:
    """A key without the prefixes of training wrappers and whole checkpoints."""
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key[len(prefix):]
    return key


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """{bare key: the file's own key}. If two keys have the same bare key, the first one is kept."""
    names: dict[str, str] = {}
    for key in keys:
        names.setdefault(bare(key), key)
    return names


class Keys:
    """The names and shapes of a file's tensors.

    They are searched with regular expressions, which match from the start of a name.
    """

    def __init__(self, shapes: Mapping[str, tuple]) -> None:
        """shapes: by the file's own keys."""
        self.shapes = {bare(key): tuple(shape) for key, shape in shapes.items()}
        self.text = "\n".join(self.shapes)
        self.whole = any(key.startswith("model.diffusion_model.") for key in shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def has(self, pattern: str) -> bool:
        """Whether the pattern matches a name."""
        anywhere = pattern.removeprefix(".*")       # the same search, many times faster
        return re.search(anywhere if anywhere != pattern else f"^(?:{pattern})", self.text, re.MULTILINE) is not None

    def all(self, pattern: str) -> bool:
        """Whether the pattern matches all names, and there is one."""
        matcher = re.compile(pattern)
        return bool(self.shapes) and all(matcher.match(key) for key in self.shapes)

    def found(self, pattern: str) -> set[str]:
        """The different values of the pattern's first group."""
        return {match.group(1) for match in re.finditer(f"^(?:{pattern})", self.text, re.MULTILINE)}

    def shape(self, pattern: str) -> tuple:
        """The shape of the first tensor whose name matches. (): none matches."""
        match = re.search(f"^(?:{pattern}).*$", self.text, re.MULTILINE)
        return self.shapes[match.group(0)] if match else ()
