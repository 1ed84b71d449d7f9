"""Samples end to end, then one tail of padding.

F  token fields (ids, label, position, modality, modality of the sample)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cantata.core.errors import RunError
from cantata.core.samples import Example, ImagePatches, Processor, Sample
from cantata.core.types import IGNORE_INDEX, PADDING, Batch, Images, RowInfo, Segments
from cantata.data.collate.handed import by_handle
from cantata.data.packing import Packer
from cantata.data.rows import RowMaker

IDS, LABELS, POSITIONS, MODALITY, SAMPLE_MODALITY = range(5)


class Row(NamedTuple):
    """A packed row, cheap to hand from a worker process to the trainer."""

    tokens_FT: NDArray[np.int32]
    """The token fields."""
    weight_T: NDArray[np.float32]
    """Weight of each label."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    patches_PC: NDArray[np.uint8] | Tensor
    position_ids_P: NDArray[np.int64]
    patches: tuple[int, ...]
    """Patches of each image."""
    features: tuple[int, ...]
    """Features of each image."""
    info: RowInfo | None
    prefix: tuple[int, ...] | None = None
    """First patches of each image that see one another whole; None where all do."""


class PackedCollator:
    """Encodes examples with a model family's processor and packs them into batches.

    Args:
        processor: the family's processor.
    """

    row_maker: type[RowMaker] = Packer

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def encode(self, example: Example, key: str) -> Sample:
        """The example as a sample. Raises `DataError` where that cannot be."""
        return self.processor.encode(example, key)

    def row(self, samples: Sequence[Sample], info: RowInfo | None = None) -> Row:
        """Samples end to end, labels shifted inside each.

        Raises `RunError`, naming the sample, where placeholders and image features differ in number.
        """
        for sample in samples:
            self._check(sample)
        images = [image for sample in samples for image in sample.images]
        fields = [_fields(sample) for sample in samples]
        tokens = np.concatenate(fields, axis=1) if fields else np.zeros((5, 0), dtype=np.int32)
        shifted = [_shifted_weight(sample) for sample in samples]
        weights = np.concatenate([np.zeros(0, dtype=np.float32), *shifted])
        patches, position_ids = _join(images, self.processor.patch_values)
        return Row(
            tokens_FT=tokens,
            weight_T=weights,
            lengths=tuple(len(sample) for sample in samples),
            patches_PC=by_handle(patches),
            position_ids_P=position_ids,
            patches=tuple(len(image.patches_PC) for image in images),
            features=tuple(image.num_features for image in images),
            info=info,
        )

    def collate(self, rows: Sequence[Row], sequence_length: int) -> Batch:
        """A batch of exactly T = len(rows) * sequence_length tokens.

        Made by numpy: torch's copies in a thread of its own would bring up a second pool of OpenMP threads,
        which wait for work on the cores that train.

        Raises `RunError` where the rows hold more than that.
        """
        total = sum(row.tokens_FT.shape[1] for row in rows)
        size = len(rows) * sequence_length
        if total > size:
            raise RunError(f"{len(rows)} rows hold {total} tokens, more than {sequence_length} each")
        tokens_FT = np.empty((5, size), dtype=np.int64)
        np.concatenate([row.tokens_FT for row in rows], axis=1, out=tokens_FT[:, :total])
        padding = np.array([self.processor.pad_token_id, IGNORE_INDEX, 0, PADDING, PADDING])
        tokens_FT[:, total:] = padding[:, None]
        target_index_N = np.flatnonzero(tokens_FT[LABELS] != IGNORE_INDEX)
        target_weight_N = np.concatenate([row.weight_T for row in rows])[target_index_N]
        token_index_Q = np.flatnonzero(tokens_FT[IDS] == self.processor.image_token_id)
        features = Segments(tuple(count for row in rows for count in row.features))
        first_tokens = token_index_Q[
            features.offsets()[:-1].numpy()[np.array(features.lengths, dtype=int) > 0]
        ]
        ids_T, labels_T, positions_T, modality_T, _ = torch.from_numpy(tokens_FT)
        return Batch(
            input_ids_T=ids_T,
            labels_T=labels_T,
            position_ids_T=positions_T,
            modality_ids_T=modality_T,
            target_index_N=torch.from_numpy(target_index_N),
            target_modality_N=torch.from_numpy(tokens_FT[SAMPLE_MODALITY, target_index_N]),
            samples=Segments(tuple(length for row in rows for length in row.lengths)),
            images=Images(
                patches_PC=_cat([row.patches_PC for row in rows]),
                position_ids_P=_cat([row.position_ids_P for row in rows]),
                patches=Segments(tuple(count for row in rows for count in row.patches)),
                features=features,
                token_index_Q=torch.from_numpy(token_index_Q),
                first_tokens=tuple(first_tokens.tolist()),
                prefix=_prefix(rows),
            ),
            rows=tuple(row.info for row in rows if row.info is not None),
            target_weight_N=None if (target_weight_N == 1).all() else torch.from_numpy(target_weight_N),
        )

    def _check(self, sample: Sample) -> None:
        is_placeholder_T = sample.input_ids_T == self.processor.image_token_id
        placeholders = int(is_placeholder_T.sum())
        features = sum(image.num_features for image in sample.images)
        if placeholders != features:
            raise RunError(
                f"sample {sample.key} has {placeholders} image placeholders for {features} image features"
            )
        if sample.weight_T[is_placeholder_T].any():
            # A family's head may have no row for it.
            raise RunError(f"sample {sample.key} gives its image placeholders weight in the loss")


def _fields(sample: Sample) -> np.ndarray:
    tokens_FT = np.empty((5, len(sample)), dtype=np.int32)
    tokens_FT[IDS] = sample.input_ids_T
    tokens_FT[LABELS] = IGNORE_INDEX
    tokens_FT[LABELS, :-1] = np.where(sample.weight_T[1:] > 0, sample.input_ids_T[1:], IGNORE_INDEX)
    tokens_FT[POSITIONS] = np.arange(len(sample))
    tokens_FT[MODALITY] = sample.modality_ids_T
    tokens_FT[SAMPLE_MODALITY] = sample.modality_ids_T.max(initial=0)
    return tokens_FT


def _shifted_weight(sample: Sample) -> np.ndarray:
    weight_T = np.zeros(len(sample), dtype=np.float32)
    weight_T[:-1] = sample.weight_T[1:]
    return weight_T


def _cat(parts: Sequence[NDArray[Any] | Tensor]) -> Tensor:
    # Of one, joining would make a copy: tens of megabytes of pixels.
    return torch.as_tensor(
        parts[0] if len(parts) == 1 else np.concatenate([np.asarray(part) for part in parts])
    )


def _prefix(rows: Sequence[Row]) -> Segments | None:
    parts = [row.prefix for row in rows if row.prefix is not None]
    return Segments(tuple(count for part in parts for count in part)) if len(parts) == len(rows) else None


def _join(images: Sequence[ImagePatches], patch_values: int) -> tuple[np.ndarray, np.ndarray]:
    if not images:
        return np.empty((0, patch_values), dtype=np.uint8), np.empty(0, dtype=np.int64)
    return (
        np.concatenate([image.patches_PC for image in images]),
        np.concatenate([image.position_ids_P for image in images]),
    )
