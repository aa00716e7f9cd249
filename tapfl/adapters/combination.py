"""Combines the values that devices sent into the next global value, coordinate by coordinate.

The steps are, in this order: each device's update is clipped (`clip_update`); the values that the holders of a
coordinate sent are combined (`tapfl.adapters.layout.scatter_mean`, `noisy_mean`, `scatter_trimmed`); the server's
optimiser takes a step (`ServerOptimizer`). The holders of a coordinate are the devices whose model has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tapfl.adapters.layout import Layout, Part, Update, overlap_sums, positions, quotient, scatter_mean, to_global_scale
from tapfl.config import AdapterOptions
from tapfl.training import Params

Combine = Callable[[Tensor, Sequence[Part]], Tensor]  # (previous θ, parts) -> θ, as `scatter_mean`
Step = Callable[[str, Tensor, Tensor, Tensor], Tensor]  # (name, previous θ, combined θ, bool mask of held) -> θ
Cut = Callable[[int], int]  # number of holders -> number of values cut off at each end

BLOCK = 2**21  # largest number of float64 values in memory at once: 16 MiB
BETA2 = 0.99  # β₂ of FedAdam, as in all experiments of the paper
DEFAULT_LEARNING_RATE = {"momentum": 1.0, "adam": 0.01}


@dataclass(frozen=True)
class Combination:
    """Computes the next value of a tensor: combines its parts over the holders, then takes a step of the optimiser.

    Without `step`, the combined value is the next one.
    """

    combine: Combine = scatter_mean
    step: Step | None = None

    def __call__(self, name: str, previous: Tensor, parts: Sequence[Part]) -> Tensor:
        combined = self.combine(previous, parts)
        if self.step is None:
            return combined
        held = torch.zeros(previous.shape, dtype=torch.bool)
        for _, placement, _ in parts:
            held.view(-1)[positions(placement, previous.shape)] = True
        return self.step(name, previous, combined, held)

    def each(self, previous: Params, updates: Sequence[Update]) -> Params:
        """Returns the next value of every tensor, each combined on its own; without parts it is the previous value."""
        result: Params = {}
        for name, theta in previous.items():
            parts = [(u.params[name], u.layout[name], u.weight) for u in updates if name in u.layout]
            result[name] = self(name, theta, parts) if parts else theta
        return result


PLAIN = Combination()


def clip_update(params: Mapping[str, Tensor], received: Mapping[str, Tensor], layout: Layout, bound: float) -> Params:
    """Returns received + (params - received) · min(1, bound / ‖params - received‖₂), in the shapes of the device.

    This limits the influence of one device (Sun et al. 2019, arXiv 1911.07963), and the sensitivity of the private sums
    of `noisy_mean`, for which the device clips its update as well. The norm is taken over all tensors of the layout
    together, on the global scale, which is the scale of the server's sums: the rows of q are larger there
    (`Placement.row_scale`). An update within the bound is returned unchanged; a clipped one is float64.
    """
    change = {name: params[name].double() - received[name].double() for name in layout}
    squares = sum(to_global_scale(change[name], place).square().sum() for name, place in layout.items())
    norm = float(torch.as_tensor(squares).sqrt())
    if norm <= bound:
        return {name: params[name] for name in layout}
    return {name: received[name].double() + change[name] * (bound / norm) for name in layout}


def noisy_mean(std: float, generator: np.random.Generator) -> Combine:
    """Returns a function like `scatter_mean` that adds N(0, std²) to each sum before it is divided.

    This gives client-level differential privacy (Gaussian mechanism; McMahan et al. 2018, arXiv 1710.06963). Every
    device has weight 1 and its whole update is clipped to an L2 norm of C. Adding or removing one device therefore
    changes the sum by at most C, and std = zC for a noise multiplier z. The sum is divided by the number of holders of
    the coordinate. The set of holders is treated as public: kept units, ranks, and with `head = class-rows` classes. A
    coordinate without a holder keeps its value and needs no noise. The step of the server's optimiser is
    post-processing.

    Args:
        generator: of numpy, because torch's on the CPU has only 2³² streams, which can all be tried.
    """

    def combine(previous: Tensor, parts: Sequence[Part]) -> Tensor:
        total, holders = overlap_sums(previous.shape, parts)
        noise = torch.from_numpy(generator.standard_normal(previous.shape))
        return quotient(total + std * noise, holders, previous)

    return combine


def median_cut(holders: int) -> int:
    return (holders - 1) // 2


def trimmed_cut(trim: float) -> Cut:
    """Returns the `Cut` of a trimmed mean; `trim` is the fraction cut off at each end, in [0, 0.5)."""
    return lambda holders: int(trim * holders + 1e-9)  # in floating point, 0.29 · 100 is 28.999…


def scatter_trimmed(cut: Cut) -> Combine:
    """Returns a function like `scatter_mean` that takes the trimmed mean or median over each coordinate's holders.

    Of the m values that the holders of a coordinate sent, the k = cut(m) smallest and the k largest are removed, and
    the rest is averaged (Yin et al. 2018, arXiv 1803.01498). With k = ⌊(m - 1) / 2⌋ one or two values are left, which
    gives the median. A coordinate with one holder takes the holder's value; one without a holder keeps its previous
    value. Values are not weighted by sample counts, because a device reports its own count and could outvote the
    others. At most `BLOCK` values are in memory at once.
    """

    def combine(previous: Tensor, parts: Sequence[Part]) -> Tensor:
        width = previous[:1].numel() * len(parts)
        blocks = [
            _trimmed_block(previous[start:stop], [rows_of(part, start, stop) for part in parts], cut)
            for start, stop in row_blocks(len(previous), width)
        ]
        return torch.cat(blocks)

    return combine


def row_blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of consecutive blocks of rows of `width` values, with at most `BLOCK` values if possible."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def rows_of(part: Part, start: int, stop: int) -> Part:
    """Returns the values of a part in global rows start..stop-1, on the global scale; row `start` becomes row 0."""
    values, placement, weight = part
    first, last = np.searchsorted(placement.index[0].numpy(), (start, stop))
    scale = None if placement.row_scale is None else placement.row_scale[first:last]
    index = (placement.index[0][first:last] - start, *placement.index[1:])
    block = replace(placement, index=index, row_scale=scale)
    return to_global_scale(values[first:last], block), replace(block, row_scale=None), weight


def _trimmed_block(previous: Tensor, parts: Sequence[Part], cut: Cut) -> Tensor:
    stacked = torch.full((len(parts), previous.numel()), torch.nan, dtype=torch.float64)
    for row, (values, placement, _) in zip(stacked, parts, strict=True):
        row[positions(placement, previous.shape)] = values.reshape(-1)
    ordered = np.ascontiguousarray(stacked.numpy().T)
    ordered.sort(axis=1)  # NaN marks values that a device does not have; it sorts to the end
    holders = len(parts) - np.isnan(ordered).sum(1)
    result = previous.double().reshape(-1).numpy().copy()
    for m in np.unique(holders[holders > 0]):
        where, k = np.flatnonzero(holders == m), cut(int(m))
        result[where] = ordered[where[:, None], np.arange(k, m - k)].mean(1)
    return torch.from_numpy(result).view(previous.shape).to(previous.dtype)


class ServerOptimizer:
    """One round of the server's optimiser. The pseudo-gradient is the change of the round, g = previous - combined.

        FedAvgM (Hsu, Qi, Brown 2019, arXiv 1909.06335):       m ← βm + g,  θ ← θ - ηm
        FedAdam (Reddi et al. 2021, arXiv 2003.00295, Alg. 2): m ← β₁m + (1 - β₁)g,  v ← β₂v + (1 - β₂)g²,
                                                              θ ← θ - ηm / (√v + τ);  v starts at τ², no bias correction

    A coordinate without a holder in a round keeps its value and its moments; otherwise a neuron that only an absent
    device has would drift with old gradients.

    Moments are float32. FedAvgM has one and FedAdam two, each of the size of the tensors that they act on. These are
    the adapters, and for `flex` the products B A, in the size of the adapted linears' dense weights, because the
    factors of an SVD rotate from round to round and their products do not. For DeiT-S with rank 8, moments of adapters
    take 2.4 (FedAvgM) or 4.7 MB (FedAdam), and those of products 85 or 170 MB, each without the head's.

    Attributes:
        moments: the moments of the previous round; after `step`, those of this round.
    """

    def __init__(self, options: AdapterOptions, moments: Params) -> None:
        self.options, self.moments = options, dict(moments)
        self.rate = options.server_learning_rate or DEFAULT_LEARNING_RATE[options.server]

    def step(self, name: str, previous: Tensor, combined: Tensor, held: Tensor) -> Tensor:
        """Returns the next θ of a tensor, in the dtype of `previous`. Only entries where `held` is true change."""
        β, theta = self.options.server_momentum, previous.double()
        g = theta - combined.double()
        if self.options.server == "momentum":
            direction = self._moment("momentum", name, held, lambda m: β * m + g)
        else:
            β2, τ = BETA2, self.options.server_epsilon
            m = self._moment("momentum", name, held, lambda m: β * m + (1 - β) * g)
            v = self._moment("variance", name, held, lambda v: β2 * v + (1 - β2) * g.square(), start=τ**2)
            direction = m / (v.sqrt() + τ)
        return torch.where(held, theta - self.rate * direction, theta).to(previous.dtype)

    def _moment(
        self, kind: str, name: str, held: Tensor, follow: Callable[[Tensor], Tensor], start: float = 0.0
    ) -> Tensor:
        """Returns the next value of a moment as float64, and stores it as float32."""
        key = f"{kind}.{name}"
        before = self.moments[key].double() if key in self.moments else torch.full(held.shape, start).double()
        after = torch.where(held, follow(before), before)
        self.moments[key] = after.float()
        return after
