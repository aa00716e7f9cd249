"""The label prior of a device, log p_i(y), which its model adds to the logits in training and in inference.

If devices differ in how frequent each class is, but not in how a class looks, the best model of device i is
softmax(f(x) + log p_i(y)) with one f for all devices (logit adjustment: Menon et al. 2021, arXiv 2007.07314; FedLC,
Zhang et al. 2022, arXiv 2209.00189, trains federations with a related term). Trained in this way, the shared f does not
have to learn which classes a device has, which differ from device to device. The prior never leaves the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tapfl.compute import home
from tapfl.training import Params

CONCENTRATIONS = torch.logspace(-2, 3, 51, dtype=torch.float64)


def log_prior(kind: str, labels: Tensor, classes: int) -> Tensor | None:
    """Returns log p(y), float32 (classes,) on the CPU: the posterior mean of the class frequencies, given the labels.

        p(y) = (n_y + a) / (n + C a),    a = argmax Γ(Ca) / Γ(n + Ca) Π_y Γ(n_y + a) / Γ(a)

    The concentration a of the symmetric Dirichlet prior maximises the likelihood of the counts n_y (empirical Bayes;
    Minka 2000, Estimating a Dirichlet distribution). If the counts are as even as random ones, a is large and p almost
    uniform. If a device has few classes, a is small.

    Args:
        kind: value of `train.label-prior`; for `none` the result is None.
        labels: of the training images, int64 (n,).
        classes: number of classes C.
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
    """Returns the logits (n, classes) with the prior added: (classes,), or (n, classes) with one for each image."""
    return logits if prior is None else logits + prior


def with_prior(params: Params, prior: Tensor | None) -> Params:
    """Returns adapters with the prior added to the biases of the heads, so that the model includes it.

    If a model has two heads, they are averaged, so each gets the whole prior. Only heads have biases among adapters.
    """
    return {name: informed(theta, prior) if name.endswith(".bias") else theta for name, theta in params.items()}
