"""The critic in one process: its loss, its steps, its state, and the exact gradients that the model hears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError, RunError
from cantata.train.adversarial import Adversarial, discriminator_loss, generator_loss, lecam
from cantata.train.critic import Critic, CriticConfig, WithCritic
from cantata.train.reconstruction import LossConfig, Reconstruction, normalise, tokenizer_metrics
from tests.train.pixels import images, tokenizer, totals_of

ADAM = {
    "_target_": "torch.optim.AdamW",
    "_partial_": True,
    "lr": 1e-2,
    "betas": [0.5, 0.9],
    "eps": 1e-5,
    "weight_decay": 0.0,
    "fused": True,
}
CONFIG = CriticConfig(
    discriminator={
        "_target_": "cantata.nn.discriminator.PatchDiscriminator",
        "dims": 2,
        "in_channels": 3,
        "base_channels": 4,
        "layers": 1,
        "norm_groups": 2,
    },
    optimizer=ADAM,
    schedule={"_target_": "cantata.train.schedule.Constant", "warmup_steps": 0},
    loss=Adversarial.hinge,
    weight=0.8,
    adaptive=True,
    start_discriminator=0,
    start_generator=0,
    lecam=0.1,
    lecam_decay=0.9,
    clip_grad_norm=None,
)
LOSS = LossConfig(l1=1.0, l2=0.5, perceptual=0.0)
BATCH = images(3, side=16)
TOTALS = totals_of([BATCH])
SHARE_B = torch.full((3,), 1 / 3)


def build(**changes: Any) -> Critic:
    return Critic(replace(CONFIG, **changes), seed=3, max_steps=10, device=torch.device("cpu"))


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    real = normalise(BATCH.pixels_BTCHW)
    return real, (real + 0.3 * torch.randn(real.shape, generator=torch.Generator().manual_seed(seed))).clone()


def trained(critic: Critic, steps: int) -> Critic:
    for step in range(steps):
        critic.learn(*pair(step), SHARE_B)
        critic.reduce()
        critic.step()
    return critic


@pytest.mark.parametrize("kind", list(Adversarial))
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_model_hears_the_exact_gradient(kind: Adversarial, adaptive: bool) -> None:
    model, critic = tokenizer(), trained(build(loss=kind, adaptive=adaptive), 2)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    output = model(normalise(BATCH.pixels_BTCHW))
    difference = output.reconstruction_BTCHW - normalise(BATCH.pixels_BTCHW)
    reconstruction = difference.abs().mean() + 0.5 * difference.square().mean()
    adversarial = generator_loss(kind, critic.model(output.reconstruction_BTCHW)).mean()
    weight = 0.8
    if adaptive:
        pulls = [
            torch.autograd.grad(part, model.last.weight, retain_graph=True)[0].norm()
            for part in (reconstruction, adversarial)
        ]
        weight = 0.8 * (pulls[0] / (pulls[1] + 1e-4)).item()
    wanted = reconstruction + weight * adversarial + output.quantized.loss_sum / TOTALS.tokens
    gradients = torch.autograd.grad(wanted, list(model.parameters()))

    objective = Reconstruction(LOSS, None, critic, model.last_layer, None)
    loss = objective(model, BATCH, TOTALS)
    loss.value.backward()
    torch.testing.assert_close(loss.value, wanted.detach(), rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    record = tokenizer_metrics(loss.sums)
    assert record["loss/adaptive_weight"] == pytest.approx(weight, rel=1e-5)
    assert record["loss/adversarial"] == pytest.approx(adversarial.item(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())


def test_the_discriminator_learns_from_its_loss_alone() -> None:
    critic = trained(build(), 1)
    means = {name: critic.state_dict()[f"critic.lecam.{name}"].clone() for name in ("real", "fake")}
    real, fake = pair(7)
    logits = critic.model(real), critic.model(fake)
    wanted = discriminator_loss(Adversarial.hinge, *logits) + 0.1 * lecam(*logits, *means.values())
    gradients = torch.autograd.grad(wanted.mean(), list(critic.model.parameters()))
    terms = critic.learn(real, fake, SHARE_B)
    for parameter, gradient in zip(critic.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["discriminator"] + 0.1 * terms["lecam"], wanted.detach())
    norm = critic.reduce()
    assert norm == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-5)
    critic.step()
    for name, value in zip(("real", "fake"), logits, strict=True):
        expected = 0.9 * means[name] + 0.1 * value.mean().detach()
        torch.testing.assert_close(critic.state_dict()[f"critic.lecam.{name}"], expected)


def test_it_learns_first_and_is_heard_later() -> None:
    model, critic = tokenizer(), build(start_discriminator=1, start_generator=2)
    objective = Reconstruction(LOSS, None, critic, model.last_layer, None)
    start = [p.clone() for p in critic.model.parameters()]
    seen = []
    for _ in range(3):
        sums = objective(model, BATCH, TOTALS).sums
        critic.reduce()
        critic.step()
        moved = not all(map(torch.equal, critic.model.parameters(), start))
        seen.append(("parts/discriminator" in sums, "parts/adversarial" in sums, moved))
    assert seen == [(False, False, False), (True, False, True), (True, True, True)]


def test_gradients_are_clipped_and_forgotten() -> None:
    critic = build(clip_grad_norm=1e-3)
    critic.learn(*pair(), SHARE_B)
    assert critic.reduce() > 1e-3
    grads = [p.grad for p in critic.model.parameters()]
    assert torch.stack([g.norm() for g in grads if g is not None]).norm().item() == pytest.approx(
        1e-3, rel=1e-2
    )
    critic.clear()
    assert all(p.grad is None for p in critic.model.parameters())
    assert critic.steps == 0


def test_warm_up_counts_from_its_first_step() -> None:
    warm = {"_target_": "cantata.train.schedule.Constant", "warmup_steps": 4}
    critic = build(start_discriminator=2, start_generator=2, schedule=warm)
    trained(critic, 3)
    assert [group["lr"] for group in critic._optimizer.param_groups] == pytest.approx([1e-2 / 4] * 2)


def test_state_has_all_names_from_the_start_and_resumes_exactly() -> None:
    fresh = build()
    names = set(fresh.state_dict())
    critic = trained(build(), 2)
    assert set(critic.state_dict()) == names
    assert {"critic.steps", "critic.lecam.real", "critic.optimizer.convs.0.weight.exp_avg"} <= names
    state = {name: value.clone() for name, value in critic.state_dict().items()}
    resumed = Critic(CONFIG, seed=9, max_steps=10, device=torch.device("cpu"))
    resumed.load_state_dict(state)
    for one in (critic, resumed):
        one.learn(*pair(5), SHARE_B)
        one.reduce()
        one.step()
    assert all(torch.equal(value, critic.state_dict()[name]) for name, value in resumed.state_dict().items())
    with pytest.raises(RunError, match=r"another critic: 1 names differ, first critic\.steps"):
        resumed.load_state_dict({name: value for name, value in state.items() if name != "critic.steps"})


def test_initial_values_follow_from_the_seed() -> None:
    one, same = build(), build()
    other = Critic(CONFIG, seed=4, max_steps=10, device=torch.device("cpu"))
    weights = [critic.model.convs[0].weight for critic in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_discriminator": 3, "start_generator": 2}, r"start_discriminator=3 .*start_generator=2"),
        ({"weight": -1.0}, r"critic\.weight=-1\.0"),
        ({"lecam": float("inf")}, r"critic\.lecam=inf"),
        ({"lecam_decay": 1.0}, r"critic\.lecam_decay=1\.0"),
        ({"clip_grad_norm": 0.0}, r"critic\.clip_grad_norm=0\.0"),
        (
            {"optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 1.0}},
            r"critic\.optimizer=SGD",
        ),
    ],
)
def test_bad_values_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    "change", [{"weight": 1.6}, {"adaptive": False}, {"loss": Adversarial.non_saturating}]
)
def test_what_the_model_hears_follows_every_option(change: dict[str, Any]) -> None:
    model, values = tokenizer(), []
    for changes in ({}, change):
        critic = build(**changes)
        objective = Reconstruction(LOSS, None, critic, model.last_layer, None)
        values.append(objective(model, BATCH, TOTALS).value.item())
    assert values[0] != pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("change", [{"lecam": 0.0}, {"lecam_decay": 0.5}, {"clip_grad_norm": 1e-6}])
def test_what_the_discriminator_learns_follows_every_option(change: dict[str, Any]) -> None:
    weights = [trained(build(**changes), 3).model.convs[1].weight for changes in ({}, change)]
    assert not torch.allclose(*weights, rtol=0, atol=1e-6)


class Plain:
    """An engine of one tensor, which says what it was asked."""

    summary: list[Any] = []
    settings = "plain"

    def __init__(self) -> None:
        self.model = tokenizer()
        self.asked: list[Any] = []

    def forward_backward(self, batch: Any, objective: Any, totals: Any, *, last: bool) -> dict[str, Tensor]:
        loss = objective(self.model, batch, totals)
        loss.value.backward()
        return loss.sums

    def gradient_norm(self, max_norm: float | None) -> float:
        return 1.0

    def step(self, learning_rate_factor: float) -> None:
        self.asked.append(learning_rate_factor)

    def skip(self) -> None:
        self.asked.append("skip")

    def state_dict(self) -> dict[str, Any]:
        return {"model.weight": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked.append(state)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self.asked.append("averaged")
        yield


def test_an_engine_with_a_critic_steps_and_saves_both() -> None:
    inner, critic = Plain(), build()
    engine = WithCritic(inner, critic)
    objective = Reconstruction(LOSS, None, critic, inner.model.last_layer, None)
    start = [p.clone() for p in critic.model.parameters()]
    engine.forward_backward(BATCH, objective, TOTALS, last=True)
    engine.skip()
    assert all(p.grad is None for p in critic.model.parameters())
    engine.forward_backward(BATCH, objective, TOTALS, last=True)
    assert engine.gradient_norm(1.0) == 1.0
    engine.step(0.5)
    assert critic.steps == 1
    assert not all(map(torch.equal, critic.model.parameters(), start))
    state = engine.state_dict()
    assert state.keys() == {"model.weight", *critic.state_dict()}
    engine.load_state_dict(state)
    with engine.averaged():
        pass
    assert inner.asked == ["skip", 0.5, {"model.weight": state["model.weight"]}, "averaged"]


def test_a_gradient_that_is_no_number_stops_before_any_update() -> None:
    engine = WithCritic(Plain(), build())
    real, fake = pair()
    engine.critic.learn(real, fake * float("nan"), SHARE_B)
    with pytest.raises(RunError, match="step 1: the critic's gradient norm is nan; nothing was updated"):
        engine.gradient_norm(None)
