"""Four ways to add up the distillation terms: the schemes of paper section 3.4.1 and table 4.

All are called alike, with the losses of the teachers of a pass and with the student's output:

    losses: term -> (B,), the unweighted loss of each image
    summary: (B, summary_dim), features: (B, N, feature_dim) of the student, any floating dtype

and return (B,) float32, the balanced total of each image, whose mean over the batch is the loss.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .losses import LOSSES, SUMMARY, Term


class Balancing(nn.Module):
    """What all schemes share: the terms, of all teachers of a stage."""

    def __init__(self, terms: list[Term]):
        super().__init__()
        self.terms = list(terms)

    def update(self, means: Callable[[], Mapping[Term, float]]) -> None:
        """Called once per optimizer step, on every process. Most schemes learn nothing from it.

        Args:
            means: returns term -> its mean over all images of the step that had it, over all processes; finite.
                Called on all processes together or on none, as the processes and the device have to be waited for.
        """


class NaiveBalancing(Balancing):
    """Fixed weights: the sum of equations 1 and 3, which the paper uses throughout."""

    def forward(self, losses: dict[Term, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        total = summary.new_zeros(len(summary), dtype=torch.float32)
        for term, loss in losses.items():
            total = total + term.weight * loss.float()
        return total


class UncertaintyBalancing(Balancing):
    """The paper's form of Kendall et al. 2018, with b predicted for each image from the student's features:

        total = sum_k weight_k * (exp(-b_k) * L_k + softplus(b_k))

    All b are 0 at the start, where the total is the naive one plus weight_k * ln 2 for each term.
    """

    def __init__(self, terms: list[Term], summary_dim: int, feature_dim: int):
        super().__init__(terms)
        # The paper does not say what b is predicted from. Ours: summary terms from the summary, others from the mean
        # over positions, by one Linear per kind, through which gradients reach the student as in Kendall's networks.
        self.heads = nn.ModuleDict()
        self.columns: dict[Term, int] = {}  # term -> column of its kind's head
        for kind in LOSSES:
            of_kind = [term for term in terms if term.kind == kind]
            self.columns |= {term: column for column, term in enumerate(of_kind)}
            if of_kind:
                head = nn.Linear(summary_dim if kind == SUMMARY else feature_dim, len(of_kind))
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
                self.heads[kind] = head

    def forward(self, losses: dict[Term, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        mean = features.float().mean(1)  # (B, N, D) -> (B, D)
        uncertainty = {}  # kind -> (B, terms of this kind)
        for kind, head in self.heads.items():
            x = summary if kind == SUMMARY else mean
            uncertainty[kind] = head(x.to(next(head.parameters()).dtype)).float()
        # Processes may serve different teachers, but must reduce the gradients of the same parameters: a head without
        # a term in this pass gets a gradient of zero, not none.
        total = sum(0 * b.sum(1) for b in uncertainty.values())
        assert isinstance(total, torch.Tensor)
        for term, loss in losses.items():
            b = uncertainty[term.kind][:, self.columns[term]]
            total = total + term.weight * (torch.exp(-b) * loss.float() + F.softplus(b))
        return total


class AdaLossBalancing(Balancing):
    """AdaLoss (Hu et al. 2019): weight_k / E[L_k], so that every term weighs the same whatever its size.

    E is a bias-corrected exponential moving average over optimizer steps, momentum 0.99 (paper). No gradient passes
    through it (the paper does not say). A term without an average yet has its weight of the recipe.
    """

    averages: torch.Tensor  # (K,) float32 in the order of the terms, bias-corrected
    updates: torch.Tensor  # (K,) int64, the steps that each average has seen

    def __init__(self, terms: list[Term], momentum: float = 0.99):
        super().__init__(terms)
        self.momentum = momentum
        self.columns = {term: column for column, term in enumerate(terms)}
        self.register_buffer("averages", torch.zeros(len(terms), dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(len(terms), dtype=torch.int64))

    def forward(self, losses: dict[Term, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        # The floor keeps a term that is matched perfectly (rounding can even take its mean below 0) from diverging.
        scales = torch.where(self.updates > 0, 1 / self.averages.clamp(min=1e-6), 1.0)
        total = summary.new_zeros(len(summary), dtype=torch.float32)
        for term, loss in losses.items():
            total = total + term.weight * scales[self.columns[term]] * loss.float()
        return total

    @torch.no_grad()
    def update(self, means: Callable[[], Mapping[Term, float]]) -> None:
        """Moves the averages of the terms that the step had; the others stay as they are."""
        for term, mean in means().items():
            column = self.columns[term]
            self.updates[column] += 1
            # (1 - m) / (1 - m^n): the moving average and its bias correction in one; 1 for the first value.
            rate = (1 - self.momentum) / -torch.expm1(self.updates[column] * math.log(self.momentum))
            self.averages[column] += rate * (torch.as_tensor(mean).to(self.averages) - self.averages[column])


class AMTMLBalancing(Balancing):
    """AMTML-KD (Liu et al. 2020): each image's teachers are weighted by a softmax over learned scores.

        beta = max over positions of the student's features (B, D);  score_t = v . (theta_t * beta)
        total = T * sum_t softmax_t(score) * L_t + 0.1 * (|v|^2 + sum_t |theta_t|^2)

    with t over the T teachers of this pass and L_t the weighted terms of one teacher. The paper reports that the
    weight collapses onto one teacher: the softmax can lower the loss by favoring whichever teacher is easiest.

    How the paper connected the method to its losses is not known. Ours are the factor T, by which equal weights give
    the naive total at the same learning rate, and what the L2 penalty covers: the parameters in use, so that those of
    an absent teacher do not change.
    """

    def __init__(self, terms: list[Term], feature_dim: int, l2_penalty: float = 0.1):
        super().__init__(terms)
        self.l2_penalty = l2_penalty
        teachers = dict.fromkeys(term.teacher for term in terms)
        self.rows = {teacher: row for row, teacher in enumerate(teachers)}
        # Equal weights at the start. Were v zero as well, neither would ever get a gradient.
        self.theta = nn.Parameter(torch.zeros(len(teachers), feature_dim))
        self.v = nn.Parameter(torch.full((feature_dim,), feature_dim**-0.5))

    def forward(self, losses: dict[Term, torch.Tensor], summary: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if not losses:  # a pass without teachers, beside other processes that have some: gradients of zero
            return summary.new_zeros(len(summary), dtype=torch.float32) + 0 * (self.theta.sum() + self.v.sum())
        by_teacher: dict[str, torch.Tensor] = {}  # teacher -> (B,)
        for term, loss in losses.items():
            weighted = term.weight * loss.float()
            by_teacher[term.teacher] = by_teacher[term.teacher] + weighted if term.teacher in by_teacher else weighted
        # Rows of one parameter: the teachers that are absent get a gradient of zero, not none (as in the heads above).
        theta = self.theta[[self.rows[teacher] for teacher in by_teacher]].float()  # (T, D)
        v = self.v.float()
        beta = features.float().amax(1)  # (B, N, D) -> (B, D)
        shares = (beta @ (v * theta).T).softmax(1)  # (B, T)
        total = len(by_teacher) * (shares * torch.stack(list(by_teacher.values()), 1)).sum(1)
        return total + self.l2_penalty * (v.square().sum() + theta.square().sum())


def build_balancing(mode: str, terms: list[Term], summary_dim: int, feature_dim: int) -> Balancing:
    """The balancing of a recipe.

    Args:
        mode: naive, uncertainty, adaloss or amtml_kd.
        terms: of all teachers of the stage.
        summary_dim, feature_dim: widths of the student's summary and features.

    Raises:
        ValueError: unknown mode.
    """
    schemes = {
        "naive": lambda: NaiveBalancing(terms),
        "uncertainty": lambda: UncertaintyBalancing(terms, summary_dim, feature_dim),
        "adaloss": lambda: AdaLossBalancing(terms),
        "amtml_kd": lambda: AMTMLBalancing(terms, feature_dim),
    }
    if mode not in schemes:
        raise ValueError(f"loss balancing is {mode!r}; expected one of {', '.join(schemes)}")
    return schemes[mode]()
