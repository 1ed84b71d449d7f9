"""Decoding without a cache: several prompts at once, packed as they are in training.

Every new token runs the whole of every prompt again. That is right and simple, and fast enough for the few
short captions of an evaluation.

    S  samples that are decoded together
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from cantata.core import dist
from cantata.core.samples import Sample
from cantata.core.types import TEXT
from cantata.data.collate.packed import PackedCollator


@torch.no_grad()
def generate(
    model: nn.Module,
    collator: PackedCollator,
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Continue each prompt; returns its new tokens, without the stop token.

    A prompt's continuation does not depend on the other prompts. With several ranks this is a collective:
    each decodes its own prompts (at least one), and all run the model until the last of them is done.

    Args:
        model: a `cantata.models.protocol.LanguageModel`, wrapped by an engine or not.
        prompts: from the processor's `encode_prompt`.
        max_new_tokens: most tokens to add to each.
        stop_token_ids: tokens that end a continuation, such as the processor's `stop_token_ids`.
        temperature: 0 takes the likeliest token; above 0 draws from `softmax(logits / temperature)`.
        seed: decides what is drawn, for each prompt by its place in `prompts`.
    """
    if not prompts:
        raise ValueError("generate: no prompt; every rank needs at least one")
    samples = list(prompts)
    added: list[list[int]] = [[] for _ in prompts]
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    open_ = list(range(len(prompts)))
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        # A rank that is done goes on with one prompt, as sharded models run on all ranks or none.
        running = open_ or [0]
        logits_SV = last_logits(model, collator, [samples[index] for index in running])
        for index, logits_V in zip(open_, logits_SV, strict=False):
            token = choose(logits_V, temperature, generators[index])
            if token not in stop_token_ids:
                added[index].append(token)
            samples[index] = _longer(samples[index], token)
        open_ = [index for index in open_ if samples[index].input_ids_T[-1] not in stop_token_ids]
        if dist.all_reduce_sum([float(len(open_))])[0] == 0:
            break
    model.train(was_training)
    return added


def last_logits(model: nn.Module, collator: PackedCollator, samples: Sequence[Sample]) -> Tensor:
    """What the model expects after each sample: logits in fp32 on the host, (S, V).

    The image placeholder is ruled out: it would stand for an image that is not there.
    """
    row = collator.row(samples)
    batch = collator.collate([row], sum(row.lengths)).to(dist.device())
    # Compiled blocks would take the growing length for a dynamic shape, in training too.
    with torch.compiler.set_stance("force_eager"):
        logits_TV = model(batch, with_logits=True).logits_TV
    last_S = torch.tensor(row.lengths, device=logits_TV.device).cumsum(0) - 1
    logits_SV: Tensor = logits_TV[last_S].float().cpu()
    logits_SV[:, collator.processor.image_token_id] = -torch.inf
    return logits_SV


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The likeliest token, or one drawn at a temperature above 0."""
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))


def _longer(sample: Sample, token: int) -> Sample:
    return replace(
        sample,
        input_ids_T=np.append(sample.input_ids_T, np.int32(token)),
        weight_T=np.append(sample.weight_T, np.float32(0)),
        modality_ids_T=np.append(sample.modality_ids_T, np.int8(TEXT)),
    )
