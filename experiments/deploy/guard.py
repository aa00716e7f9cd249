"""Proof that a node needs nothing of the server's folders: its Python refuses to open what lies there.

On one machine, under one user, a path of the server's is open to everyone. A ``sitecustomize`` that Python imports
before anything else adds an audit hook (PEP 578), which cannot be removed again, to every process of the node.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from experiments.deploy.network import Node

REFUSED = "TAPFL_REFUSED_FOLDER"
SITECUSTOMIZE = f'''"""Refuses what lies under {REFUSED}."""
import os, sys

refused = os.environ["{REFUSED}"] + os.sep

def refuse(event, arguments):
    if event == "open" or event.startswith("os."):
        for path in arguments:
            if isinstance(path, (str, bytes)) and (os.path.abspath(os.fsdecode(path)) + os.sep).startswith(refused):
                raise PermissionError(f"{{event}} of {{os.fsdecode(path)}}: is not this node's")

sys.addaudithook(refuse)
'''


def guarded(folder: Path, refused: Path) -> dict[str, str]:
    """Returns the environment under which Python refuses what lies in `refused`; `folder` keeps what that takes."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": str(folder), REFUSED: str(refused)}


def is_refused(node: Node, file: Path) -> bool:
    """Says whether a Python in the node's environment is refused `file`, which is there to be read without it."""
    file.read_bytes()
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'rb')", str(file)]
    done = subprocess.run(command, env=node.environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 1 and "PermissionError" in done.stderr and "is not this node's" in done.stderr
