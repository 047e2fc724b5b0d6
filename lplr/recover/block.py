"""Block reconstruction: what is left to choose in a compressed block, chosen so that it does what the original block did.

    minimise  E_t ||f(x_t) - y_t||^2 / ||y_t||^2      over latents, scales, norms and biases,

x the inputs of the block behind everything that is compressed before it, y the outputs of the original block in the original
model.  What follows a block of today's models looks at y_t / ||y_t|| (a norm), so errors count in these units; the few tokens of
huge norm would drown all others.
Sources: Li et al., "BRECQ", ICLR 2021 (reconstruction by blocks); Shao et al., "OmniQuant", ICLR 2024, Chen et al.,
"EfficientQAT", ACL 2025 (on the compressed prefix's inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lplr.recover.descend import Group
from lplr.recover.latent import Applied, Latent


@dataclass
class Tunable:
    """A block's tensors as functions of parameters: packed matrices by latents, the rest (norms, biases) by itself.

    latents are by the names of the linear layers in the block, which `applied` puts them in the place of; the rest is by the
    block's own names, as are dtypes, that the rest is stored in; `fixed` are tensors that nothing changes.
    """

    latents: Mapping[str, Latent]
    rest: Mapping[str, nn.Parameter] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, float32, with the values that would be stored, for the block as `applied` makes it; differentiable."""
        out = {f"{layer}.{name}": tensor for layer, latent in self.latents.items() for name, tensor in latent.tensors().items()}
        out |= self.fixed
        return out | {name: p + (p.detach().to(self.dtypes[name]).float() - p).detach() for name, p in self.rest.items()}

    def groups(self, lr: float, scale_lr: float, *, every: int = 1) -> list[Group]:
        """The parameters with the step sizes of the latents, which move once in `every` steps, and of everything else."""
        codes = [p for latent in self.latents.values() for p in latent.codes()]
        scales = [p for latent in self.latents.values() for p in latent.scales()]
        return [Group(codes, lr, every), Group([*scales, *self.rest.values()], scale_lr)]

    def stored(self) -> dict[str, Tensor]:
        """Name -> tensor of the rest, in the type that it is stored in."""
        return {name: p.detach().to(self.dtypes[name]) for name, p in self.rest.items()}


def applied(block: nn.Module, latents: Mapping[str, Latent]) -> nn.Module:
    """A copy of a block, its tensors the same ones, with `Applied` for the linear layers of these names."""
    made = deepcopy(block, {id(t): t for t in (*block.parameters(), *block.buffers())})
    for name, latent in latents.items():
        made.set_submodule(name, Applied(latent, bias=getattr(block.get_submodule(name), "bias", None) is not None))
    return made


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ||found - wanted||^2 / ||wanted||^2, (..., d) each; a token that should be zero counts absolutely."""
    size = wanted.square().sum(-1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return ((found - wanted).square().sum(-1) / size).mean()
