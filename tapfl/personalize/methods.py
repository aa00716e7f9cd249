"""All personalisation methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tapfl.config import AdapterOptions, PersonalizeOptions, RunConfig
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.body_head import FedRep
from tapfl.personalize.fedala import FedAla
from tapfl.personalize.fedavg import FedAvg, FineTune, Local, Pooled
from tapfl.personalize.method import Method
from tapfl.personalize.perfedavg import PerFedAvg
from tapfl.personalize.proximal import Ditto, FedProx, PFedMe
from tapfl.plugin import is_plugin, load_plugin

BEGIN_LATER = ("apfl", "ditto")  # methods with `personalize.from-round`: their v starts as w


def method_of(options: PersonalizeOptions, adapters: AdapterOptions, round: int) -> Method[Any]:
    """Returns the method of a round (the first is 1).

    Before `personalize.from-round`, a device has no private model and trains by `FedAvg`. A plugin is called with
    (options, scale s of the adapters), once for each message.

    Raises:
        ConfigError: if it is a plugin that cannot be imported.
    """
    if is_plugin(options.method):
        plugin: Method[Any] = load_plugin("personalize.method", options.method)(options, adapters.scale)
        return plugin
    if options.method in BEGIN_LATER and round < options.from_round:
        return FedAvg()
    rate, scale = options.learning_rate, adapters.scale
    methods: dict[str, Callable[[], Method[Any]]] = {
        "apfl": lambda: Apfl(
            options.alpha,
            "fixed" if options.holds_out else options.alpha_update,
            options.alpha_learning_rate,
            options.alpha_per,
            rate,
        ),
        "ditto": lambda: Ditto(options.ditto_lambda, scale, rate),
        "local": lambda: Local(rate),
        "pooled": lambda: Pooled(rate),
        "fedavg": FedAvg,
        "fedavg+finetune": lambda: FineTune(rate),
        "fedprox": lambda: FedProx(options.prox_mu, scale),
        "pfedme": lambda: PFedMe(options.pfedme_lambda, scale, options.inner_steps, rate),
        "perfedavg": lambda: PerFedAvg(options.inner_learning_rate),
        "fedala": lambda: FedAla(options.ala_learning_rate, options.ala_layers, adapters.rule == "flex"),
        "fedper": FedAvg,  # `adapters.head` makes the head personal; body and head are trained together
        "fedrep": lambda: FedRep(options.head_epochs, rate),
    }
    return methods[options.method]()


def never_begins(config: RunConfig) -> bool:
    """Returns whether the run ends before `personalize.from-round`, so that its method never starts."""
    return config.personalize.method in BEGIN_LATER and config.personalize.from_round > config.train.rounds
