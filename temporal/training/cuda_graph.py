"""A training step as a CUDA graph: forward and backward of a loss are recorded once and replayed for every step.

With small networks a GPU waits for the CPU, which launches thousands of operations one by one. A replay launches them
all at once. Clipping, the optimizer and the average are few operations and stay outside.
"""

from typing import Any

import torch

from ..errors import VideoLDMError
from .loss_inputs import RecordableLoss, map_tensors, tensors_of

WARMUP = 3              # runs before the recording: libraries choose their kernels and take their workspaces in them


class RecordedStep:
    """`figures(step)` leaves the gradients with the trained parameters, as a backward pass does.

    Args:
        loss: draws the inputs.
        forward: the loss's compute, under the loop's precision.
        parameters: what is trained. Their gradients belong to the recording and must not be set to None.
        device: a GPU.
    """

    def __init__(self, loss: RecordableLoss, forward, parameters, device: torch.device):
        self.loss, self.forward, self.parameters, self.device = loss, forward, parameters, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Any = None                             # what the recording reads, on the GPU
        self.outputs: dict[str, torch.Tensor] = {}          # the figures that a replay leaves

    def figures(self, step) -> dict[str, torch.Tensor]:
        """The loss's figures. step: a StepContext of the CPU, where everything is drawn."""
        inputs = self.loss.draw(step)
        graph = self.graph or self.record(inputs)
        fill(self.inputs, inputs)
        graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}

    def record(self, inputs) -> torch.cuda.CUDAGraph:
        """Run the step a few times, then record it. The inputs only have the shapes that matter."""
        self.inputs = map_tensors(inputs, lambda tensor: tensor.to(self.device))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.random.fork_rng(devices=[self.device]):
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    self.backward()
                    self.forget_gradients()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    self.outputs = self.backward()
            except RuntimeError as error:
                raise VideoLDMError(f"This training cannot be recorded as a CUDA graph: {error}. Its loss does "
                                    "something that has to wait for the GPU; train it with "
                                    "cuda_graph=False.") from error
        self.graph = graph
        return graph

    def backward(self):
        figures = self.forward(self.inputs)
        figures["loss"].backward()
        return {name: value.detach().float() for name, value in figures.items()}

    def forget_gradients(self):
        for parameter in self.parameters:
            parameter.grad = None


def fill(recorded, inputs) -> None:
    """Copy inputs into the tensors that a recording reads, without waiting for the GPU."""
    old, new = tensors_of(recorded), tensors_of(inputs)
    if [tensor.shape for tensor in old] != [tensor.shape for tensor in new]:
        raise VideoLDMError("A recorded training takes batches of one shape, and this step drew others than the first. "
                            "Train with cuda_graph=False.")
    for target, source in zip(old, new, strict=True):
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
