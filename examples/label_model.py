"""A label model: from the votes of noisy rules alone, how often each is right, and the probable labels.

Labelling functions (Ratner et al., 2017, https://arxiv.org/abs/1711.10160) vote for one of K classes
or abstain. The model is Dawid and Skene's (1979) with one accuracy a_j for each rule j:

    P(v_j | y) = a_j               if v_j = y
                 (1 - a_j)/(K - 1) otherwise

for a vote v_j on a text of class y; rules err independently, abstaining says nothing, and classes are
equally likely before any vote. (A share of each class that is estimated too would let a rule that
votes alone confirm itself: its class gets likelier, so the rule seems right more often, and so on.)

Expectation maximization takes turns:

    E: q_i(y) ∝ prod_j P(v_ij | y)
    M: a_j    = (S·A + sum_i q_i(v_ij)) / (S + n_j)      over the n_j texts that rule j votes on

where S votes that are right with probability A are the prior: a rule that votes seldom keeps near A.
Rules that repeat each other break the independence, and make the model surer than it should be.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR_ACCURACY = 0.7  # A: rules are better than a guess, or nobody would write them
PRIOR_VOTES = 10.0  # S
TOLERANCE = 1e-6
MAX_ROUNDS = 1000


def posterior(votes: Tensor, accuracies: Tensor, classes: int) -> Tensor:
    """Return P(y | votes), float64 [texts, classes].

    Args:
        votes: int64 [texts, rules], a class in 0..classes-1 or below zero for an abstention.
        accuracies: float64 [rules], each above 0 and below 1.
        classes: K, at least 2.
    """
    voted = (votes >= 0).double()
    is_for = (votes.unsqueeze(2) == torch.arange(classes)).double()  # [texts, rules, classes]
    right, wrong = accuracies.log(), ((1 - accuracies) / (classes - 1)).log()
    logits = (voted @ wrong).unsqueeze(1) + torch.einsum("ijk,j->ik", is_for, right - wrong)
    return logits.softmax(1)


def fit(votes: Tensor, classes: int) -> Tensor:
    """Return each rule's estimated accuracy, float64 [rules], from `votes` as `posterior` takes them.

    Raises:
        ValueError: `votes` is not two-dimensional, names a class that there isn't, or K is below 2.
    """
    if votes.dim() != 2:
        raise ValueError(f"votes must be [texts, rules], not of shape {list(votes.shape)}")
    if classes < 2 or (votes.numel() and int(votes.max()) >= classes):
        raise ValueError(
            f"votes must name classes below classes={classes}, of which 2 is the least"
        )
    counts = (votes >= 0).sum(0)
    accuracies = torch.full((votes.shape[1],), PRIOR_ACCURACY, dtype=torch.float64)
    for _ in range(MAX_ROUNDS):
        q = posterior(votes, accuracies, classes)
        agreed = q.gather(1, votes.clamp_min(0)) * (votes >= 0)
        before = accuracies
        accuracies = (PRIOR_VOTES * PRIOR_ACCURACY + agreed.sum(0)) / (PRIOR_VOTES + counts)
        if float((accuracies - before).abs().max()) < TOLERANCE:
            break
    return accuracies


def majority(votes: Tensor, classes: int) -> Tensor:
    """Return the class with most votes as float64 [texts, classes]; a tie is shared evenly.

    A text that no rule votes on is a tie of all classes.
    """
    counts = (votes.unsqueeze(2) == torch.arange(classes)).sum(1)
    most = (counts == counts.amax(1, keepdim=True)).double()
    return most / most.sum(1, keepdim=True)
