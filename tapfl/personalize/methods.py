"""The personalisation methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tapfl.config import PersonalizeOptions
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.ditto import Ditto
from tapfl.personalize.fedavg import FedAvg
from tapfl.personalize.finetune import FineTune
from tapfl.personalize.local import Local
from tapfl.personalize.method import Method
from tapfl.plugin import is_plugin, load_plugin


def method_of(options: PersonalizeOptions, scale: float) -> Method[Any]:
    """Returns the method that the options name, for adapters of scale s; of a user's own, `name(options, scale)`.

    Raises:
        ConfigError: if it is a user's own and not to be had.
    """
    if is_plugin(options.method):
        found: Method[Any] = load_plugin("personalize.method", options.method)(options, scale)
        return found
    methods: dict[str, Callable[[], Method[Any]]] = {
        "apfl": lambda: Apfl(
            options.alpha, options.alpha_update, options.alpha_learning_rate, options.alpha_per, options.passes
        ),
        "ditto": lambda: Ditto(options.ditto_lambda, scale),
        "local": Local,
        "fedavg": FedAvg,
        "fedavg+finetune": FineTune,
    }
    return methods[options.method]()
