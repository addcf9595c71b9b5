"""What a sweep is: one declaration for the command line, the YAML file and the record in the storage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.names import OWN_IMAGES, SPLITS, VIEW_DESCRIPTIONS
from data.noise_spec import parse_noise
from data.sources import Source, check_name
from data.spec import DataSpec
from errors import UserError
from hparams import Interval, Value
from methods import METHODS, find_method
from methods import check_name as check_method
from models import MODELS

MAX_LOST = 3  # processes that a trial may lose without a new epoch in between before it counts as failed
MAX_FAILURES = 5  # failed trials in a row that stop a sweep
KEPT_CHECKPOINTS = 5  # finished trials whose checkpoint is kept


def option(default: Any, meaning: str, legal: str = "", flag: bool = True, execution: bool = False) -> Any:
    """A field: its meaning, the legal interval of a number, whether it is a flag or YAML only, and whether it only says how
    the sweep is run, so that ``resume`` may change it."""
    metadata = {"meaning": meaning, "legal": legal, "flag": flag, "execution": execution}
    if isinstance(default, (tuple, dict)):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SweepSpec:
    """What to search, on what budget, on what resources."""

    method: tuple[str, ...] = option(("alr",), "methods, separated by commas, or all")
    data: str = option("digits", "data set: digits, manifest:FILE.csv, folder:PATH, cifar10, cifar10n:worst, ... (see README)")
    image_size: int = option(0, "side in pixels of a user's images (default: by their median, at most 224)", "[0, 4096]")
    resize: str = option("", "of a user's images: crop (the middle square, the default), squash or pad")
    background: str = option("", "colour that transparency and padding of a user's images show (default: white)")
    skip_damaged: bool = option(False, "leave out images that cannot be read; the sweep's folder lists them")
    follow_links: bool = option(False, "a user's images may be links that lead out of their folder")
    views: str = option("", "how images are changed: shift or flip-crop, of large ones crop or imagenet (default: by data set)")
    noise: str = option(
        "",
        "none, symmetric:RATE[:include-true], asymmetric:RATE[:MAP or FROM>TO,...], pair:RATE or instance:RATE"
        " (default: by data set)",
    )
    labels_are_clean: bool = option(False, "your labels are right: noise may be put on them, and some images are tested on")
    model: str = option("", "network (default: by data set)")
    precision: str = option("auto", "float32, bfloat16 (autocast) or auto: bfloat16 on a GPU, float32 on a CPU")
    compile: str = option("off", "on: networks are compiled; pays where a worker runs many long trials of one network")
    trials: int = option(32, "trials that end complete or stopped early, also where hours or GPU-hours are given", "[1, inf)")
    hours: float = option(0.0, "hours of training after which no trial begins (default: no limit)", "[0, inf)", execution=True)
    gpu_hours: float = option(
        0.0, "the same for hours times GPUs, summed over trials (default: no limit)", "[0, inf)", execution=True
    )
    epochs: int = option(30, "full budget of a trial", "[1, 1000000]")
    trusted: int = option(0, "samples with clean labels that methods may learn from, taken from the training set", "[0, inf)")
    seed: int = option(0, "of the search, and with the trial's number of initialisation and order", "[0, inf)")
    set: Mapping[str, str] = option({}, "a hyperparameter's fixed value, NAME=VALUE (repeatable)")
    range: Mapping[str, str] = option(
        {}, "a hyperparameter's search range, NAME=LOW:HIGH[:log | :STEP] or NAME=A,B,... (repeatable)"
    )
    cpus_per_trial: float = option(1.0, "CPU cores of a trial", "[0.0001, inf)", execution=True)
    gpus_per_trial: float = option(0.0, "GPUs of a trial: 1, or a fraction", "[0, 1]", execution=True)
    concurrent: int = option(0, "trials at a time (default: what the machines hold)", "[0, inf)", execution=True)
    tracking: str = option(
        "", "MLflow tracking URI (default: $MLFLOW_TRACKING_URI, else mlflow.db in the storage)", execution=True
    )
    address: str = option("", "address of a running Ray cluster (default: this machine)", execution=True)
    sampler: str = option("tpe", "tpe or random", flag=False)
    scheduler: str = option("asha", "asha or none", flag=False)
    reduction_factor: int = option(3, "ASHA keeps one in this many at a rung", "[2, inf)", flag=False)
    grace_epochs: int = option(0, "first rung of ASHA in epochs (0: a tenth of the budget)", "[0, inf)", flag=False)
    checkpoint_seconds: float = option(10.0, "a trial is saved when this much time has passed", "[0, inf)", flag=False)
    report_seconds: float = option(
        1.0, "a trial reports, and hears of a stop, at rungs and when this much time has passed", "[0, 5]", flag=False
    )
    hang_seconds: float = option(
        1800.0,
        "an epoch that takes longer ends its process, if it also takes ten times the longest before it; the first epoch of a"
        " trial may take ten times as long (0: never)",
        "[0, inf)",
        flag=False,
    )
    validation_fraction: float = option(0.3, "share held out, with noisy labels, to select on", "(0, 1)", flag=False)
    noise_seed: int = option(0, "of the synthetic noise", "[0, inf)", flag=False)
    split_seed: int = option(0, "of the split into training, validation and test set", "[0, inf)", flag=False)
    split: str = option("stratified", "stratified (about the same share of each class in every part) or shuffled", flag=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in ``sweep.yaml``."""
        values = ((one.name, getattr(self, one.name)) for one in dataclasses.fields(self))
        return {name: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v for name, v in values}

    def rungs(self) -> list[int]:
        """Epochs at which ASHA decides, ascending; empty without a scheduler."""
        if self.scheduler == "none":
            return []
        rung, rungs = self.grace_epochs or max(1, math.ceil(self.epochs / 10)), []
        while rung < self.epochs:
            rungs.append(rung)
            rung *= self.reduction_factor
        return rungs

    def source_defaults(self) -> dict[str, Value]:
        """Config values that the data set brings, for the fields that every method has."""
        defaults = {name: value for name, value in self.source().defaults.items() if name not in ("noise", "model")}
        return {**defaults, "views": self.views} if self.views else defaults

    def source(self) -> Source:
        """Where its data come from."""
        return DataSpec.of(self).source()


FIELDS = {f.name: f for f in dataclasses.fields(SweepSpec)}
READING = ("image_size", "resize", "background", "skip_damaged", "follow_links", "views")  # of images
BEFORE = {f.name: f.default for f in dataclasses.fields(DataSpec) if f.metadata.get("newer")}  # of a record without the field
BEFORE_SET = {  # what was fixed then, and so stands in no trial of a record without ``split``
    **{"sce.log_zero": "-4.0", "sce.beta": "1.0"},
    **{"nce-rce.log_zero": "-4.0", "nce-rce.beta": "1.0"},
}
EXECUTION = {name for name, f in FIELDS.items() if f.metadata["execution"]}


def read_pairs(name: str, items: object) -> dict[str, str]:
    """``NAME=VALUE`` strings, or a YAML mapping, as a dictionary. UserError names the item that is neither."""
    if isinstance(items, Mapping):
        return {str(k): ",".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for k, v in items.items()}
    pairs = {}
    for item in items if isinstance(items, (list, tuple)) else [items]:
        key, sign, value = str(item).partition("=")
        if not (sign and key.strip() and value.strip()):
            raise UserError(f"--{name}: {item!r} is not readable; write NAME=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def read_field(name: str, value: object, *, stored: bool = False) -> Any:
    """One field's value from a flag or from YAML, checked. UserError names the value and what is allowed. One that is
    ``stored`` was allowed when its sweep was launched."""
    declaration = FIELDS[name]
    if name in ("set", "range"):
        return read_pairs(name, value)
    if name == "method":
        words = [str(w).strip() for w in (value if isinstance(value, (list, tuple)) else str(value).split(","))]
        return tuple(dict.fromkeys(words))
    if declaration.type == "bool":
        word = str(value).strip().lower()
        if word not in ("true", "false"):
            raise UserError(f"--{name.replace('_', '-')}: {value!r} is not allowed; it must be true or false")
        return word == "true"
    kind = {"int": int, "float": float, "str": str}[str(declaration.type)]
    try:
        result = kind(str(value).strip())
        if kind is int:
            float(result)  # what does not fit into a float is no number of anything
    except (ValueError, OverflowError):
        result = None
    legal = declaration.metadata["legal"]
    if result is None or (legal and not stored and not (math.isfinite(result) and result in Interval.parse(legal))):
        allowed = f"{'an integer' if kind is int else 'a number'} in {legal}"
        raise UserError(f"--{name.replace('_', '-')}: {value!r} is not allowed; it must be {allowed}")
    return result


class SpecLoader(yaml.BaseLoader):
    """YAML whose scalars stay as they are written, ``16:32`` too, and in which a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """A spec file as field values: KEY: VALUE lines, or the record of a sweep, ``sweep.yaml``, of whose fields those that say
    something are taken. UserError for a file that cannot be read, is no mapping, or has an unknown key."""
    try:
        content = yaml.load(path.read_text(), Loader=SpecLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if content is None:  # empty, or comments only
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold KEY: VALUE lines; known keys are {', '.join(FIELDS)}")
    if is_record(content):
        say(f"{path} is the record of a sweep: what was asked for is taken over, its provenance is not")
        content = {key: value for key, value in content["spec"].items() if value != ""}
    for key in content:
        if key not in FIELDS:
            raise UserError(f"{path}: unknown key {key!r}; known are {', '.join(FIELDS)}")
    return {key: read_field(key, value) for key, value in content.items()}


def is_record(content: object) -> bool:
    """Whether this is what a ``sweep.yaml`` holds."""
    return isinstance(content, dict) and set(content) == {"spec", "provenance"} and isinstance(content["spec"], dict)


def make_spec(values: Mapping[str, Any], *, stored: bool = False) -> SweepSpec:
    """A checked spec with the data set's own noise and network filled in. UserError names what is wrong.

    One that is ``stored`` was made whole and checked when its sweep was launched, so that it is read without asking its data
    set. What a record of an earlier version does not say is what was done before it could be said: its views stay "auto".
    """
    spec = SweepSpec(**values)
    if spec.method == ("all",):
        fitting = [name for name, method in METHODS.items() if spec.trusted or not method.needs_trusted]
        spec = dataclasses.replace(spec, method=tuple(fitting))
    for name in spec.method:
        check_method(name)
    if not stored:
        require_trusted(spec)
    has_size = check_name(spec.data) not in OWN_IMAGES
    for name in ("image_size", "resize", "background", "follow_links") if has_size else ():
        if value := getattr(spec, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: {value} is not allowed; images of {spec.data} have a size of their own")
    if not (stored and spec.noise and spec.model and (spec.image_size or has_size)):
        spec = _completed(spec, stored)
    spec = dataclasses.replace(spec, noise=str(parse_noise(spec.noise)))
    for name, value, known in (
        ("model", spec.model, list(MODELS)),
        ("views", spec.views, ["", *VIEW_DESCRIPTIONS]),
        ("precision", spec.precision, ["auto", "float32", "bfloat16"]),
        ("compile", spec.compile, ["off", "on"]),
        ("sampler", spec.sampler, ["tpe", "random"]),
        ("scheduler", spec.scheduler, ["asha", "none"]),
        ("split", spec.split, ["", *SPLITS]),
    ):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}; known are {', '.join(filter(None, sorted(known)))}")
    if 0 < spec.gpus_per_trial < 0.0001:
        raise UserError(f"--gpus-per-trial: {spec.gpus_per_trial:g} is not allowed; it must be 0 or a number from 0.0001 to 1")
    if spec.gpu_hours and not spec.gpus_per_trial:
        raise UserError(f"--gpu-hours: {spec.gpu_hours:g} is not allowed; it must be 0 where --gpus-per-trial is 0")
    return spec


def _completed(spec: SweepSpec, stored: bool) -> SweepSpec:
    """The spec with what its data set says where the user says nothing."""
    source = spec.source()
    return dataclasses.replace(
        spec,
        data=source.name,
        image_size=source.image_size,
        noise=spec.noise or str(source.defaults["noise"]),
        model=spec.model or str(source.defaults["model"]),
        views=spec.views if stored else spec.views or source.launch_views or source.views,
    )


def set_before(read: Mapping[str, Any]) -> dict[str, str]:
    """The fixed values of a record of the version before, and those that its methods had by default and have no more."""
    in_record = {**read.get("set", {}), **read.get("range", {})}
    by_default = {name: value for name, value in BEFORE_SET.items() if name.partition(".")[0] in read.get("method", ())}
    unsaid = {name: value for name, value in by_default.items() if not {name, name.partition(".")[2]} & set(in_record)}
    return {**unsaid, **read.get("set", {})}


def require_trusted(spec: SweepSpec) -> None:
    """UserError where a method learns from samples with clean labels, too, and is to get none."""
    for name in spec.method:
        if find_method(name).needs_trusted and not spec.trusted:
            raise UserError(f"{name} learns from samples with clean labels, too: give their number with --trusted")


def check_trusted(spec: SweepSpec) -> None:
    """UserError where a method is to learn from one clean sample: batch normalisation cannot train on one image."""
    for name in spec.method:
        if find_method(name).needs_trusted and spec.trusted < 2:
            raise UserError(f"--trusted: {spec.trusted} is not allowed with {name}; it must be an integer in [2, inf)")
