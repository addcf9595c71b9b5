"""What is said of a sweep when it is launched, and what its labels hold."""

from __future__ import annotations

import json

from data.dataset import Dataset
from data.names import VIEW_DESCRIPTIONS
from data.noise import NoiseReport, parse_noise
from methods import METHODS
from methods.clock import first_epoch
from tune.search.space import Space
from tune.spec import SweepSpec


def describe(spec: SweepSpec, space: Space, dataset: Dataset, idle_gpus: int = 0) -> list[str]:
    """What is about to run, for the user to check: data, noise, network, defaults, ranges and rungs.

    ``idle_gpus``: the GPUs of this machine, where trials run on its CPU all the same.
    """
    report = dataset.noise
    noise = f", {report}" if report else ""
    sizes = f"{len(dataset.train)} training, {len(dataset.validation.labels)} validation (noisy labels)"
    sizes += f", {len(dataset.test.labels)} test (clean labels)" if dataset.test else ""
    sizes += f", {len(dataset.trusted)} trusted (clean labels)" if dataset.trusted else ""
    channels, side = dataset.input_shape
    shape = f"{dataset.num_classes} classes, images of {side} x {side} x {channels}"
    lines = [f"data {spec.data}: {shape}; {sizes}", f"noise {spec.noise} (seed {spec.noise_seed}){noise}; network {spec.model}"]
    lines[1:1] = dataset.remarks
    mapping = parse_noise(spec.noise).completed(dataset.source.maps).numbered(dataset.classes).mapping
    if mapping and dataset.classes:
        flips = [f"{dataset.classes[int(one)]} to {dataset.classes[int(other)]}" for one, other in mapping]
        lines.append(f"classes flip {', '.join(flips[:10])}{' ...' if len(flips) > 10 else ''}")
    lines += dataset.label_remarks()
    if idle_gpus:
        lines.append(f"trials run on the CPU; this machine has {idle_gpus} GPUs: --gpus-per-trial 0.25 puts four on each")
    rungs = spec.rungs()
    limits = [f"at most {limit:g} {unit}, " for limit, unit in ((spec.hours, "hours"), (spec.gpu_hours, "GPU-hours")) if limit]
    lines.append(
        f"{spec.trials} trials of {spec.epochs} epochs, {''.join(limits)}ASHA rungs at {', '.join(map(str, rungs)) or 'none'}"
    )
    if space.size is not None and space.size < spec.trials:
        lines.append(
            f"the ranges hold {space.size} configurations: the sweep ends when each has been run, before {spec.trials} trials"
        )
    left_out = {name for name, method in METHODS.items() if method.needs_trusted and not spec.trusted}
    if left_out and set(spec.method) == set(METHODS) - left_out:
        lines.append(
            f"without {', '.join(sorted(left_out))}, which also learns from clean labels: give their number with --trusted"
        )
    lines += views_lines(space, dataset)
    for method in spec.method:
        parameters = space.parameters[method]
        drawn = [f"{parameter.field} {parameter.range}" for parameter in parameters if parameter.range]
        fixed = [f"{parameter.field}={parameter.fixed}" for parameter in parameters if parameter.range is None]
        lines.append(f"{method}: searches {', '.join(drawn) or 'nothing'}; fixed {' '.join(fixed)}")
        late = {p.field: p.range.high if p.range else p.fixed for p in parameters if p.range is None or p.declared.legal}
        begins = first_epoch(space.begins(method, {k: v for k, v in late.items() if v is not None}), spec.epochs)
        unjudged = [rung for rung in rungs if rung <= begins]
        if unjudged and len(unjudged) == len(rungs):
            lines.append(f"{method} can begin as late as epoch {begins}: such a trial is never stopped early")
        elif unjudged:
            lines.append(f"{method} can begin as late as epoch {begins}: rungs up to then do not judge such a trial")
    return lines


def views_lines(space: Space, dataset: Dataset) -> list[str]:
    """The line that says how images are changed in training, and for which kinds of images that is wrong."""
    named = {name: name if name != "auto" else dataset.source.views for name in sorted(space.views())}
    return ["views " + "; ".join(f"{name}: {VIEW_DESCRIPTIONS[views]}" for name, views in named.items())]


def noise_text(spec: SweepSpec, dataset: Dataset, noise: NoiseReport) -> str:
    """The noise of training and validation labels as JSON: ``matrix[i][j]`` is the share of class i that is labelled j."""
    classes = list(dataset.classes) or [str(label) for label in range(dataset.num_classes)]
    content = {
        "noise": spec.noise,
        "noise_seed": spec.noise_seed,
        "realised_rate": noise.realised_rate,
        "labels": noise.num_labels,
        "known": noise.num_known,
        "open_set": noise.num_open,
        "labels_sha256": noise.label_checksum,
        "classes": classes,
        "matrix": [[round(share, 6) for share in row] for row in noise.matrix.tolist()],
    }
    return json.dumps(content) + "\n"
