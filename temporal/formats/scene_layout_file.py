"""Scene layouts: reading and writing files of `temporal.scene_layout.SceneLayout`.

A file is a safetensors file with the network's tensors and `null_text` (l d). This is the image model's embedding of an
empty prompt, for pictures that are described by their layout alone. The metadata rebuilds the rest:

    format, version             other versions than VERSION are refused
    params                      LayoutParams as JSON
    base_family, base_context_dim, licence
    most_boxes                  optional: the largest number of boxes per picture in training
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..atomic import StrPath, write_atomically
from ..errors import VideoLDMError
from ..layers import Factory
from ..scene_layout import LayoutParams, SceneLayout
from .contents import first_line
from .files import TensorFile
from .metadata import entries_of, list_of, parsed_json, text_of, whole
from .temporal_file import DEMO, Base, Identified, require_one_dtype, require_version
from .tensor_names import Keys

FORMAT = "video_ldm_scene_layout"
VERSION = 1
TITLE = "a scene layout file"
NULL_TEXT = "null_text"
MOST_BOXES = 64         # boxes per picture, for files that do not state most_boxes
DEMO_BOXES = 3          # the same for the bundled file, which does not state it
RESERVED = ("format", "version", "params", "base_family", "base_context_dim", "licence")
LARGEST = 100_000       # the largest number that metadata may hold


@dataclass
class LayoutFile:
    """The content of a file, ready for `SceneLayout(params).load_state_dict(tensors)`."""

    name: str                                                   # the file's name
    params: LayoutParams
    tensors: dict[str, Tensor]                                  # of SceneLayout
    null_text: Tensor                                           # `l d`, float32
    base: Base                                                  # the image model it was trained on
    licence: str = ""
    metadata: dict[str, str] = field(default_factory=dict)      # entries that are not the format's
    most_boxes: int = MOST_BOXES                                # the largest number of boxes per picture in training


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a file by its metadata."""
    if metadata.get("format") == FORMAT:
        return Identified("scene_layout", TITLE, "Choose it in Scene Layout.", takes="layout")
    return None


def load(file: TensorFile, found: Identified | None = None) -> LayoutFile:
    """Load a file. Raises VideoLDMError if metadata and tensors do not agree."""
    params, base, licence, most = parse_metadata(file)
    try:
        wanted = tensors_of(params)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise damaged_metadata(file, error) from None
    check_tensors(file, wanted, base)
    tensors = file.read(file.shapes)
    require_one_dtype(file.name, tensors)
    notes = {key: value for key, value in file.metadata.items() if key not in RESERVED}
    return LayoutFile(file.name, params, tensors, tensors.pop(NULL_TEXT).float(), base, licence, notes, most)


def parse_metadata(file: TensorFile) -> tuple[LayoutParams, Base, str, int]:
    """params, image model, licence and the largest number of boxes. Raises VideoLDMError if they are wrong."""
    require_version(file.name, TITLE, file.metadata, VERSION)
    try:
        params = parse_params(file.metadata["params"], len(file.shapes))
        base = Base(text_of(file.metadata["base_family"], "base_family"),
                    whole(file.metadata["base_context_dim"], "base_context_dim", 1, LARGEST, text=True))
        licence = text_of(file.metadata.get("licence", ""), "licence")
        most = DEMO_BOXES if base.family == DEMO else MOST_BOXES
        if "most_boxes" in file.metadata:
            most = whole(file.metadata["most_boxes"], "most_boxes", 1, LARGEST, text=True)
    except (KeyError, ValueError, RuntimeError, ArithmeticError) as error:
        raise damaged_metadata(file, error) from None
    return params, base, licence, most


def damaged_metadata(file: TensorFile, error: Exception) -> VideoLDMError:
    return VideoLDMError(f"{file.name} is {TITLE} whose metadata is damaged ({first_line(error)}). Write or "
                         "download it again.")


def parse_params(text: str, tensors: int) -> LayoutParams:
    """The params in the metadata. Raises ValueError if they are wrong.

    tensors: the number of tensors in the file. Every label, layer and site has a tensor of its own, so there cannot be
    more of them.
    """
    stored = entries_of(parsed_json(text, "params"), "params", tuple(LayoutParams.__dataclass_fields__))
    labels = tuple((text_of(name, "the name of a label"), texts_of(values, "the values of a label"))
                   for name, values in pairs_of(stored["labels"], "labels", tensors))
    sites = tuple((whole(site, "the number of a site", 0, LARGEST), whole(channels, "channels", 1, LARGEST))
                  for site, channels in pairs_of(stored["sites"], "sites", tensors))
    if len(dict(sites)) < len(sites):
        raise ValueError("a site is named twice")
    width = whole(stored["width"], "width", 1, LARGEST)
    heads = whole(stored["heads"], "heads", 1, width)
    if width % heads:
        raise ValueError(f"a width of {width} does not divide into {heads} heads")
    return LayoutParams(texts_of(stored["colours"], "colours"), labels, width, heads,
                        whole(stored["layers"], "layers", 0, tensors),
                        whole(stored["frequencies"], "frequencies", 1, 64),
                        sites)


def texts_of(value: object, what: str) -> tuple[str, ...]:
    """Check that a value is a list of texts, and return it."""
    return tuple(text_of(text, what) for text in list_of(value, what, LARGEST))


def pairs_of(value: object, what: str, most: int) -> list[list]:
    """Check that a value is a list of at most `most` pairs, and return it."""
    return [list_of(pair, f"an entry of {what}", 2, 2) for pair in list_of(value, what, most)]


def tensors_of(params: LayoutParams) -> dict[str, tuple]:
    """{name: shape} of all tensors of a SceneLayout."""
    scene = SceneLayout(params, Factory(device="meta"))
    return {key: tuple(tensor.shape) for key, tensor in scene.state_dict().items()}


def check_tensors(file: TensorFile, wanted: dict[str, tuple], base: Base) -> None:
    """Raise VideoLDMError unless the file holds exactly the wanted tensors and null_text."""
    shapes = dict(file.shapes)
    text = shapes.pop(NULL_TEXT, ())
    if len(text) != 2 or text[1] != base.context_dim:
        raise VideoLDMError(f"{file.name} is {TITLE} whose null_text has shape {list(text)} where a text of width "
                            f"{base.context_dim} is due. Write or download it again.")
    for key in sorted(shapes.keys() ^ wanted.keys()):
        fault = "lacks" if key in wanted else "has the unknown tensor"
        raise VideoLDMError(f"{file.name} is {TITLE} that {fault} {key}. Write or download it again.")
    for key, shape in wanted.items():
        if shapes[key] != shape:
            raise VideoLDMError(f"{file.name} is {TITLE} where {key} has shape {list(shapes[key])}, and {list(shape)} "
                                "is due. Write or download it again.")


def write(path: StrPath, tensors: Mapping[str, Tensor], params: LayoutParams, null_text: Tensor, *, base: Base,
          licence: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, completely or not at all. `load` returns the same content, to the bit.

    Args:
        path: of the file.
        tensors: the state dict of a SceneLayout.
        params: of the SceneLayout.
        null_text: the image model's embedding of an empty prompt, `l d`.
        base: the image model.
        licence: of the weights.
        metadata: further entries, text to text.

    Raises ValueError for tensors that do not fit, and for a further entry with one of the format's names.
    """
    metadata = metadata or {}
    clash = sorted(set(metadata) & set(RESERVED))
    if clash:
        raise ValueError(f"the metadata entry {clash[0]} belongs to the format")
    shapes, wanted = {key: tuple(tensor.shape) for key, tensor in tensors.items()}, tensors_of(params)
    if shapes != wanted:
        raise ValueError(f"tensors and params disagree, first at {sorted(shapes.items() ^ wanted.items())[0][0]}")
    if null_text.ndim != 2 or null_text.shape[1] != base.context_dim:
        raise ValueError(f"null_text is l {base.context_dim}, not {tuple(null_text.shape)}")
    header = {"format": FORMAT, "version": str(VERSION), "params": json.dumps(asdict(params)),
              "base_family": base.family, "base_context_dim": str(base.context_dim), "licence": licence,
              **{key: str(value) for key, value in metadata.items()}}
    dtype = next(iter(tensors.values())).dtype
    stored = {**tensors, NULL_TEXT: null_text.to(dtype)}
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in stored.items()}
    write_atomically(Path(path), lambda temporary: save_file(stored, temporary, metadata=header))
