"""Quantisers as plain values and back, and nothing else run of a folder."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.models.autoencoder.quantizer_node import PACKAGE, built, described
from tests.models.autoencoder.small import Nearest
from tests.nn.quantize.small import KINDS, small

FSQ = f"{PACKAGE}fsq.FiniteScalarQuantizer"


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantiser_comes_back_from_json(kind: str) -> None:
    quantizer = small(kind)
    node = described(quantizer)
    again = built(json.loads(json.dumps(node)))
    assert type(again) is type(quantizer)
    assert described(again) == node
    shapes = {name: tensor.shape for name, tensor in quantizer.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


def test_a_class_of_elsewhere_is_not_published() -> None:
    with pytest.raises(ConfigError, match=r"small\.Nearest cannot be published: only quantisers of cantata"):
        described(Nearest(32, 4))


def test_an_argument_that_is_not_kept_is_named() -> None:
    quantizer = small("vq")
    del quantizer.commitment
    with pytest.raises(ConfigError, match="does not keep its argument 'commitment'"):
        described(quantizer)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "os.system"}, r"quantizer\._target_ is os\.system; only cantata\.nn\.quantize\.\*"),
        ({"_target_": "cantata.nn.quantizer.X"}, "is cantata.nn.quantizer.X; only"),
        ({"_target_": FSQ, "levels": [{"_target_": "torch.zeros"}]}, r"is torch\.zeros; only"),
        ({"_target_": f"{PACKAGE}base.usage", "indices_N": 1, "num_codes": 2}, "indices_N must be a list"),
        ({"_target_": f"{PACKAGE}common.unit"}, "unit"),
        ({"_target_": FSQ, "levels": [5, 4], "colour": "red"}, "colour"),
    ],
)
def test_nodes_that_are_refused(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(node)
