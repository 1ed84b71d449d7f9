"""The discriminator that learns beside a tokenizer, the same under every engine.

B  images or clips    T  frames    C  channels    H, W  rows and columns    P  patches
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cantata.core.build import build
from cantata.core.dist import all_reduce_sum
from cantata.core.errors import ConfigError, RunError
from cantata.core.schema import slot
from cantata.core.types import StepTotals
from cantata.parallel.materialize import RandomInit, materialize
from cantata.train.adversarial import (
    Adversarial,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    last_layer_gradient,
    lecam,
)
from cantata.train.ema import adam_state
from cantata.train.engine import Engine, Objective
from cantata.train.norm import clip, total_norm
from cantata.train.optim import GroupSummary, optimizer_defaults, parameter_groups
from cantata.train.schedule import Schedule

PREFIX = "critic."
"""Begins the names of a critic's tensors in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The discriminator, how it learns, and how much the model heeds it."""

    discriminator: dict[str, Any] = slot()
    optimizer: dict[str, Any] = slot()
    """Of the Adam family."""
    schedule: dict[str, Any] = slot()
    """Its steps count from the first one that the discriminator takes."""
    loss: Adversarial
    weight: float
    """Of the model's adversarial loss."""
    adaptive: bool
    """Multiply `weight` so that both losses pull equally at the model's last layer (arXiv:2012.09841)."""
    start_discriminator: int
    """Steps of the run before the discriminator learns."""
    start_generator: int
    """Steps of the run before the model hears of it."""
    lecam: float
    """Of LeCam regularisation (arXiv:2104.03310); 0: none."""
    lecam_decay: float
    """Share of the running means of logits that stays at each step."""
    clip_grad_norm: float | None
    """Largest gradient norm of the discriminator; null leaves gradients as they are."""

    def __post_init__(self) -> None:
        if not 0 <= self.start_discriminator <= self.start_generator:
            raise ConfigError(
                f"critic.start_discriminator={self.start_discriminator} must be at least 0 and at most "
                f"critic.start_generator={self.start_generator}: it learns before the model heeds it"
            )
        for name in ("weight", "lecam"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"critic.{name}={getattr(self, name)} must be a number, at least 0")
        if not 0 <= self.lecam_decay < 1:
            raise ConfigError(f"critic.lecam_decay={self.lecam_decay} must be at least 0 and below 1")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ConfigError(
                f"critic.clip_grad_norm={self.clip_grad_norm} must be above 0, or null for no clipping"
            )


class Judgement(NamedTuple):
    """What the model hears of the critic."""

    loss_B: Tensor
    """Adversarial loss of each image, without weight or gradient."""
    weight: Tensor
    """What it counts, scalar: the configured weight times the adaptive one."""
    gradient_BTCHW: Tensor
    """Of this rank's share of the weighted loss by the reconstruction."""


class Critic:
    """A discriminator with its own optimizer, whole and equal on every rank, in fp32.

    Its initial values follow from the seed. Gradients add up over micro-batches, and over ranks once a step.

    Raises:
        ConfigError: the optimizer is not of the Adam family, or the discriminator cannot be built.
    """

    def __init__(self, config: CriticConfig, seed: int, max_steps: int, device: torch.device) -> None:
        self.config = config
        with torch.device("meta"):
            self.model: nn.Module = build(config.discriminator)
        materialize(self.model, RandomInit(self.model, seed), device)
        optimizer = build(config.optimizer)
        self._optimizer = optimizer(parameter_groups(self.model, {}, *optimizer_defaults(optimizer)))
        if not isinstance(self._optimizer, torch.optim.Adam):
            name = type(self._optimizer).__name__
            raise ConfigError(f"critic.optimizer={name}: torch.optim.AdamW and Adam are supported")
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter] = adam_state(self._optimizer, group, parameter)
        self._schedule: Schedule = build(config.schedule)
        self._max_steps = max_steps
        self._steps = torch.zeros((), dtype=torch.int64)
        # Running means of the logits on real and on reconstructed images.
        self._means = {name: torch.zeros((), device=device) for name in ("real", "fake")}
        self._logits = torch.zeros(2, device=device)

    @property
    def steps(self) -> int:
        """Steps of the run so far."""
        return int(self._steps)

    @property
    def learns(self) -> bool:
        return self.steps >= self.config.start_discriminator

    def judge(
        self,
        fake_BTCHW: Tensor,
        gradient_BTCHW: Tensor,
        share_B: Tensor,
        last_input: Tensor,
        last_layer: nn.Module,
    ) -> Judgement | None:
        """What the model hears of its reconstructions; None before `start_generator`. A collective.

        Args:
            fake_BTCHW: a leaf that asks for a gradient; nothing accumulates in it or in the discriminator.
            gradient_BTCHW: of all other losses of this micro-batch.
            share_B: what each image counts in the step.
            last_input, last_layer: see `TokenizerOutput` and `ImageTokenizer`.
        """
        if self.steps < self.config.start_generator:
            return None
        loss_B = generator_loss(self.config.loss, self.model(fake_BTCHW))
        (own,) = torch.autograd.grad((loss_B * share_B).sum(), fake_BTCHW)
        weight = loss_B.new_tensor(self.config.weight)
        if self.config.adaptive:
            reconstruction, adversarial = (
                last_layer_gradient(last_input, last_layer, part) for part in (gradient_BTCHW, own)
            )
            weight = weight * adaptive_weight(reconstruction, adversarial, share_B.sum())
        return Judgement(loss_B.detach(), weight, weight * own)

    def learn(self, real_BTCHW: Tensor, fake_BTCHW: Tensor, share_B: Tensor) -> dict[str, Tensor]:
        """Add this micro-batch's gradients; returns the terms of its loss by image, (B,) each."""
        if not self.learns:
            return {}
        logits = self.model(torch.cat([real_BTCHW, fake_BTCHW.detach()]))
        real_BP, fake_BP = logits.chunk(2)
        loss_B = discriminator_loss(self.config.loss, real_BP, fake_BP)
        terms = {"discriminator": loss_B.detach()}
        # In its first step there are no means yet.
        if self.config.lecam and self.steps > self.config.start_discriminator:
            lecam_B = lecam(real_BP, fake_BP, self._means["real"], self._means["fake"])
            loss_B = loss_B + self.config.lecam * lecam_B
            terms["lecam"] = lecam_B.detach()
        (loss_B * share_B).sum().backward()  # type: ignore[no-untyped-call]
        means_2B = torch.stack([real_BP, fake_BP]).detach().mean(2)
        self._logits += (means_2B * share_B).sum(1)
        return terms

    def reduce(self) -> float:
        """Sum the step's gradients over ranks and clip them; returns their norm before. A collective."""
        if not self.learns:
            return 0.0
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = all_reduce_sum(torch.cat([*(g.flatten() for g in gradients), self._logits]))
        sizes = [p.numel() for p in parameters]
        *parts, self._logits = torch.split(flat, [*sizes, len(self._logits)])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        norm = total_norm(parts)
        if self.config.clip_grad_norm is not None:
            clip(parameters, self.config.clip_grad_norm, norm)
        return norm.item()

    def step(self) -> None:
        """Update the discriminator with what `reduce` left, then clear gradients; count a step of the run."""
        if self.learns:
            start = self.config.start_discriminator
            factor = self._schedule(self.steps - start, self._max_steps - start)
            for group in self._optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            self._optimizer.step()
            decay = self.config.lecam_decay if self.steps > start else 0.0
            for mean, seen in zip(self._means.values(), self._logits, strict=True):
                mean.lerp_(seen, 1.0 - decay)
        self.clear()
        self._steps += 1

    def clear(self) -> None:
        """Forget gradients."""
        self._optimizer.zero_grad()
        self._logits = torch.zeros_like(self._logits)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors, equal on all ranks; the critic's own, so loading into them in place is enough."""
        state = {f"{PREFIX}lecam.{name}": mean for name, mean in self._means.items()}
        state[f"{PREFIX}steps"] = self._steps
        for name, parameter in self.model.named_parameters():
            state[f"{PREFIX}model.{name}"] = parameter.detach()
            for key, value in self._optimizer.state[parameter].items():
                state[f"{PREFIX}optimizer.{name}.{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the tensors of `state_dict` back; `RunError` where names differ."""
        own = self.state_dict()
        if own.keys() != state.keys():
            different = sorted(own.keys() ^ state.keys())
            raise RunError(f"state of another critic: {len(different)} names differ, first {different[0]}")
        for name, value in own.items():
            value.copy_(state[name])


class WithCritic:
    """An engine whose steps are the critic's too; see `Engine`."""

    def __init__(self, engine: Engine, critic: Critic) -> None:
        self.engine = engine
        self.critic = critic
        self.model = engine.model
        self.summary: Sequence[GroupSummary] = engine.summary
        self.settings = engine.settings

    def forward_backward(
        self, batch: Any, objective: Objective, totals: StepTotals, *, last: bool
    ) -> dict[str, Tensor]:
        """See `Engine`; the objective lets the critic learn."""
        return self.engine.forward_backward(batch, objective, totals, last=last)

    def gradient_norm(self, max_norm: float | None) -> float:
        """The model's; what the critic learned is summed over ranks too.

        Raises `RunError`, before anything is updated, where the critic's gradients are not finite.
        """
        norm = self.engine.gradient_norm(max_norm)
        of_critic = self.critic.reduce()
        if not math.isfinite(of_critic):
            raise RunError(
                f"step {self.critic.steps + 1}: the critic's gradient norm is {of_critic:g}; nothing was "
                "updated"
            )
        return norm

    def step(self, learning_rate_factor: float) -> None:
        """See `Engine`; the critic follows its own schedule."""
        self.engine.step(learning_rate_factor)
        self.critic.step()

    def skip(self) -> None:
        """See `Engine`."""
        self.engine.skip()
        self.critic.clear()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`; the critic's names begin with `critic.`."""
        return self.engine.state_dict() | self.critic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        of_critic = {name: value for name, value in state.items() if name.startswith(PREFIX)}
        self.engine.load_state_dict({name: state[name] for name in state.keys() - of_critic.keys()})
        self.critic.load_state_dict(of_critic)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine`; the critic judges nothing in evaluation."""
        with self.engine.averaged():
            yield
