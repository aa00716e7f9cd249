"""The ServerApp: options in, one federation out. The same for simulation, deployment and tests."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from strategies.federation import run_federation
from strategies.loggers import require_loggers
from strategies.progress import shown
from strategies.records import require_same_options
from tapfl.config import RunConfig
from tapfl.data.federated import open_pool
from tapfl.errors import ConfigError
from tapfl.models.forward import input_transform
from tapfl.store import RunFolder, cache_folder, run_path

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.set_num_threads(1)  # the same bits whatever the machine has
    config = RunConfig.from_flat(context.run_config)
    _require_paths(config)
    require_loggers(config.log)
    path = run_path(config.out, context.run_id)
    opened = RunFolder.reopen(path) if config.resume else RunFolder.create(path)
    with opened as folder, shown():
        if config.resume:
            require_same_options(folder, config)
        pool = open_pool(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))
        run_federation(grid, config, pool, folder)


def _require_paths(config: RunConfig) -> None:
    """Flower runs an app in the folder in which its daemon was first started: a relative path would go astray there."""
    if config.resume and not config.out:
        raise ConfigError("resume = true: needs out, the folder of the run to go on with")
    for option, value in config.paths().items():
        if not Path(value).expanduser().is_absolute():
            raise ConfigError(f"{option} = {value!r}: must be an absolute path, or one that `tapfl run` resolves")
