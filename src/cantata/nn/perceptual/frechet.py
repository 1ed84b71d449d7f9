"""Frechet distance between two sets of features (Heusel et al. 2017, arXiv:1706.08500).

N  images    F  features
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What a set leaves behind, in fp64; it adds up over batches and ranks."""

    images: Tensor
    """N, scalar."""
    sum_F: Tensor
    outer_FF: Tensor
    """Sum of the outer products of each image's features with themselves."""

    @staticmethod
    def of(features_NF: Tensor) -> Moments:
        x_NF = features_NF.double()
        return Moments(x_NF.new_tensor(float(len(x_NF))), x_NF.sum(0), x_NF.T @ x_NF)

    def mean(self) -> Tensor:
        return self.sum_F / self.images

    def covariance(self) -> Tensor:
        """With N - 1 below the line, as usual for this distance; needs two images."""
        mean_F = self.mean()
        return (self.outer_FF - self.images * torch.outer(mean_F, mean_F)) / (self.images - 1)


def frechet_distance(x: Moments, y: Moments) -> float:
    """`|mean_x - mean_y|^2 + tr(cov_x + cov_y - 2 (cov_x cov_y)^(1/2))`.

    Of fewer images than features the covariances are singular: the distance is defined, and biased more the
    fewer there are, so it compares runs on the same images only.
    """
    of_x_FF, of_y_FF = x.covariance(), y.covariance()
    root_FF = _root(of_x_FF)
    # Their product has the eigenvalues of this symmetric one, whose roots are real.
    product_FF = root_FF @ of_y_FF @ root_FF
    eigenvalues_F = torch.linalg.eigvalsh((product_FF + product_FF.T) / 2)
    spread = of_x_FF.trace() + of_y_FF.trace() - 2 * eigenvalues_F.clamp(min=0).sqrt().sum()
    distance: float = ((x.mean() - y.mean()).square().sum() + spread).item()
    return max(distance, 0.0)


def _root(matrix_FF: Tensor) -> Tensor:
    """The symmetric square root of a covariance; what rounding made negative counts as 0."""
    values_F, vectors_FF = torch.linalg.eigh(matrix_FF)
    root_FF: Tensor = (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T
    return root_FF
