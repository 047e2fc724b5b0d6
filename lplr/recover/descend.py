"""The one optimisation loop of recovery: AdamW over batches, the best iterate on held-out rows kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

BETAS = 0.9, 0.95
WARM = 0.1  # share of the steps in which the step size rises

Make = Callable[[], Mapping[str, Tensor]]
Loss = Callable[[Mapping[str, Tensor], slice], Tensor]


@dataclass(frozen=True)
class Group:
    """Parameters with one step size, which AdamW takes as the largest change of an entry in a step, about.

    They move once in `every` steps, by the gradients of all of these, and in the last step of an epoch.
    """

    parameters: Sequence[nn.Parameter]
    lr: float
    every: int = 1


@dataclass(frozen=True)
class Course:
    """What a descent did: losses on held-out rows before it, after each epoch, and of what was kept, which is the least."""

    before: float
    losses: tuple[float, ...]
    after: float
    steps: int
    seconds: float

    def entry(self) -> dict[str, Any]:
        """Its fields for a record, None for a loss that is not finite: a line of JSON has no such number."""
        before, *losses, after = (v if math.isfinite(v) else None for v in (self.before, *self.losses, self.after))
        return {"before": before, "losses": losses, "after": after, "steps": self.steps, "seconds": self.seconds}


@dataclass(frozen=True)
class State:
    """All that a descent needs to go on behind an epoch: the parameters, the best ones, what the optimizer keeps of each (by its
    own names, whole numbers as int64), the generator's state; losses, the first that of the start.
    """

    parameters: list[Tensor]
    best: list[Tensor]
    moments: list[dict[str, Tensor]]
    generator: Tensor
    losses: list[float]


def descend(
    groups: Sequence[Group],
    make: Make,
    loss: Loss,
    train: Sequence[slice],
    held_out: Sequence[slice],
    *,
    epochs: int,
    generator: torch.Generator,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    say: Callable[[int, float], None] = lambda *_: None,
    keep: Callable[[State], None] | None = None,
    resume: State | None = None,
) -> Course:
    """Minimise the mean of loss(make(), rows) over the slices `train`; afterwards the parameters are those, of the start and of
    every epoch's end, with the least mean over `held_out`.

    make gives tensors as functions of the parameters; it is called once a step.  optimizer: AdamW, or what is called like it.
    One step for a slice, in an order drawn from `generator` in each epoch; the step size rises linearly and falls as a cosine.
    say is called with (epochs done, held-out loss), keep with what `resume` takes after each epoch.  A loss that is not finite
    ends the descent.  Not for inference mode.
    """
    started = time.perf_counter()
    groups = [group for group in groups if group.parameters and group.lr]
    parameters = [p for group in groups for p in group.parameters]
    losses = [mean(make, loss, held_out)] if resume is None else list(resume.losses)
    kept = [p.detach().clone() for p in parameters] if resume is None else [t.clone() for t in resume.best]
    each = len(train)
    if parameters and epochs and math.isfinite(losses[0]):
        more: dict[str, Any] = {"betas": BETAS, "weight_decay": 0.0}
        optimizers = [optimizer(list(group.parameters), lr=group.lr, **more) for group in groups]
        if resume is not None:
            _restore(resume, groups, optimizers, generator)
        for epoch in range(len(losses) - 1, epochs):
            if not math.isfinite(losses[-1]):
                break
            order = torch.randperm(len(train), generator=generator).tolist()
            for i in range(each):
                share = step_size(each * epoch + i, each * epochs)
                with torch.enable_grad():
                    loss(make(), train[order[i]]).backward()
                for group, mover in zip(groups, optimizers, strict=True):
                    if (i + 1) % group.every == 0 or i + 1 == each:
                        mover.param_groups[0]["lr"] = share * group.lr
                        mover.step()
                        increment_version(group.parameters)  # which an optimizer that writes through `.data` does not
                        mover.zero_grad(set_to_none=True)
            found = mean(make, loss, held_out)
            if found < min(losses):
                kept = [p.detach().clone() for p in parameters]
            losses.append(found)
            say(epoch + 1, found)
            if keep is not None and math.isfinite(found):
                moments = [_moments(mover, p) for group, mover in zip(groups, optimizers, strict=True) for p in group.parameters]
                keep(State([p.detach() for p in parameters], kept, moments, generator.get_state(), losses))
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    best = min(losses) if math.isfinite(losses[0]) else losses[0]
    return Course(losses[0], tuple(losses[1:]), best, each * (len(losses) - 1), time.perf_counter() - started)


def _moments(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer keeps of a parameter; nothing before its first step."""
    return {name: torch.as_tensor(value) for name, value in optimizer.state.get(p, {}).items()}


def _restore(
    state: State, groups: Sequence[Group], optimizers: Sequence[torch.optim.Optimizer], generator: torch.Generator
) -> None:
    """Everything as it was behind the last epoch of a state."""
    held = zip(state.parameters, state.moments, strict=True)
    with torch.no_grad():
        for group, optimizer in zip(groups, optimizers, strict=True):
            for p in group.parameters:
                value, moments = next(held)
                p.copy_(value)
                if moments:
                    optimizer.state[p] = {name: _as_kept(t, p) for name, t in moments.items()}
    generator.set_state(state.generator)


def _as_kept(moment: Tensor, p: Tensor) -> Tensor | int:
    """What `_moments` made a tensor of: numbers of steps are whole numbers or stay where they are, arrays lie beside p."""
    if moment.dim() == 0:
        return moment.clone() if moment.is_floating_point() else int(moment)
    return moment.to(p.device, copy=True)


def step_size(step: int, total: int) -> float:
    """Share of the largest step size: a rise over WARM of the steps, then a cosine down to 0."""
    warm = max(1, round(WARM * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def mean(make: Make, loss: Loss, rows: Sequence[slice]) -> float:
    """The mean of a loss over slices of equal size, without gradients."""
    with torch.no_grad():
        made = make()
        return sum(float(loss(made, r)) for r in rows) / len(rows)
