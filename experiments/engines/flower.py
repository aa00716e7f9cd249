"""Flower's own simulation on Ray, as `flwr run` starts it, but in this process and with its exceptions.

`flwr run` leaves a SuperLink running, and returns 0 even if the ServerApp raised an exception. `_run_simulation`, which
it calls, takes the same application folder and raises the ServerApp's exception. The function is private to Flower.
Only this module calls it, and a test fails if it changes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from experiments.engines.cluster import prepare_environment, ray_folder
from tapfl.compute import gpus_here
from tapfl.options import Scalar

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.supercore.run import Run


def run_flower(
    run_config: dict[str, Scalar],
    nodes: int,
    workers: int,
    server_app: str = "strategies.server_app:app",
    client_app: str = "clients.client_app:app",
    gpus: float = 0.0,
) -> None:
    """Runs a federation in Flower's simulation. Raises whatever the ServerApp raises.

    It starts a local Ray. However the run ends, this Ray is stopped and its folder removed.

    Args:
        workers: number of Ray actors, each with one CPU and one torch thread.
        server_app, client_app: the apps as ``module:name``.
        gpus: GPUs of this machine that each actor reserves; at most as many as there are.
    """
    prepare_environment()
    import ray
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.telemetry import EventType

    # the pyproject.toml of the application folder has only what Flower reads
    project = {"name": "tapfl", "version": "0.1.0", "description": "tapfl", "license": "Apache-2.0"}
    components = {"serverapp": server_app, "clientapp": client_app}
    app = {"publisher": "tapfl", "components": components, "config": run_config}
    with tempfile.TemporaryDirectory(prefix="tapfl-app-") as folder:
        toml = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}})
        (Path(folder) / "pyproject.toml").write_text(toml)
        run, context = _run_of(Path(folder))
        with ray_folder() as own:
            try:
                _run_simulation(
                    server_app_attr=server_app,
                    client_app_attr=client_app,
                    num_supernodes=nodes,
                    backend_name="ray",
                    backend_config={
                        "client_resources": {"num_cpus": 1, "num_gpus": gpus},
                        "init_args": {
                            "num_cpus": workers,
                            "num_gpus": gpus_here(),
                            "log_to_driver": False,
                            "_temp_dir": own,
                        },
                    },
                    app_dir=folder,
                    run=run,
                    server_app_context=context,
                    is_app=True,
                    exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                )
            finally:
                ray.shutdown()


def _run_of(app: Path) -> tuple[Run, Context]:
    """Returns the run and the ServerApp's context of an application folder, as Flower's own processes make them."""
    from flwr.common.config import get_fused_config_from_dir, get_metadata_from_config, get_project_config

    from experiments.engines.local import empty_run, server_context

    run = empty_run()
    run.primary_task_id = 1
    run.fab_id, run.fab_version = get_metadata_from_config(get_project_config(app))
    return run, server_context(run.run_id, get_fused_config_from_dir(app, {}))
