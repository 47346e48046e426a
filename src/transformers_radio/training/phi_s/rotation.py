"""PHI-S: teachers' features brought to one scale by a rotation and one number (Ranzinger et al., arXiv 2410.01680).

Features y with covariance U diag(l) U^T become y' = R (y - mean) / phi, with R = H U^T, H an orthonormal Hadamard
matrix and phi = sqrt(mean of l). Every entry of H has the same size, so each channel of y' holds an equal share of all
the variance: 1. The map is a rotation and a scale, so errors keep their proportions, and a Linear can absorb its
inverse. It came after AM-RADIO, which left its teachers as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .hadamard import hadamard


class FeatureMoments:
    """Count, mean and scatter (sum of outer products around the mean) of a stream of vectors, in float64.

    Parts are joined around their own means (Chan et al. 1983), so that a mean much larger than the spread costs no
    digits.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Adds vectors (..., C) of any floating dtype.

        Raises:
            FloatingPointError: a value is NaN or infinite; nothing was added.
        """
        channels = len(self.mean)
        if x.shape[-1] != channels:
            raise ValueError(f"vectors of shape {tuple(x.shape)} given; expected {channels} channels last")
        rows = x.detach().reshape(-1, channels).to(self.mean)  # (..., C) -> (n, C)
        bad = int((~rows.isfinite().all(1)).sum())
        if bad:
            raise FloatingPointError(
                f"{bad} of {len(rows)} feature vectors are not finite; look at the teacher's output"
            )
        if len(rows) == 0:
            return
        part = FeatureMoments(channels, self.mean.device)
        part.count, part.mean = len(rows), rows.mean(0)
        part.scatter = (rows - part.mean).T @ (rows - part.mean)
        self.merge(part)

    def merge(self, other: "FeatureMoments") -> None:
        """Adds the vectors that `other` has seen."""
        count = self.count + other.count
        if count == 0:
            return
        mean = self.mean + (other.mean - self.mean) * (other.count / count)
        self.scatter = self._scatter_around(mean) + other._scatter_around(mean)
        self.count, self.mean = count, mean

    def all_reduce(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Adds the vectors that all other processes have seen. Called on every process.

        Args:
            sum_over_processes: tensor -> its sum over the processes, e.g. `Accelerator().reduce`.
        """
        count = int(sum_over_processes(torch.tensor(self.count, device=self.mean.device)))
        if count == 0:
            return
        mean = sum_over_processes(self.mean * (self.count / count))
        self.scatter = sum_over_processes(self._scatter_around(mean))
        self.count, self.mean = count, mean

    def covariance(self) -> torch.Tensor:
        """(C, C) float64, divided by count - 1.

        Raises:
            ValueError: C vectors or fewer, whose covariance has no full rank.
        """
        channels = len(self.mean)
        if self.count < channels + 1:
            raise ValueError(
                f"{self.count} feature vectors are too few for the covariance of {channels} channels; "
                f"give at least {channels + 1}, better some hundred times as many"
            )
        return self.scatter / (self.count - 1)

    def _scatter_around(self, center: torch.Tensor) -> torch.Tensor:
        offset = self.mean - center
        return self.scatter + self.count * torch.outer(offset, offset)


@dataclass
class PhiS:
    """The standardization of one teacher's features. Calls compute and return in the dtype of `mean` and `rotation`.

    `rotation` depends on the eigensolver's choice of signs: compute it once and share or save it, instead of computing
    it again on another process or machine.
    """

    mean: torch.Tensor  # (C,)
    rotation: torch.Tensor = field(repr=False)  # (C, C), R = H U^T
    phi: float  # > 0, in units of the features

    @classmethod
    def from_moments(cls, moments: FeatureMoments) -> "PhiS":
        """In float64.

        Raises:
            ValueError: too few vectors, vectors that are all equal, or no Hadamard matrix of that many channels.
        """
        eigenvalues, eigenvectors = torch.linalg.eigh(moments.covariance())  # (C,), (C, C) in columns
        phi = eigenvalues.mean().item() ** 0.5 if eigenvalues.mean() > 0 else 0.0
        if phi == 0:
            raise ValueError(f"all {moments.count} feature vectors are equal, there is no scale to bring to 1")
        rotation = hadamard(len(moments.mean)).to(eigenvectors) @ eigenvectors.T
        return cls(mean=moments.mean.clone(), rotation=rotation, phi=phi)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PhiS":
        return PhiS(self.mean.to(device, dtype), self.rotation.to(device, dtype), self.phi)

    def standardize(self, y: torch.Tensor) -> torch.Tensor:
        """Features (..., C) -> R (y - mean) / phi, with mean 0 and variance 1 in every channel."""
        return (y.to(self.mean) - self.mean) @ self.rotation.T / self.phi

    def fold(self, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the Linear that gives phi R^T linear(x) + mean: the head then predicts plain features.

        Args:
            linear: the last one of a head, with C outputs, or u*u*C in the order (u, u, C) where the head predicts u*u
                positions at once.

        Returns:
            weight as linear.weight; bias (out_features,), also where linear had none. Computed in float64.
        """
        channels = len(self.mean)
        if linear.out_features % channels:
            raise ValueError(f"the head has {linear.out_features} outputs; expected a multiple of {channels} channels")
        inverse = self.phi * self.rotation.double().T  # y' -> y - mean
        weight = linear.weight.detach().to(inverse).unflatten(0, (-1, channels))  # (u*u*C, hidden) -> (u*u, C, hidden)
        old_bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        bias = old_bias.to(inverse).unflatten(0, (-1, channels))  # (u*u*C,) -> (u*u, C)
        return (
            (inverse @ weight).flatten(0, 1).to(linear.weight),  # (u*u, C, hidden) -> (u*u*C, hidden)
            (bias @ inverse.T + self.mean.double()).flatten().to(linear.weight),  # (u*u, C) -> (u*u*C,)
        )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """For safetensors."""
        return {"mean": self.mean, "rotation": self.rotation, "phi": torch.tensor(self.phi, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "PhiS":
        return cls(tensors["mean"], tensors["rotation"], tensors["phi"].item())
