"""`tapfl deploy-demo`: hidden, because it is a proof rather than a tool; docs/deploy.md is about doing it."""

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
    """One federation on a SuperLink and two SuperNodes over TLS, by registered keys, on this machine; all checked."""
    from experiments.deploy.demo import demonstrate

    if out is not None:
        if out.exists():
            raise ConfigError(f"--out {out}: exists already; give a folder that does not")
        out.mkdir(parents=True, mode=0o700)
    folder = (out or Path(tempfile.mkdtemp(prefix="tapfl-deploy-"))).resolve()
    try:
        demonstrate(folder)
    except BaseException:
        typer.echo(f"tapfl: logs and all else lie in {folder}", err=True)
        raise
    if out is None:
        shutil.rmtree(folder)
