"""One federation on one engine: ``python -m experiments.bench.engine_driver ENGINE none|real CONFIG.toml OUT WORKERS``.

With ``ray warm`` it is the second one on its actors; the first has one round.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.engines.flower import run_flower
from experiments.engines.inprocess import run_inprocess
from experiments.engines.ray import Workers, load_app
from tapfl.config import RunConfig, Scalar, read_toml

APPS = {
    "none": ("experiments.bench.noop_apps:server", "experiments.bench.noop_apps:client"),
    "real": ("strategies.server_app:app", "clients.client_app:app"),
}


def drive(engine: str, work: str, config: dict[str, Scalar], out: Path, workers: int) -> None:
    """Carries the federation out in the folder `out`."""
    server_app, client_app = APPS[work]
    nodes = RunConfig.from_flat(config).devices.count
    if engine == "flower":
        run_flower({**config, "out": str(out)}, nodes, workers, server_app, client_app)
    elif engine == "inprocess":
        run_inprocess(load_app(server_app), load_app(client_app), {**config, "out": str(out)}, nodes)
    else:
        with Workers(count=workers) as pool:
            if engine == "ray warm":
                first = {**config, "out": f"{out} before", "train.rounds": 1}
                pool.run(load_app(server_app), first, nodes, client_app)
                out.with_suffix(".warm").touch()
            pool.run(load_app(server_app), {**config, "out": str(out)}, nodes, client_app)


if __name__ == "__main__":
    engine, work, file, out, workers = sys.argv[1:]
    drive(engine, work, RunConfig.from_flat(read_toml(Path(file))).flat(), Path(out), int(workers))
