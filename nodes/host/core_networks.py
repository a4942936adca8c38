"""Networks of core's whose sizes a file shows: built without weights, and held against the shapes in the file."""

from collections.abc import Callable, Mapping

import comfy.model_detection
import torch
from torch import nn

from ...temporal.errors import VideoLDMError
from ...temporal.formats.contents import first_line


def network_of_sizes(shapes: Mapping[str, tuple], looks: str,
                     build: Callable[[dict], nn.Module]) -> tuple[nn.Module, dict]:
    """(the network that `build` makes of the sizes that core finds in a file, these sizes).

    Args:
        shapes: of the weights, by name in LDM's UNet.
        looks: the beginning of a sentence on the file: "NAME looks like KIND, but".
        build: makes the network from the sizes, which are arguments of core's UNet.

    Raises VideoLDMError where no network has the shapes of the file.
    """
    try:
        weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        found = comfy.model_detection.detect_unet_config(weights, "") or {}
        network = build(found)
        wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, KeyError, ArithmeticError) as error:
        raise VideoLDMError(f"{looks} no network has its sizes ({first_line(error)}). The file is damaged: download it "
                            "again.") from None
    for key in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(key) != shapes.get(key):
            raise VideoLDMError(f"{looks} {key} is {list(shapes.get(key, ())) or 'missing'} where "
                                f"{list(wanted.get(key, ())) or 'nothing'} is due. The file is damaged: download it "
                                "again.")
    return network, found
