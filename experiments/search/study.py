"""The study of a search, in any storage of Optuna."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from experiments.search.settings import Search
from tapfl.errors import ConfigError

JOURNAL = "study.journal"
IDENTITY = "tapfl:search"
PATIENCE = 4  # seconds that a storage may stay locked by somebody else
SILENT_SQL = {"connect_args": {"timeout": PATIENCE}}


def open_study(search: Search, name: str, out: Path, url: str | None, resume: bool) -> optuna.Study:
    """Returns the study, new or as it was left.

    Args:
        url: of the storage; None: a journal in `out`.

    Raises:
        ConfigError: if the storage cannot be had, if there is a study already without `resume` or none with it, or if
            it is that of another search.
    """
    if url is None and resume and not (out / JOURNAL).is_file():
        raise ConfigError(f"--resume: there is no study in {out}")
    shown = _without_password(url) if url else str(out / JOURNAL)
    try:
        storage = _storage(url, out)
        known = name in optuna.get_all_study_names(storage)
        if known and not resume:
            raise ConfigError(f"storage {shown}: has a study {name!r} already; go on with it by --resume")
        if resume and not known:
            raise ConfigError(f"--resume: storage {shown} has no study {name!r}")
        study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
        if IDENTITY not in study.user_attrs and not study.get_trials(deepcopy=False):
            study.set_user_attr(IDENTITY, json.dumps(search.identity()))
    except ConfigError:
        raise
    except Exception as error:  # whatever a storage's driver has to say
        said = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        first = said[0].replace(url, shown) if url else said[0]
        raise ConfigError(f"storage {shown}: cannot be used ({first})") from None
    _require_same(study, search)
    return study


def _without_password(url: str) -> str:
    """Returns the URL as it may be shown: errors end in logs."""
    return re.sub(r"(?<=password=)[^&\s]*", "***", re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url))


def _storage(url: str | None, out: Path) -> BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if url is None:
            file = str(out / JOURNAL)
            # who held its lock and was killed keeps nobody out: only one driver is in this folder
            return JournalStorage(JournalFileBackend(file, JournalFileOpenLock(file, grace_period=PATIENCE)))
        if url.startswith("sqlite"):
            return RDBStorage(url, engine_kwargs=SILENT_SQL)
        return RDBStorage(url)


def _require_same(study: optuna.Study, search: Search) -> None:
    before, now = json.loads(study.user_attrs.get(IDENTITY, "{}")), search.identity()
    changed = [
        f"{name}: {before.get(name, '(not there then)')} then, {now.get(name, '(not there now)')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(f"study {study.study_name!r} is of another search: {'; '.join(changed)}")
