"""A label model: from the votes of noisy rules alone, how often each is right, and the probable labels.

Labelling functions (Ratner et al., 2017, https://arxiv.org/abs/1711.10160) vote for a class or abstain.
Here rule j can vote for one class only, c_j. On a text of class y it fires with probability

    P(rule j fires | y) = h_j  if y = c_j,  f_j  otherwise

its hit rate and its rate of false alarms, and given y the rules are independent. So a rule's silence
is evidence too, and one that fires on half of all texts says less than one that fires rarely. This is
the model of Dawid and Skene (1979, https://doi.org/10.2307/2346806) with abstaining as an outcome, and
with two numbers for a rule: all classes but its own are alike to it. Without that bond a class may
wander off in the estimation and stand for something else than its name.

Expectation maximization starts where q is the majority of the votes and takes turns:

    M: h_j  = (S·r_j + sum_{i: j fires} q_i[c_j]) / (S + sum_i q_i[c_j]),   f_j the same with 1 - q
    E: q_i[y] ∝ p[y] · prod_j P(what rule j does | y)

where r_j is the share of texts on which rule j fires: a prior of S texts on which the rule knows
nothing. A rule whose hits are no likelier than its alarms gets h_j = f_j = r_j and no say. The shares
of the classes p stay the majority's: estimated too, the class of the weakest rules would swallow all
texts on which few rules fire. Rules that repeat or exclude each other aren't independent given y, and
make the model surer than it should be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR_TEXTS = 10.0  # S
TOLERANCE = 1e-6
MAX_ROUNDS = 500


@dataclass(frozen=True)
class LabelModel:
    """What was estimated, all float64.

    `prior` is p [K], `hits` h [rules], `alarms` f [rules]; `classes` is c, int64 [rules].
    """

    classes: Tensor
    prior: Tensor
    hits: Tensor
    alarms: Tensor

    def posterior(self, fires: Tensor) -> Tensor:
        """Return q = P(y | what the rules do), float64 [texts, K], for bool [texts, rules]."""
        own = (self.classes.unsqueeze(1) == torch.arange(len(self.prior))).double()  # [rules, K]
        seen, silent = fires.double(), (~fires).double()
        # What a rule adds where y is its class; where it isn't, what it adds is the same for all y.
        hit = seen * (self.hits / self.alarms).log()
        miss = silent * ((1 - self.hits) / (1 - self.alarms)).log()
        return (self.prior.log() + (hit + miss) @ own).softmax(1)

    def accuracies(self) -> Tensor:
        """Return P(y = c_j | rule j fires), float64 [rules]."""
        share = self.prior[self.classes]
        right, wrong = share * self.hits, (1 - share) * self.alarms
        return right / (right + wrong)


def fit(fires: Tensor, classes: Tensor, count: int) -> LabelModel:
    """Estimate the model from `fires`, bool [texts, rules], and each rule's class in 0..count-1.

    Raises:
        ValueError: the shapes don't fit, there is no text or rule, or a class is none of `count`.
    """
    if fires.dim() != 2 or classes.shape != fires.shape[1:] or not fires.numel():
        raise ValueError(
            f"fires must be [texts, rules] and classes [rules], not of shapes {list(fires.shape)} "
            f"and {list(classes.shape)}"
        )
    if int(classes.min()) < 0 or int(classes.max()) >= count:
        raise ValueError(f"classes must be in 0..{count - 1}, not {classes.tolist()}")
    seen = fires.double()
    rates = (1 + seen.sum(0)) / (2 + len(seen))  # above 0 and below 1
    q = majority(fires, classes, count)
    prior = (1 + q.sum(0)) / (count + len(q))  # above 0
    for _ in range(MAX_ROUNDS):
        own = q[:, classes]  # [texts, rules]
        hits = (PRIOR_TEXTS * rates + (seen * own).sum(0)) / (PRIOR_TEXTS + own.sum(0))
        alarms = (PRIOR_TEXTS * rates + (seen * (1 - own)).sum(0)) / (
            PRIOR_TEXTS + (1 - own).sum(0)
        )
        useful = hits > alarms
        model = LabelModel(
            classes,
            prior,
            torch.where(useful, hits, rates),
            torch.where(useful, alarms, rates),
        )
        before, q = q, model.posterior(fires)
        if float((q - before).abs().max()) < TOLERANCE:
            break
    return model


def majority(fires: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return the class of most rules that fire, as float64 [texts, count]; a tie is shared evenly.

    A text on which no rule fires is a tie of all classes.
    """
    votes = fires.double() @ torch.nn.functional.one_hot(classes, count).double()
    most = (votes == votes.amax(1, keepdim=True)).double()
    return most / most.sum(1, keepdim=True)
