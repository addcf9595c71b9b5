"""A sweep as it is kept: what was asked for, what that was made with, and where its files are."""

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
from tune.store.folder import FolderFiles, FolderStore
from tune.store.locate import as_store


@dataclass(frozen=True)
class Sweep:
    """A sweep as it is kept: where its checkpoints are, what was asked for, what that was made with, and its files."""

    folder: Location
    spec: SweepSpec
    provenance: Mapping[str, Any]
    stored_files: SweepFiles | None = field(default=None, compare=False)  # None: in the folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def storage(self) -> Location:
        return self.folder.parent

    @property
    def files(self) -> SweepFiles:
        if self.stored_files:
            return self.stored_files
        assert isinstance(self.folder, Path), "an object store holds checkpoints only"
        return FolderFiles(self.folder)

    def write(self) -> None:
        """Writes ``sweep.yaml``, whole or not at all."""
        text = yaml.safe_dump({"spec": self.spec.to_dict(), "provenance": dict(self.provenance)}, sort_keys=False)
        self.files.write(RECORD, text)

    @classmethod
    def find(cls, store: Path | SweepStore, name: str) -> Sweep:
        """The sweep of that name. ValueError where there is none, or its record is damaged."""
        return cls._open(as_store(store), check_name(name))

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        return cls._open(FolderStore(folder.parent), folder.name)

    @classmethod
    def _open(cls, store: SweepStore, name: str) -> Sweep:
        files = store.files(name)
        try:
            text = files.read(RECORD)
            if text is None:
                raise UserError(f"no sweep {name!r} in {store.place}; there are: {', '.join(store.names()) or 'none'}")
            content = yaml.safe_load(text)
            fields = ((name, value) for name, value in content["spec"].items() if value != "")
            read = {name: read_field(name, value, stored=True) for name, value in fields}
            if "split" not in content["spec"]:
                read["set"] = set_before(read)
            spec = make_spec(BEFORE | read, stored=True)
            provenance = content["provenance"]
            if not NAME.fullmatch(provenance["id"]):  # it stands in MLflow's filters, between quotes
                raise UserError(f"{files.place(RECORD)} is damaged: {provenance['id']!r} is no id")
            return cls(store.folder(name, provenance), spec, provenance, files)
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(f"{files.place(RECORD)} is damaged: {json.dumps(' '.join(str(error).split()))}") from error


def check_place(sweep: Sweep, store: Path | SweepStore) -> None:
    """ValueError where ``--storage`` names another place than that of the sweep's checkpoints."""
    asked = as_store(store).requested
    if asked not in (None, sweep.storage):
        raise UserError(f"--storage: sweep {sweep.name!r} keeps its checkpoints in {sweep.storage}, not in {asked}")


def check_name(name: str) -> str:
    """ValueError where ``name`` could leave the storage folder, be a nuisance in a shell, or is MLflow's there."""
    if not NAME.fullmatch(name):
        raise UserError(f"sweep name {name!r} is not allowed; use letters, digits, '.', '_' and '-', no sign first")
    if name == "mlartifacts" or name.startswith("mlflow.db"):
        raise UserError(f"sweep name {name!r} is not allowed; MLflow keeps its own files under that name")
    return name
