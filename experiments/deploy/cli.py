"""The command `tapfl deploy-demo`. It is hidden, because it only checks this project; see docs/deploy.md for users."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tapfl.errors import ConfigError

app = typer.Typer()


@app.command("deploy-demo", hidden=True)
def deploy_demo(
    out: Annotated[Path | None, typer.Option(help="keep all folders and logs here; must not exist")] = None,
) -> None:
    """Run one federation on a SuperLink and two SuperNodes over TLS with registered keys, and check every step."""
    from experiments.deploy.demo import demonstrate

    if out is not None:
        if out.exists():
            raise ConfigError(f"--out {out}: exists; accepted: a new folder")
        out.mkdir(parents=True, mode=0o700)
    folder = (out or Path(tempfile.mkdtemp(prefix="tapfl-deploy-"))).resolve()
    try:
        demonstrate(folder)
    except BaseException:
        typer.echo(f"tapfl: all folders and logs are in {folder}", err=True)
        raise
    if out is None:
        shutil.rmtree(folder)
