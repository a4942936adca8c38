"""PVDM's autoencoders and diffusion networks (docs/formats.md#pvdm). They are no temporal layers of an image model."""

from collections.abc import Mapping

from ..formats.files import TensorFile
from ..formats.temporal_file import Identified
from ..formats.tensor_names import Keys
from ..pvdm import files
from ..pvdm.files import PvdmFile
from .family import LOADERS, Family


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise either file."""
    kind = files.kind_of(keys.has, metadata)
    if kind is None:
        return None
    part = "autoencoder" if kind == files.AUTOENCODER else "diffusion"
    return Identified(kind, files.TITLES[kind], f"Load it with {LOADERS['pvdm']}, as {part}.", takes="pvdm")


def load(file: TensorFile, found: Identified) -> PvdmFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    return files.load(file, found.kind)


FAMILY = Family("PVDM's autoencoders and diffusion models, published or trained with this pack", "pvdm", detect, load)
