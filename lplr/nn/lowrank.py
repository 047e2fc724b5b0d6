"""LowRankLinear: a linear layer whose weight W = P (Q + L R) O^T is held packed."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lplr.errors import CheckpointError
from lplr.factor.factorization import Factorization, Format
from lplr.kernels.hadamard import rotation_signs
from lplr.kernels.lowrank import Layer, lowrank_linear


class LowRankLinear(nn.Module):
    """y = x W^T + b with W = P (Q + L R) O^T (n x d), never formed in the forward pass.

    The stored tensors are buffers named as in `Format.layout`, so a state dict and a file hold the same names.  Their
    dtypes are part of the file format: `.to(dtype)`, `.half()` and the like move them but never cast them, and
    what is saved is byte for byte what was loaded.  The bias, a frozen parameter, is cast like any other.
    `dtype` is the floating type that the surrounding model runs in; only `weight` uses it.
    """

    def __init__(
        self,
        fmt: Format,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (fmt.rank or fmt.q_bits):
            raise CheckpointError(f"{fmt} holds neither L and R nor Q: compress the model again")
        self.format = fmt
        self.out_features, self.in_features = fmt.shape
        self.dtype = dtype if dtype is not None else torch.get_default_dtype()
        # no buffers: they are derived from the seeds, and follow the codes (`follow`)
        self._rotations = {
            "signs": rotation_signs(fmt.rotation, self.in_features) if fmt.rotation else None,
            "out_signs": rotation_signs(fmt.output_rotation, self.out_features) if fmt.output_rotation else None,
        }
        self._sizes = {
            "n": self.out_features,
            "rank": fmt.rank,
            "l_grid": (fmt.l_grid, fmt.l_bits),
            "r_grid": (fmt.r_grid, fmt.r_bits),
            "q_grid": (fmt.q_grid, fmt.q_bits),
            "q_narrow": fmt.q_narrow,
        }
        self._layer: Layer | None = None
        layout = fmt.layout()
        self._names = tuple(layout)
        for name, (shape, stored) in layout.items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored, device=device))
        self.bias: nn.Parameter | None
        if bias:
            zeros = torch.zeros(self.out_features, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_factorization(
        cls, f: Factorization, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> LowRankLinear:
        """The layer that holds f's own tensors, not copies; the bias is copied, and its dtype is the default one."""
        if bias is not None and dtype is None:
            dtype = bias.dtype
        module = cls(f.format, bias is not None, device="meta", dtype=dtype)
        module.load_factorization(f)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(module.dtype, copy=True), requires_grad=False)
        return module

    def load_factorization(self, f: Factorization) -> None:
        """Take over f's tensors; raises CheckpointError when f has another format."""
        if f.format != self.format:
            raise CheckpointError(f"the factorization has format {f.format}, {self.format} expected: compress it again")
        for name, tensor in f.tensors().items():
            setattr(self, name, tensor)

    def stored(self) -> dict[str, Tensor]:
        """Name -> stored tensor, in the order of `Format.layout`."""
        return {name: self._buffers[name] for name in self._names}  # type: ignore[misc]

    @property
    def factorization(self) -> Factorization:
        """The packed value of W; shares memory with the layer."""
        return Factorization.from_tensors(self.format, self.stored())

    @property
    def weight(self) -> Tensor:
        """W dequantized on demand, (n, d) in `dtype`: for code that asks a linear layer for its weight.  Not stored."""
        codes = next(iter(self.stored().values()))
        if codes.is_meta:
            return torch.empty(self.format.shape, dtype=self.dtype, device="meta")
        return self.factorization.dequantize().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., n) in x's dtype."""
        if torch.compiler.is_compiling():
            y = lowrank_linear(x, **self._sizes, **self.stored(), **self._rotations)
        else:
            layer = self._layer
            if layer is None or not all(map(is_, layer.stored, self._buffers.values())):
                self.follow()
                layer = self._layer = Layer(self._sizes, {**self.stored(), **self._rotations})
            y = layer(x)
        bias = self._parameters["bias"]  # what looks like self.bias is a search, as long as a small product
        return y if bias is None else y + bias.to(y.dtype)

    def follow(self) -> None:
        """Take the signs of the rotations to where the codes are: a copy in every product would bar it from CUDA graphs."""
        device = next(iter(self.stored().values())).device
        if device.type != "meta":
            self._rotations = {name: None if t is None else t.to(device) for name, t in self._rotations.items()}

    def forget(self) -> None:
        """Drop what was made of the stored tensors to multiply with them, and holds them: the next product makes it again."""
        self._layer = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of the stored tensors to multiply with them."""
        return {**self.__dict__, "_layer": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        """Move the stored tensors without casting them; note the dtype that the rest of the model was cast to."""
        stored = {id(tensor) for tensor in self._buffers.values()}
        device = next(iter(self.stored().values())).device

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in stored and moved.dtype != tensor.dtype else moved

        super()._apply(keep_dtype, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        self.follow()
        return self

    def extra_repr(self) -> str:
        """Sizes and bits, for print(model)."""
        fmt = self.format
        bits = "/".join(f"{b:.3g}" for b in (fmt.l_bits, fmt.r_bits, fmt.backbone_width))
        grids = "/".join(fmt.grids())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={fmt.rank}, "
            f"bits(L/R/Q)={bits}, {grids}, bits_per_weight={fmt.bits_per_weight:.3f}, bias={self.bias is not None}"
        )
