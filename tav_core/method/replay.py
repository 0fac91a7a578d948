"""A training step's launches on a GPU, recorded once and replayed.

A step of Stable Diffusion's UNet launches some ten thousand kernels, and on a fast card Python and autograd take longer
to launch them than the card to run them. A CUDA graph leaves that out; the numbers are the same.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Replayed:
    """`call`, which computes gradients from tensors on a CUDA device, of the same shapes each time.

    The first call runs as it is, the second is recorded, and it and all later ones are replayed. What they return, and
    the gradients, are overwritten by the next one. Where nothing can be recorded, all run as they are.

    Args:
        call: a loss of the tensors, after its backward pass.
        parameters: what gradients are of.
    """

    def __init__(self, call: Callable[..., Tensor], parameters: Sequence[nn.Parameter]):
        self.call, self.parameters = call, parameters
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None
        self.possible = torch.version.cuda is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None and self.output is not None and self.possible:
            self._record(inputs)
        if self.graph is None:
            self._forget()
            self.output = self.call(*inputs)
            return self.output
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        assert self.output is not None
        return self.output

    def release(self) -> None:
        """Give back the memory that a recorded step keeps from all else; the call after the next is recorded again."""
        self.graph, self.inputs, self.output = None, [], None
        self._forget()

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        torch.cuda.empty_cache()  # what is recorded has memory of its own
        self.inputs = [given.clone() for given in inputs]
        output = self.output
        assert output is not None
        # Nothing that outlives a step may be of the recorded memory: results go where the first call's are.
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as other packs', may go on with theirs.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for gradient in gradients:
                    gradient.zero_()
                output.copy_(self.call(*self.inputs))
            self.graph = graph
        except RuntimeError as error:
            log.info("Tune-A-Video: steps run one launch after the other, as they cannot be recorded (%s)", error)
            self.release()
            self.possible = False
