"""Flower's own simulation on Ray, as `flwr run` starts it, but in this process and with its true outcome.

`flwr run` would leave a SuperLink behind and return 0 even if the ServerApp raised. The function underneath it,
`_run_simulation`, takes the same application folder and raises what the ServerApp raised. It is private to Flower, so
this module is the only one that calls it, and a test fails loudly when it changes.
"""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

import tomli_w

from experiments.engines.cluster import prepare_environment, ray_folder
from tapfl.options import Scalar


def run_flower(
    run_config: dict[str, Scalar],
    nodes: int,
    workers: int,
    server_app: str = "strategies.server_app:app",
    client_app: str = "clients.client_app:app",
) -> None:
    """Carries out a federation on Flower's simulation. What the ServerApp raises is raised here.

    Args:
        workers: Ray actors, one CPU and one torch thread each.
        server_app, client_app: where the apps are, as ``module:name``.

    The local Ray that this starts is stopped, and its folder removed, however the run ends.
    """
    prepare_environment()
    import ray
    from flwr.app import Context, RecordDict
    from flwr.common.config import get_fused_config_from_dir, get_metadata_from_config, get_project_config
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    with tempfile.TemporaryDirectory(prefix="tapfl-app-") as folder:
        app = Path(folder)
        (app / "pyproject.toml").write_text(_app_toml(run_config, server_app, client_app))
        config = get_project_config(app)
        run = Run.create_empty(run_id=secrets.randbits(63))
        run.primary_task_id = 1
        run.federation_id = NOOP_FEDERATION_ID
        run.fab_id, run.fab_version = get_metadata_from_config(config)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
        context = Context(
            run_id=run.run_id,
            node_id=0,
            node_config={},
            state=RecordDict(),
            run_config=get_fused_config_from_dir(app, {}),
        )
        with ray_folder() as own:
            try:
                _run_simulation(
                    server_app_attr=server_app,
                    client_app_attr=client_app,
                    num_supernodes=nodes,
                    backend_name="ray",
                    backend_config={
                        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                        "init_args": {"num_cpus": workers, "log_to_driver": False, "_temp_dir": own},
                    },
                    app_dir=folder,
                    run=run,
                    server_app_context=context,
                    is_app=True,
                    exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                )
            finally:
                ray.shutdown()


def _app_toml(run_config: dict[str, Scalar], server_app: str, client_app: str) -> str:
    """The application folder's pyproject.toml: what of the project's own Flower reads."""
    return tomli_w.dumps(
        {
            "project": {"name": "tapfl", "version": "0.1.0", "description": "tapfl", "license": "Apache-2.0"},
            "tool": {
                "flwr": {
                    "app": {
                        "publisher": "tapfl",
                        "components": {"serverapp": server_app, "clientapp": client_app},
                        "config": run_config,
                    }
                }
            },
        }
    )
