"""`train.label-prior`: the loss by hand, even classes, and Bayes' rule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_inprocess_run import tapfl

from tapfl.personalize.label_prior import CONCENTRATIONS, log_prior


def labels_of(*counts: int) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def known(labels: torch.Tensor, classes: int) -> torch.Tensor:
    prior = log_prior("counts", labels, classes)
    assert prior is not None
    return prior


def test_by_hand() -> None:
    """For six images of the first of two classes the most likely concentration is the smallest, 0.01."""
    prior = known(labels_of(6, 0), 2)
    torch.testing.assert_close(prior, torch.tensor([6.01 / 6.02, 0.01 / 6.02]).log())
    logits = torch.tensor([[0.0, 3.0]])
    loss = torch.nn.functional.cross_entropy(logits + prior, torch.tensor([1]))
    assert float(loss) == pytest.approx(math.log(1 + 601 * math.exp(-3)), rel=1e-6)


def test_the_concentration_is_the_likeliest() -> None:
    """Likelihood of label sequences with these counts, by Pólya's urn: each draw depends on those before it."""

    def urn(a: float) -> float:
        seen = torch.zeros(4, dtype=torch.float64)
        found = 0.0
        for label in labels_of(9, 5, 0, 1).tolist():
            found += math.log((float(seen[label]) + a) / (float(seen.sum()) + 4 * a))
            seen[label] += 1
        return found

    best = max(CONCENTRATIONS.tolist(), key=urn)
    assert 0.1 < best < 2
    want = torch.tensor([(n + best) / (15 + 4 * best) for n in (9, 5, 0, 1)])
    torch.testing.assert_close(known(labels_of(9, 5, 0, 1), 4).exp(), want)


@given(counts=st.lists(st.integers(0, 40), min_size=2, max_size=12))
def test_the_prior_is_a_distribution_in_the_order_of_the_counts(counts: list[int]) -> None:
    share = known(labels_of(*counts), len(counts)).exp()
    assert float(share.sum()) == pytest.approx(1, abs=1e-5) and bool((share > 0).all())
    assert bool((share.diff() * torch.tensor(counts).diff() >= 0).all())


def test_even_classes_change_nothing() -> None:
    """If all classes are equal, the prior is uniform and adds the same to all logits."""
    torch.testing.assert_close(known(labels_of(3, 3, 4, 2, 3), 5), torch.full((5,), -math.log(5)), atol=2e-3, rtol=0)
    assert log_prior("none", labels_of(1, 9), 2) is None


def test_with_the_prior_one_shared_function_is_right_on_every_device() -> None:
    """Two devices have the same classes in different shares: log p(x|y) + the device's log prior is Bayes' rule."""
    likelihood = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4]])  # p(x|y) of two classes and three images
    for counts in ((900, 100), (200, 800)):
        share = torch.tensor(counts, dtype=torch.float32) / 1000
        joint = likelihood.T * share
        got = torch.softmax(likelihood.log().T + known(labels_of(*counts), 2), 1)
        torch.testing.assert_close(got, joint / joint.sum(1, keepdim=True), atol=2e-3, rtol=0)


@pytest.mark.slow
def test_a_shared_model_learns_from_disjoint_classes(cache: Path, tmp_path: Path) -> None:
    """No class is on two of the five devices, and the head is shared. The pruned models start at 0.54."""
    apart = ["devices.count=5", "data.partition=class-blocks", "data.classes-per-device=2", "data.public-share=0.4"]
    options = [*apart, "personalize.method=fedavg", "train.rounds=3", "train.epochs=2", "model.epochs=15"]

    def shared(prior: str) -> float:
        done = tapfl(
            "--out", str(tmp_path / prior), "--json", cache=cache, options=[*options, f"train.label-prior={prior}"]
        )
        return float(json.loads(done.stdout.splitlines()[-1])["global_accuracy"])

    assert shared("counts") > shared("none") + 0.02
