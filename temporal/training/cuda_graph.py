"""A training step as a CUDA graph: forward and backward of a loss recorded once, then played again for every step.

Small networks keep a GPU waiting for the CPU, which asks for their thousands of operations one by one; a recording asks
for them all at once. Clipping, the optimizer and the average are few operations and stay outside.
"""

import torch

from ..errors import VideoLDMError
from .loss_inputs import RecordableLoss, map_tensors, tensors_of

WARMUP = 3              # runs before the recording, in which libraries choose their kernels and take their workspaces


class RecordedStep:
    """`figures(step)` leaves the gradients of the trained parameters where a backward pass would have left them.

    loss: a RecordableLoss. forward(drawn): its compute under the loop's precision. parameters: what is trained; their
    gradients belong to the recording from then on and must not be set to None.
    """

    def __init__(self, loss: RecordableLoss, forward, parameters, device: torch.device):
        self.loss, self.forward, self.parameters, self.device = loss, forward, parameters, device
        self.graph = self.inputs = self.outputs = None

    def figures(self, step) -> dict[str, torch.Tensor]:
        """step: a StepContext of the CPU, where everything is drawn."""
        drawn = self.loss.draw(step)
        if self.graph is None:
            self.record(drawn)
        fill(self.inputs, drawn)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}

    def record(self, drawn):
        self.inputs = map_tensors(drawn, lambda tensor: tensor.to(self.device))
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
                raise VideoLDMError(f"This training cannot be recorded as a CUDA graph: {error}. Its loss does something "
                                    "that has to wait for the GPU; train it with cuda_graph=False.") from error
        self.graph = graph

    def backward(self):
        figures = self.forward(self.inputs)
        figures["loss"].backward()
        return {name: value.detach().float() for name, value in figures.items()}

    def forget_gradients(self):
        for parameter in self.parameters:
            parameter.grad = None


def fill(inputs, drawn):
    """Copy what was drawn into the tensors that a recording reads, without waiting for the GPU."""
    old, new = tensors_of(inputs), tensors_of(drawn)
    if [tensor.shape for tensor in old] != [tensor.shape for tensor in new]:
        raise VideoLDMError("A recorded training takes batches of one shape, and this step drew others than the first. "
                            "Train with cuda_graph=False.")
    for target, source in zip(old, new):
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
