"""Scene layouts: the conditioner of boxes and labels, and its cross-attentions for one image model; read and written.

A safetensors file whose tensors are those of `temporal.scene_layout.SceneLayout`, and `null_text` (l d): the image model's
embedding of an empty prompt, for pictures that are described by their layout alone. The metadata rebuilds the rest:

    format, version             what this is; another version than VERSION is refused
    params                      LayoutParams as JSON
    base_family, base_context_dim, licence
    most_boxes                  optional: how many boxes a picture had at most in training
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..atomic import write_atomically
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
MOST_BOXES = 64         # in one picture, where a file does not say how many it was trained with
DEMO_BOXES = 3          # of the bundled file, which does not say it either
RESERVED = ("format", "version", "params", "base_family", "base_context_dim", "licence")
LARGEST = 100_000       # of any size


@dataclass
class LayoutFile:
    """Ready for `SceneLayout(params).load_state_dict(tensors)`; null_text `l d`; most_boxes: of a picture that it was
    trained on."""

    name: str
    params: LayoutParams
    tensors: dict[str, Tensor]
    null_text: Tensor
    base: Base
    licence: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    most_boxes: int = MOST_BOXES


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    if metadata.get("format") == FORMAT:
        return Identified("scene_layout", TITLE, "Choose it in Scene Layout.", takes="layout")
    return None


def load(file: TensorFile, found: Identified | None = None) -> LayoutFile:
    """The content of an open file; raises VideoLDMError where its parts do not agree."""
    require_version(file.name, TITLE, file.metadata, VERSION)
    try:
        params = parse_params(file.metadata["params"], len(file.shapes))
        base = Base(text_of(file.metadata["base_family"], "base_family"),
                    whole(file.metadata["base_context_dim"], "base_context_dim", 1, LARGEST, text=True))
        licence = text_of(file.metadata.get("licence", ""), "licence")
        most = DEMO_BOXES if base.family == DEMO else MOST_BOXES
        if "most_boxes" in file.metadata:
            most = whole(file.metadata["most_boxes"], "most_boxes", 1, LARGEST, text=True)
        wanted = tensors_of(params)
    except (KeyError, ValueError, RuntimeError, ArithmeticError) as error:
        raise VideoLDMError(f"{file.name} is {TITLE} whose metadata is damaged ({first_line(error)}). Write or "
                            "download it again.") from None
    check_tensors(file, wanted, base)
    tensors = file.read(file.shapes)
    require_one_dtype(file.name, tensors)
    notes = {key: value for key, value in file.metadata.items() if key not in RESERVED}
    return LayoutFile(file.name, params, tensors, tensors.pop(NULL_TEXT).float(), base, licence, notes, most)


def parse_params(text: str, held: int) -> LayoutParams:
    """held: how many tensors the file holds. Every label, layer and site has one of its own, so there are no more."""
    stored = entries_of(parsed_json(text, "params"), "params", tuple(LayoutParams.__dataclass_fields__))
    labels = tuple((text_of(name, "the name of a label"), texts_of(values, "the values of a label"))
                   for name, values in pairs_of(stored["labels"], "labels", held))
    sites = tuple((whole(site, "the number of a site", 0, LARGEST), whole(channels, "channels", 1, LARGEST))
                  for site, channels in pairs_of(stored["sites"], "sites", held))
    if len(dict(sites)) < len(sites):
        raise ValueError("a site is named twice")
    width = whole(stored["width"], "width", 1, LARGEST)
    heads = whole(stored["heads"], "heads", 1, width)
    if width % heads:
        raise ValueError(f"a width of {width} does not divide into {heads} heads")
    return LayoutParams(texts_of(stored["colours"], "colours"), labels, width, heads,
                        whole(stored["layers"], "layers", 0, held), whole(stored["frequencies"], "frequencies", 1, 64),
                        sites)


def texts_of(value, what: str) -> tuple[str, ...]:
    return tuple(text_of(text, what) for text in list_of(value, what, LARGEST))


def pairs_of(value, what: str, most: int) -> list[list]:
    return [list_of(pair, f"an entry of {what}", 2, 2) for pair in list_of(value, what, most)]


def tensors_of(params: LayoutParams) -> dict[str, tuple]:
    scene = SceneLayout(params, Factory(device="meta"))
    return {key: tuple(tensor.shape) for key, tensor in scene.state_dict().items()}


def check_tensors(file: TensorFile, wanted: dict[str, tuple], base: Base):
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


def write(path, tensors: Mapping[str, Tensor], params: LayoutParams, null_text: Tensor, *, base: Base, licence: str,
          metadata: Mapping[str, str] = {}):
    """Write a file that `load` gives back to the bit; whole or not at all."""
    clash = sorted(set(metadata) & set(RESERVED))
    if clash:
        raise ValueError(f"the metadata entry {clash[0]} belongs to the format")
    given, wanted = {key: tuple(tensor.shape) for key, tensor in tensors.items()}, tensors_of(params)
    if given != wanted:
        raise ValueError(f"tensors and params disagree, first at {sorted(given.items() ^ wanted.items())[0][0]}")
    if null_text.ndim != 2 or null_text.shape[1] != base.context_dim:
        raise ValueError(f"null_text is l {base.context_dim}, not {tuple(null_text.shape)}")
    header = {"format": FORMAT, "version": str(VERSION), "params": json.dumps(asdict(params)),
              "base_family": base.family, "base_context_dim": str(base.context_dim), "licence": licence,
              **{key: str(value) for key, value in metadata.items()}}
    dtype = next(iter(tensors.values())).dtype
    stored = {**tensors, NULL_TEXT: null_text.to(dtype)}
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in stored.items()}
    write_atomically(Path(path), lambda temporary: save_file(stored, temporary, metadata=header))
