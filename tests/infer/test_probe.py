"""Probes of frozen encoders: what is learned, by whom, and that chance is the seed's alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cantata.core.samples import ImagePatches
from cantata.core.types import Images, Segments
from cantata.infer import probe
from cantata.infer.probe import (
    AttentiveProbe,
    Labelled,
    ProbeSettings,
    features,
    packed,
    probe_accuracy,
    zero_shot_accuracy,
)

CPU = torch.device("cpu")
SETTINGS = ProbeSettings(steps=30, batch_size=8, learning_rate=1e-2, weight_decay=0.0, seed=0)


def images(count: int, classes: int = 3, seed: int = 0) -> Labelled:
    """Of 1 to 4 patches; one patch of each image holds its class, the others noise."""
    generator = np.random.default_rng(seed)
    made, numbers = [], []
    for index in range(count):
        number = int(generator.integers(1, 5))
        patches = generator.integers(0, 40, (number, 12)).astype(np.uint8)
        numbers.append(index % classes)
        patches[generator.integers(number)][4 * numbers[-1] : 4 * numbers[-1] + 4] = 200
        made.append(ImagePatches(patches, np.arange(number), number))
    return Labelled(made, torch.tensor(numbers))


def pixels(batch: Images) -> Tensor:
    """The plainest encoder."""
    return batch.patches_PC.float() / 255.0


def accuracy(train: Labelled, test: Labelled, **changes: float) -> float:
    return probe_accuracy(pixels, 2, train, test, 3, SETTINGS._replace(**changes), CPU)


def test_the_majority() -> None:
    assert Labelled(images(5).images, torch.tensor([1, 0, 1, 2, 1])).majority() == 3 / 5


def test_images_are_packed_end_to_end_without_places_among_tokens() -> None:
    made = images(3).images
    batch = packed(made, CPU)
    assert batch.patches.lengths == tuple(len(one.patches_PC) for one in made)
    assert np.array_equal(batch.patches_PC.numpy(), np.concatenate([one.patches_PC for one in made]))
    assert batch.position_ids_P.tolist() == [i for one in made for i in range(len(one.patches_PC))]
    assert (batch.features.lengths, batch.token_index_Q.numel()) == ((0, 0, 0), 0)


def test_features_do_not_depend_on_how_many_go_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = images(7).images
    whole = features(pixels, made, CPU)
    monkeypatch.setattr(probe, "BATCH", 3)
    parts = features(pixels, made, CPU)
    assert [len(one) for one in parts] == [len(one.patches_PC) for one in made]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_probe_learns_what_one_patch_says_and_labels_at_random_say_nothing() -> None:
    train, test = images(48), images(30, seed=1)
    assert accuracy(train, test) >= 0.9
    shuffled = train._replace(classes_I=train.classes_I[torch.randperm(48, generator=torch.Generator())])
    assert accuracy(shuffled, test) < 0.7


def test_the_seed_decides_everything() -> None:
    train, test = images(24), images(30, seed=1)
    few = {"steps": 2}
    assert accuracy(train, test, **few) == accuracy(train, test, **few)
    assert len({accuracy(train, test, **few, seed=seed) for seed in range(4)}) > 1


def test_the_encoder_does_not_change() -> None:
    weight = torch.eye(12, requires_grad=True)
    train = images(12)
    probe_accuracy(lambda batch: pixels(batch) @ weight, 2, train, train, 3, SETTINGS, CPU)
    assert weight.grad is None
    assert torch.equal(weight, torch.eye(12))


def test_a_probe_reads_each_image_alone() -> None:
    torch.manual_seed(0)
    module, x_PD = AttentiveProbe(8, 2, 3), torch.randn(7, 8)
    torch.nn.init.normal_(module.pool.cls_token)
    together = module(x_PD, Segments((4, 1, 2)))
    alone = [module(part, Segments((len(part),))) for part in x_PD.split([4, 1, 2])]
    assert together.shape == (3, 3)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


class Pairs:
    """A text's feature is its first token's column; an image's the brightest third of its pixels."""

    def text_features(self, input_ids_T: Tensor, position_ids_T: Tensor, texts: Segments) -> Tensor:
        first = (position_ids_T == 0).nonzero().flatten()
        assert first.tolist() == texts.offsets()[:-1].tolist()
        return torch.eye(3)[input_ids_T[first]]

    def image_features(self, batch: Images) -> Tensor:
        parts = pixels(batch).view(-1, 3, 4).mean(2).split(list(batch.patches.lengths))
        return torch.stack([part.amax(0) for part in parts])


def test_the_nearest_text_is_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several lengths, in the order of the classes; more images than go through at once."""
    monkeypatch.setattr(probe, "BATCH", 4)
    test = images(10)
    assert zero_shot_accuracy(Pairs(), [[0], [1, 2, 0], [2, 2]], test, CPU) == 1.0
    assert zero_shot_accuracy(Pairs(), [[1], [0], [2, 2]], test, CPU) == 0.3
