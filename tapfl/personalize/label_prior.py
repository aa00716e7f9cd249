"""The classes that a device has, known to its model: log p_i(y), added to the logits in training and in use.

Where devices differ in how often they have a class, and not in how a class looks, the best model of device i is
softmax(f(x) + log p_i(y)) with one f for all (logit adjustment: Menon et al. 2021, arXiv 2007.07314; FedLC, Zhang et
al. 2022, arXiv 2209.00189, trains federations with a related term). Trained so, the shared f need not learn from each
device which classes it has, which the next device's images would contradict. The prior never leaves the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tapfl.compute import home
from tapfl.training import Params

CONCENTRATIONS = torch.logspace(-2, 3, 51, dtype=torch.float64)


def log_prior(kind: str, labels: Tensor, classes: int) -> Tensor | None:
    """Returns log p(y), float32 (classes,) on the CPU: the posterior mean of the shares, given the device's labels.

        p(y) = (n_y + a) / (n + C a),    a = argmax Γ(Ca) / Γ(n + Ca) Π_y Γ(n_y + a) / Γ(a)

    The concentration a of the symmetric Dirichlet prior is the one under which the counts n_y are likeliest (empirical
    Bayes; Minka 2000, Estimating a Dirichlet distribution): large where classes are as even as chance has them, and p
    is then uniform; small where a device has few classes.

    Args:
        labels: of training images, int64 (n,).
    """
    if kind == "none":
        return None
    counts = home(labels).bincount(minlength=classes).double()
    a = CONCENTRATIONS[:, None]
    likelihood = (torch.lgamma(counts + a) - torch.lgamma(a)).sum(1, keepdim=True)
    likelihood += torch.lgamma(classes * a) - torch.lgamma(counts.sum() + classes * a)
    best = a[likelihood.argmax()]
    return ((counts + best) / (counts.sum() + classes * best)).log().float()


def informed(logits: Tensor, prior: Tensor | None) -> Tensor:
    """Returns the logits (n, classes) of a model that knows this prior: (classes,), or one for each image."""
    return logits if prior is None else logits + prior


def with_prior(params: Params, prior: Tensor | None) -> Params:
    """Returns adapters with the prior in the biases of the heads, for who has the model alone.

    Heads of one model are averaged, so each gets the whole of it. Linears that have adapters give no bias.
    """
    return {name: informed(theta, prior) if name.endswith(".bias") else theta for name, theta in params.items()}
