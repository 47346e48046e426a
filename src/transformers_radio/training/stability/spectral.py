"""Spectral reparametrization of the student's Linears: keeps attention entropy from collapsing (paper section 4).

W' = W * scale / (u^T W v + eps), with u and v the singular vectors of the largest singular value of W, found by power
iteration (Miyato et al., arXiv 1802.05957), and a trained scale (Zhai et al., arXiv 2303.06296). A Linear with this
reparametrization has, instead of `weight`, the state
  parametrizations.weight.original        W
  parametrizations.weight.0.scale         (1, 1): rho, from which scale = softplus(rho) + 0.05; two-dimensional, so
                                          that weight decay applies to it
  parametrizations.weight.0._u, ._v       unit vectors
  parametrizations.weight.0._sn_version   2; in a file of version 1, or without this key, scale is rho itself
`fold_spectral` turns it into a plain weight.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from transformers_radio.modeling import RadioModel

_EPS = 1e-6
_SMALLEST_SCALE = 0.05
_PARTS = ("original", "0.scale", "0._u", "0._v", "0._sn_version")


class SpectralReparam(nn.Module):
    """The parametrization of one weight (out, in). `power_step` changes u and v; `forward` only reads them.

    Raises:
        ValueError: the largest singular value of the weight is not above 0.05, the smallest scale.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        # its own generator: all processes agree, and the random state of the run is not changed
        u = torch.randn(len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        self._u = nn.Buffer(u)
        self._v = nn.Buffer(torch.zeros(weight.shape[1], device=weight.device))
        for _ in range(20):
            self.power_step(weight)
        # what `forward` divides by, so that the first W' is W
        scale = float(self._u.double() @ weight.detach().double() @ self._v.double()) + _EPS
        if not scale > _SMALLEST_SCALE:
            raise ValueError(
                f"the largest singular value is {scale:.3g}, but spectral reparametrization cannot go below "
                f"{_SMALLEST_SCALE}; start from larger weights (student.config.initializer_range) or do without it"
            )
        rho = math.log(math.expm1(scale - _SMALLEST_SCALE))  # the inverse of softplus
        self.scale = nn.Parameter(torch.full((1, 1), rho, device=weight.device, dtype=weight.dtype))
        self._sn_version = nn.Buffer(torch.tensor(2, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # copies: power steps change u and v in place, and a backward pass may come after the next one
        sigma = _sigma(weight, self._u.clone(), self._v.clone())
        return _scaled(weight, self.scale, sigma, self._sn_version)

    @torch.no_grad()
    def power_step(self, weight: torch.Tensor) -> None:
        """One step of power iteration."""
        with torch.autocast(weight.device.type, enabled=False):
            v = F.normalize(weight.float().T @ self._u.float(), dim=0)
            u = F.normalize(weight.float() @ v, dim=0)
        self._u.copy_(u)
        self._v.copy_(v)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(f"{prefix}_sn_version", torch.tensor(1))
        super()._load_from_state_dict(state_dict, prefix, *args)


def add_spectral_reparam(model: RadioModel) -> None:
    """Reparametrizes the Linears in the blocks of a student, in place.

    The model computes the same function as before. Call this before the model is wrapped (DDP) or sharded (FSDP2), and
    `power_steps` once per optimizer step.

    Raises:
        ValueError: the model has it already, or a weight is too small (see SpectralReparam).
    """
    if has_spectral_reparam(model):
        raise ValueError("the model has a spectral reparametrization already; add it once")
    inside = {module for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear)}
    reparams = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module in inside:
            try:
                reparams.append((module, SpectralReparam(module.weight)))
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from error
    for linear, reparam in reparams:
        register_parametrization(linear, "weight", reparam)


def has_spectral_reparam(model: nn.Module) -> bool:
    return any(isinstance(module, SpectralReparam) for module in model.modules())


def fold_spectral(state_dict: dict[str, torch.Tensor], averaged: bool = False) -> dict[str, torch.Tensor]:
    """A state dict with W' as plain `weight` in place of each reparametrized one; all other keys stay as they are.

    Args:
        averaged: the weights are averages over training, while u and v belong to the last weights. W' is then W *
            scale / sigma, where sigma is the largest singular value of W itself.

    Raises:
        ValueError: a parametrization has other keys than those of this module, or lacks some.
    """
    folded = {}
    for key, value in state_dict.items():
        linear, mark, part = key.rpartition("parametrizations.weight.")
        if not mark:
            folded[key] = value
        elif part not in _PARTS:
            raise ValueError(f"{key} is not part of a spectral reparametrization; expected one of {', '.join(_PARTS)}")
        elif part == "original":
            missing = [name for name in _PARTS[1:4] if f"{linear}{mark}{name}" not in state_dict]
            if missing:
                raise ValueError(f"{linear}{mark}* lacks {', '.join(missing)}; pass the whole state dict")
            scale, u, v = (state_dict[f"{linear}{mark}{name}"] for name in _PARTS[1:4])
            version = state_dict.get(f"{linear}{mark}{_PARTS[4]}", torch.tensor(1, device=value.device))
            with torch.no_grad():
                sigma = torch.linalg.matrix_norm(value.float(), ord=2) if averaged else _sigma(value, u, v)
                folded[f"{linear}weight"] = _scaled(value, scale, sigma, version)
    return folded


def _sigma(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """u^T W v, in float32: in half precision the error would be larger than what a training step changes."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.dot(u.float(), weight.float() @ v.float())


def _scaled(weight: torch.Tensor, rho: torch.Tensor, sigma: torch.Tensor, version: torch.Tensor) -> torch.Tensor:
    """W' (out, in), computed in float32, in the dtype of the weight."""
    with torch.autocast(weight.device.type, enabled=False):
        matrix, rho = weight.float(), rho.float()
        scale = torch.where(version > 1, F.softplus(rho) + _SMALLEST_SCALE, rho)
        return (matrix * (scale / (sigma + _EPS))).to(weight.dtype)


def power_steps(model: nn.Module) -> None:
    """One step of power iteration for every reparametrized weight; all processes together if weights are sharded.

    Call it once per optimizer step, before the first pass: all passes of a step, whose number depends on the number of
    processes, and blocks that gradient checkpointing computes again then see the same u and v.
    """
    lists = [module for module in model.modules() if isinstance(module, ParametrizationList)]
    found = [(module[0], module.original) for module in lists if isinstance(module[0], SpectralReparam)]
    sharded = [(reparam, weight) for reparam, weight in found if isinstance(weight, DTensor)]
    for reparam, weight in found:
        if not isinstance(weight, DTensor):
            reparam.power_step(weight)
    if sharded:
        _sharded_power_steps(sharded)


@torch.no_grad()
def _sharded_power_steps(found: list[tuple[SpectralReparam, DTensor]]) -> None:
    """Like `power_step`, on the rows that this process holds, with two sums over the processes for all weights."""
    meshes = {weight.device_mesh for _, weight in found}
    (mesh,) = meshes
    dim = next(i for i, placement in enumerate(found[0][1].placements) if placement.is_shard(0))
    group = mesh.get_group(dim)
    rank, size = mesh.get_local_rank(dim), mesh.size(dim)

    parts = []
    for reparam, weight in found:
        local = weight.to_local().float()  # (rows, in); torch.chunk's share of (out, in)
        start = min(rank * math.ceil(len(weight) / size), len(weight))
        parts.append((reparam, local, slice(start, start + len(local))))
    v = torch.cat([local.T @ reparam._u.float()[rows] for reparam, local, rows in parts])
    torch.distributed.all_reduce(v, group=group)
    vs = [F.normalize(one, dim=0) for one in v.split([reparam._v.numel() for reparam, _ in found])]
    us = [torch.zeros_like(reparam._u, dtype=torch.float32) for reparam, _ in found]
    for u, one, (_, local, rows) in zip(us, vs, parts, strict=True):
        u[rows] = local @ one
    u = torch.cat(us)
    torch.distributed.all_reduce(u, group=group)
    for (reparam, _), one, length in zip(found, vs, u.split([one.numel() for one in us]), strict=True):
        reparam._v.copy_(one)
        reparam._u.copy_(F.normalize(length, dim=0))
