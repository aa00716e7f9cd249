"""What a search may drop: checkpoints and models of trials that go no further and are not the best.

A trial that is settled is never run again, and one that is not the best then never becomes it: others can only become
better. So a search that goes on misses nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import FrozenTrial

from experiments.search.results import best_trial
from experiments.search.runner import run_folder
from tapfl.errors import RunError

HEAVY = ("server", "devices")


def drop_losers(trials: Sequence[FrozenTrial], folder: Path) -> None:
    """Removes what is heavy in the run folders of all settled trials but the best; what they came to stays."""
    try:
        best = best_trial(trials)[0].number
    except RunError:
        best = -1
    for trial in trials:
        if trial.state.is_finished() and trial.number != best:
            for name in HEAVY:
                shutil.rmtree(run_folder(folder, trial.number) / name, ignore_errors=True)
