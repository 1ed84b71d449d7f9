"""Bytes alive while shapes run, by what they are for."""

from __future__ import annotations

import gc

import torch
from torch import nn

from cantata.train.live_bytes import LiveBytes, Purpose

KIB = 1024


def test_what_is_let_go_counts_no_longer_and_views_count_once() -> None:
    x = torch.empty(256, device="meta")
    with LiveBytes() as live:
        first = x + 1
        view = first[:10]
        second = first * 2
        del first, second
        gc.collect()
        assert live.now == KIB, "the view keeps its whole storage"
        del view
        assert live.now == 0
        assert live.peak == 2 * KIB
    assert live.at_peak == dict.fromkeys(Purpose, 0) | {Purpose.activations: 2 * KIB}


def test_bytes_have_the_purpose_of_the_module_that_makes_them() -> None:
    head = nn.Linear(256, 512, bias=False, device="meta")
    live = LiveBytes()
    live.during(head, Purpose.logits)
    with live, torch.no_grad():
        hidden = torch.empty(1, 256, device="meta") + 1
        logits = head(hidden)
        live.add(100, Purpose.gradients)
    assert live.held[Purpose.logits] == 2 * KIB == 4 * logits.numel()
    assert live.held[Purpose.activations] == KIB
    assert live.at_peak == live.held
    assert live.peak == 3 * KIB + 100


def test_a_call_tells_what_it_made_and_what_of_it_stays() -> None:
    live = LiveBytes()
    with live:
        x = torch.empty(256, device="meta")
        kept, made = live.recorded(lambda: (x + 1) * 2)
        gc.collect()
        assert [held.size for held in made] == [0, KIB]
        del kept
        assert [held.size for held in made] == [0, 0]
