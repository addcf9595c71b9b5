"""Where files lie on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from errors import UserError


def cache_folder() -> Path:
    """``$NOISY_LABEL_CACHE``, else ``noisy-label-search`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if own := os.environ.get("NOISY_LABEL_CACHE"):
        return Path(own).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "noisy-label-search"
    except RuntimeError as error:
        raise UserError("there is no home folder to keep data sets in; set NOISY_LABEL_CACHE to a folder") from error


def data_folder() -> Path:
    """Of the data sets of the literature, as published: ``$NOISY_LABEL_DATA``, else ``data-sets`` in the cache folder."""
    own = os.environ.get("NOISY_LABEL_DATA")
    return Path(own).absolute() if own else cache_folder() / "data-sets"
