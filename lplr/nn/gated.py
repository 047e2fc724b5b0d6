"""Gated MLPs, down(act(gate x) * up x): finding one in a block, and what it is with some of its neurons only.

Neuron j is row j of gate and up and column j of down.  gate and up may be one layer, all rows of gate before those of up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lplr.nn.swap import is_conv1d, is_linear

# names of the layers that make the neurons, and of the one that reads them, as transformers calls them
NAMES = ((("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"))


@dataclass(frozen=True)
class GatedMLP:
    """name within the block; rows: names of the layers that make the neurons; down: of the one that reads them."""

    name: str
    module: nn.Module
    rows: tuple[str, ...]
    down: str

    @property
    def neurons(self) -> int:
        """How many there are."""
        return self.module.get_submodule(self.down).get_parameter("weight").shape[1]

    def squares(self) -> Tensor:
        """Sum of squares of the weights of each neuron, in gate, up and down, (neurons,)."""
        parts = [self.module.get_submodule(name).get_parameter("weight").detach() for name in self.rows]
        made = torch.cat(parts).float().square().sum(1).view(-1, self.neurons).sum(0)
        return made + self.module.get_submodule(self.down).get_parameter("weight").detach().float().square().sum(0)

    def narrow(self, kept: Tensor, down: Tensor) -> None:
        """Keep the neurons of these indices, with `down` (n, |kept|) as the weight that reads them, in place."""
        rows = torch.cat([kept + part * self.neurons for part in range(2 // len(self.rows))])
        for name in self.rows:
            layer = self.module.get_submodule(name)
            for key, parameter in layer.named_parameters(recurse=False):
                setattr(layer, key, nn.Parameter(parameter.detach()[rows].clone(), requires_grad=False))
        reader = self.module.get_submodule(self.down)
        weight = reader.get_parameter("weight")
        reader.weight = nn.Parameter(down.to(weight.device, weight.dtype).contiguous(), requires_grad=False)


def gated_mlps(block: nn.Module) -> list[GatedMLP]:
    """Every gated MLP of a block, experts among them."""
    found = []
    for name, module in block.named_modules():
        layers = {key: child for key, child in module.named_children() if is_linear(child) and not is_conv1d(child)}
        for rows, down in NAMES:
            if down in layers and all(row in layers for row in rows):
                width = layers[down].get_parameter("weight").shape[1]
                if all(layers[row].get_parameter("weight").shape[0] == 2 // len(rows) * width for row in rows):
                    found.append(GatedMLP(name, module, rows, down))
    return found
