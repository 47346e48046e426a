"""Four ways to add up the distillation terms: the schemes of paper section 3.4.1 and table 4.

All are called alike, with the terms of the teachers that this pass serves and with the student's output:

    terms: `teacher/summary` or `teacher/features` -> (B,), the unweighted loss of each image
    summary: (B, summary_dim), features: (B, N, feature_dim) of the student, any floating dtype

and return (B,) float32, the balanced total of each image, whose mean over the batch is the loss. `weights` holds every
term of the recipe with its lambda_i (equation 1) or gamma_i (equation 3); a term without a weight is a KeyError.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


class NaiveBalancing(nn.Module):
    """Fixed weights: the sum of equations 1 and 3, which the paper uses throughout."""

    def __init__(self, weights: dict[str, float]):
        super().__init__()
        self.weights = dict(weights)

    def forward(self, terms: dict[str, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        total = summary.new_zeros(len(summary), dtype=torch.float32)
        for term, loss in terms.items():
            total = total + self.weights[term] * loss.float()
        return total


class UncertaintyBalancing(nn.Module):
    """The paper's form of Kendall et al. 2018, with b predicted for each image from the student's features:

        total = sum_k weight_k * (exp(-b_k) * L_k + softplus(b_k))

    All b are 0 at the start, where the total is the naive one plus weight_k * ln 2 a term.
    """

    def __init__(self, weights: dict[str, float], summary_dim: int, feature_dim: int):
        super().__init__()
        self.weights = dict(weights)
        # The paper does not say what b is predicted from. Ours: summary terms from the summary, feature terms from the
        # mean over positions, by one Linear each, through which gradients reach the student as in Kendall's networks.
        self.heads = nn.ModuleDict()
        self.columns: dict[str, int] = {}  # term -> column of its kind's head
        for kind, width in (("summary", summary_dim), ("features", feature_dim)):
            names = [term for term in weights if _kind(term) == kind]
            self.columns |= {term: column for column, term in enumerate(names)}
            if names:
                head = nn.Linear(width, len(names))
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
                self.heads[kind] = head

    def forward(self, terms: dict[str, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        inputs = {"summary": summary, "features": features.float().mean(1)}  # (B, N, D) -> (B, D)
        uncertainty = {
            kind: head(inputs[kind].to(next(head.parameters()).dtype)).float()  # (B, terms of this kind)
            for kind, head in self.heads.items()
        }
        # Processes may serve different teachers, but must reduce the gradients of the same parameters: a head without
        # a term in this pass gets a gradient of zero, not none.
        total = sum(0 * b.sum(1) for b in uncertainty.values())
        assert isinstance(total, torch.Tensor)
        for term, loss in terms.items():
            b = uncertainty[_kind(term)][:, self.columns[term]]
            total = total + self.weights[term] * (torch.exp(-b) * loss.float() + F.softplus(b))
        return total


class AdaLossBalancing(nn.Module):
    """AdaLoss (Hu et al. 2019): weight_k / E[L_k], so that every term weighs the same whatever its size.

    E is a bias-corrected exponential moving average over optimizer steps, momentum 0.99 (paper). No gradient passes
    through it (the paper does not say). A term without an average yet has its weight of the recipe.
    """

    averages: torch.Tensor  # (K,) float32 in the order of `weights`, bias-corrected
    updates: torch.Tensor  # (K,) int64, the steps that each average has seen

    def __init__(self, weights: dict[str, float], momentum: float = 0.99):
        super().__init__()
        self.weights = dict(weights)
        self.momentum = momentum
        self.columns = {term: column for column, term in enumerate(weights)}
        self.register_buffer("averages", torch.zeros(len(weights), dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(len(weights), dtype=torch.int64))

    def forward(self, terms: dict[str, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        # The floor keeps a term that is matched perfectly (rounding can even take its mean below 0) from diverging.
        scales = torch.where(self.updates > 0, 1 / self.averages.clamp(min=1e-6), 1.0)
        total = summary.new_zeros(len(summary), dtype=torch.float32)
        for term, loss in terms.items():
            total = total + self.weights[term] * scales[self.columns[term]] * loss.float()
        return total

    @torch.no_grad()
    def update(self, means: Mapping[str, float | torch.Tensor]) -> None:
        """Call once an optimizer step, on every process with the same values.

        Args:
            means: term -> its mean over all images of the step that had it, over all processes; finite. The average of
                a term that is not in it stays as it is.
        """
        for term, mean in means.items():
            column = self.columns[term]
            self.updates[column] += 1
            # (1 - m) / (1 - m^n): the moving average and its bias correction in one; 1 for the first value.
            rate = (1 - self.momentum) / -torch.expm1(self.updates[column] * math.log(self.momentum))
            self.averages[column] += rate * (torch.as_tensor(mean).to(self.averages) - self.averages[column])


class AMTMLBalancing(nn.Module):
    """AMTML-KD (Liu et al. 2020): each image's teachers are weighted by a softmax over learned scores.

        beta = max over positions of the student's features (B, D);  score_t = v . (theta_t * beta)
        total = T * sum_t softmax_t(score) * L_t + 0.1 * (|v|^2 + sum_t |theta_t|^2)

    with t over the T teachers of this pass and L_t the weighted terms of one teacher. The paper reports that the
    weight collapses onto one teacher: the softmax can lower the loss by favouring whichever teacher is easiest.

    How the paper wired the method to its losses is not known. Ours are the factor T, by which equal weights give the
    naive total at the same learning rate, and what the L2 penalty covers: the parameters in use, so that a teacher
    that is not served keeps its own.
    """

    def __init__(self, weights: dict[str, float], feature_dim: int, l2_penalty: float = 0.1):
        super().__init__()
        self.weights = dict(weights)
        self.l2_penalty = l2_penalty
        self.teachers = list(dict.fromkeys(_teacher(term) for term in weights))
        # Equal weights at the start. Were v zero as well, neither would ever get a gradient.
        self.theta = nn.Parameter(torch.zeros(len(self.teachers), feature_dim))
        self.v = nn.Parameter(torch.full((feature_dim,), feature_dim**-0.5))

    def forward(self, terms: dict[str, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if not terms:  # a pass without teachers, for the sake of the other processes: gradients of zero
            return summary.new_zeros(len(summary), dtype=torch.float32) + 0 * (self.theta.sum() + self.v.sum())
        losses: dict[str, torch.Tensor] = {}  # teacher -> (B,)
        for term, loss in terms.items():
            weighted = self.weights[term] * loss.float()
            losses[_teacher(term)] = losses[_teacher(term)] + weighted if _teacher(term) in losses else weighted
        # Rows of one parameter: the teachers that are absent get a gradient of zero, not none (as in the heads above).
        theta = self.theta[[self.teachers.index(teacher) for teacher in losses]].float()  # (T, D)
        v = self.v.float()
        beta = features.float().amax(1)  # (B, N, D) -> (B, D)
        shares = (beta @ (v * theta).T).softmax(1)  # (B, T)
        total = len(losses) * (shares * torch.stack(list(losses.values()), 1)).sum(1)
        return total + self.l2_penalty * (v.square().sum() + theta.square().sum())


def build_balancing(mode: str, weights: dict[str, float], summary_dim: int, feature_dim: int) -> nn.Module:
    """The balancing of a recipe.

    Args:
        mode: naive, uncertainty, adaloss or amtml_kd.
        weights: `teacher/summary` and `teacher/features` of all terms of the recipe -> weight.
        summary_dim, feature_dim: widths of the student's summary and features.

    Raises:
        ValueError: unknown mode.
    """
    schemes = {
        "naive": lambda: NaiveBalancing(weights),
        "uncertainty": lambda: UncertaintyBalancing(weights, summary_dim, feature_dim),
        "adaloss": lambda: AdaLossBalancing(weights),
        "amtml_kd": lambda: AMTMLBalancing(weights, feature_dim),
    }
    if mode not in schemes:
        raise ValueError(f"loss balancing is {mode!r}; expected one of {', '.join(schemes)}")
    return schemes[mode]()


def _teacher(term: str) -> str:
    return term.rsplit("/", 1)[0]


def _kind(term: str) -> str:
    return term.rsplit("/", 1)[1]
