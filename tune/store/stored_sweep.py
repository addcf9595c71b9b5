"""A sweep as a store keeps it: its spec, its provenance, and where its files are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from training.locations import Location
from tune.spec import BEFORE, SweepSpec, make_spec, read_field, set_before
from tune.store.base import NAME, RECORD, SweepFiles, SweepStore
from tune.store.folder import FolderStore
from tune.store.locate import as_store


@dataclass(frozen=True)
class Sweep:
    """A stored sweep: the folder of its checkpoints, its spec, what it was made with, and its other files."""

    folder: Location
    spec: SweepSpec
    provenance: Mapping[str, Any]
    files: SweepFiles = field(compare=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def storage(self) -> Location:
        return self.folder.parent

    def check_storage(self) -> None:
        """ValueError where the user names another storage than the one that has the sweep's checkpoints."""
        self.files.store.check_storage(self.name, self.storage)

    def write(self) -> None:
        """Writes ``sweep.yaml``, whole or not at all."""
        text = yaml.safe_dump({"spec": self.spec.to_dict(), "provenance": dict(self.provenance)}, sort_keys=False)
        self.files.write(RECORD, text)

    @classmethod
    def find(cls, store: Path | SweepStore, name: str) -> Sweep:
        """Opens the sweep of that name. ValueError where there is none, or its record is damaged."""
        return cls._open(as_store(store), check_name(name))

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Opens the sweep in a folder."""
        return cls._open(FolderStore(folder.parent), folder.name)

    @classmethod
    def _open(cls, store: SweepStore, name: str) -> Sweep:
        files = store.files(name)
        try:
            text = files.read(RECORD)
            if text is None:
                raise UserError(f"no sweep {name!r} in {store.display_name}; there are: {', '.join(store.names()) or 'none'}")
            content = yaml.safe_load(text)
            fields = ((name, value) for name, value in content["spec"].items() if value != "")
            values = {name: read_field(name, value, stored=True) for name, value in fields}
            if "split" not in content["spec"]:
                values["set"] = set_before(values)
            spec = make_spec(BEFORE | values, stored=True)
            provenance = content["provenance"]
            if not NAME.fullmatch(provenance["id"]):  # it stands in MLflow's filters, between quotes
                raise UserError(f"{files.display_name(RECORD)} is damaged: {provenance['id']!r} is no id")
            return cls(store.folder(name, provenance), spec, provenance, files)
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(f"{files.display_name(RECORD)} is damaged: {json.dumps(' '.join(str(error).split()))}") from error


def check_name(name: str) -> str:
    """Returns the name of a sweep. ValueError where it could leave the storage folder, needs quotes in a shell, or names a file
    that MLflow has there."""
    if not NAME.fullmatch(name):
        raise UserError(f"sweep name {name!r} is not allowed; use letters, digits, '.', '_' and '-', no sign first")
    if name == "mlartifacts" or name.startswith("mlflow.db"):
        raise UserError(f"sweep name {name!r} is not allowed; MLflow keeps its own files under that name")
    return name
