"""The model card of an average: Markdown with YAML front matter, as the Hugging Face Hub shows it.

The same inputs give the same bytes. No path of this machine is in it: checkpoints are called by their names.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_avg.commands.card_text import code, markdown_table, prose, yaml_lines
from ckpt_avg.limits import LIMITS
from ckpt_avg.output.provenance import recorded_sources, recorded_weighting, text_of
from ckpt_avg.text import argument, plural
from ckpt_avg.user_code.comparison import Evaluation, summary
from ckpt_avg.version import __version__

if TYPE_CHECKING:
    from ckpt_avg.commands.draft import AverageResult

_MOST_METRICS = 3  # recorded metrics of the checkpoints that get a column
CONFIGS = ("config.json", "adapter_config.json", "model_index.json", "config_sentence_transformers.json")
# Folders in which people keep models of their own: `outputs/run-1` is no name on the Hub.
_LOCAL = re.compile(
    r"(outputs?|out|runs?|results?|models?|checkpoints?|ckpts?|data|datasets?|tmp|temp|work|workspace|saved?|logs?|"
    r"exp|exps|experiments?|weights?|pretrained|cache|home|mnt|root|src|\.+|~)/.*|.*/(checkpoint|step|epoch|iter|global_step)"
    r"[-_]?\d*",
    re.IGNORECASE,
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_VARIANT = re.compile(r"(?:.*/)?(?:model|diffusion_pytorch_model)\.(\w+)\.safetensors")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")


def model_card(
    result: AverageResult, *, name: str, config: Mapping[str, Any] | None, recorded: Mapping[str, str]
) -> str:
    """Returns the card of an output.

    Args:
        result: what `average`, `refresh_weights` or `soup` made.
        name: what the model is called: the name of the output's folder, or of its file without the suffix.
        config: the configuration next to the weights (``config.json`` and the like), if there is one.
        recorded: the metadata of the output, such as ``result.metadata``.
    """
    return "\n".join(
        [
            "---",
            *yaml_lines(_front_matter(result, name, config or {})),
            "---",
            "",
            f"# {prose(name)}",
            "",
            _introduction(result),
            "",
            "## Checkpoints",
            "",
            *_checkpoints(result, recorded),
            "",
            "## Method",
            "",
            *_method(result, recorded),
            *_evaluation(result),
            "",
            "## How to load it",
            "",
            *_loading(result, name, config or {}),
            "",
            "## How to verify it",
            "",
            *_verifying(result),
            "",
        ]
    )


def card_notice(config: Mapping[str, Any] | None) -> str | None:
    """Says which fields are not in the card because they are not known; None if all are."""
    known = {"base_model": base_model_of(config or {}), "license": license_of(config or {})}
    missing = [field for field, value in known.items() if value is None]
    if not missing:
        return None
    them = "it" if len(missing) == 1 else "them"
    return (
        f"the model card does not say {' and '.join(missing)}, which no configuration names for certain: add {them} to "
        "its first lines before you share the model"
    )


def base_model_of(config: Mapping[str, Any]) -> str | None:
    """Returns the Hub name of the model from which training began, if a configuration names one.

    It may also be a path on the machine of the training. So only ``OWNER/NAME`` counts, unless it exists here as
    a path, or is named as folders of runs are.
    """
    for key in ("base_model_name_or_path", "_name_or_path"):
        name = config.get(key)
        if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not _LOCAL.fullmatch(name):
            return None if os.path.lexists(name) else name
    return None


def license_of(config: Mapping[str, Any]) -> str | None:
    """Returns the license that a configuration names in the form of the Hub, such as ``apache-2.0``."""
    name = config.get("license")
    return name if isinstance(name, str) and _LICENSE.fullmatch(name) else None


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """Returns the configuration in a folder of weights; None if there is none that can be read.

    That of sentence-transformers has its own file next to that of the transformer, and comes before it.
    """
    several = [_read(folder / name) for name in CONFIGS]
    found = [each for each in several if each is not None]
    return {**found[0], **(several[-1] or {})} if found else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LIMITS.index))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _front_matter(result: AverageResult, name: str, config: Mapping[str, Any]) -> dict[str, object]:
    several = len(result.checkpoints) > 1
    known = {
        "base_model": base_model_of(config),
        "base_model_relation": "merge" if several else None,
        "library_name": _library(config),
        "license": license_of(config),
    }
    tags = ["checkpoint-averaging", "merge", *(["swa"] if result.weights is None else [])] if several else []
    fields: dict[str, object] = {field: value for field, value in known.items() if value is not None}
    fields["tags"] = [*tags, "ckpt-avg"]
    metrics = _published(result)
    if metrics:
        task: dict[str, object] = {"type": "other"}
        dataset = {"name": "as measured by the --eval function", "type": "unknown"}
        listed = [{"type": metric, "name": metric, "value": value} for metric, value in metrics.items()]
        found = {"task": task, "dataset": dataset, "metrics": listed}
        fields["model-index"] = [{"name": name, "results": [found]}]
    return fields


def _published(result: AverageResult) -> dict[str, float]:
    """Returns the finite metrics of the weights that were published."""
    measured = [each for each in result.evaluations if each.path is None]
    found = measured[-1].metrics if measured else {}
    return {metric: value for metric, value in found.items() if math.isfinite(value)}


def _library(config: Mapping[str, Any]) -> str | None:
    """Returns the library that reads a folder with this configuration."""
    if "_diffusers_version" in config:
        return "diffusers"
    if "peft_type" in config:
        return "peft"
    version = config.get("__version__")
    if isinstance(version, dict) and "sentence_transformers" in version:
        return "sentence-transformers"
    return "transformers" if {"architectures", "model_type", "transformers_version"} & config.keys() else None


def _introduction(result: AverageResult) -> str:
    count = len(result.checkpoints)
    if count == 1:
        what = f"The weights of {code(text_of(result.checkpoints[0]))}" + (
            ", with recomputed BatchNorm statistics" if result.statistics == "refreshed" else ""
        )
    else:
        what = (
            f"The {'' if result.weights is None else 'weighted '}mean of the weights of {plural(count, 'checkpoint')}"
        )
    return f"{what}, made by `ckpt-avg` {prose(__version__)}."


def _checkpoints(result: AverageResult, recorded: Mapping[str, str]) -> list[str]:
    records = [result.run[place] for place in result.places]
    sources = recorded_sources(recorded) or []
    digests = [source.get("sha256") for source in sources]
    shared = [metric for metric in sorted(records[0].metrics) if all(metric in each.metrics for each in records)]
    metrics = shared[:_MOST_METRICS]
    columns: list[tuple[str, list[str]]] = [
        ("checkpoint", [code(text_of(path)) for path in result.checkpoints]),
        (result.unit, ["" if moment is None else str(moment) for moment in result.steps]),
        *((code(metric), [_number(each.metrics[metric]) for each in records]) for metric in metrics),
        ("learning rate", ["" if each.learning_rate is None else _number(each.learning_rate) for each in records]),
        ("weight", _weights(result)),
        ("SHA-256", [_digest(each) for each in digests] if len(digests) == len(records) else []),
    ]
    shown = [(title, cells) for title, cells in columns if any(cells)]
    rows = [[title for title, _ in shown], *map(list, zip(*(cells for _, cells in shown), strict=True))]
    more = len(shared) - len(metrics)
    return markdown_table(rows) + (
        ["", f"{plural(more, 'more metric')} in the metadata of the weights."] if more else []
    )


def _weights(result: AverageResult) -> list[str]:
    count = len(result.checkpoints)
    if count == 1:
        return []
    return [f"1/{count}"] * count if result.weights is None else [repr(each) for each in result.weights]


def _digest(files: object) -> str:
    """Returns the digest of a checkpoint of one file."""
    if not isinstance(files, dict) or len(files) != 1:
        return ""
    return code(next(iter(files.values())))


def _number(value: float) -> str:
    return f"{value:.6g}"


def _method(result: AverageResult, recorded: Mapping[str, str]) -> list[str]:
    lines = []
    count = len(result.checkpoints)
    if count == 1:
        lines.append("- Every tensor is a copy of the checkpoint's, unless this list says otherwise.")
    elif result.weights is None:
        lines.append(
            f"- Each weight is the sum of the {count} checkpoints in float64, divided once by {count} and rounded once "
            "to the dtype of the output."
        )
    else:
        lines.append(
            "- Each weight is the sum of the checkpoints times their weights in float64, rounded once to the dtype of "
            "the output."
        )
        method = recorded_weighting(recorded)
        if method:
            options = ", ".join(code(f"{key} {value}") for key, value in method.items())
            lines.append(f"- The weights of the checkpoints: {options}.")
    if batch_norm := _batch_norm(result):
        lines.append(f"- {batch_norm}")
    if result.spectral_norms:
        weights = plural(len(result.spectral_norms), "weight")
        lines.append(f"- The vectors of spectral norm of {weights} are computed from the averaged weight.")
    if result.split is not None:
        lines.append(
            f"- The checkpoints were chosen on the split {code(result.split)}. Its numbers are too optimistic."
        )
    return lines


def _batch_norm(result: AverageResult) -> str:
    report = result.batch_norm
    if report is not None:
        return (
            f"The BatchNorm statistics of {plural(len(report.statistics), 'layer')} were recomputed on these weights "
            f"over {plural(report.samples, 'sample')} in {plural(report.batches, 'batch')}."
        )
    return {
        "none": "",
        "refreshed": "The BatchNorm statistics are recomputed on these weights.",
        "mean": "The BatchNorm statistics are the mean of the checkpoints'. They were not recomputed.",
        "copied": "The BatchNorm statistics are those of the checkpoint.",
        "frozen": "The BatchNorm statistics are the same in every checkpoint, and were kept.",
    }[result.statistics]


def _evaluation(result: AverageResult) -> list[str]:
    if not result.evaluations:
        return []
    last = [each.path for each in result.evaluations if each.path is not None][-1:]
    shown = [each for each in result.evaluations if each.path is None or each.path in last]
    metrics = list(shown[-1].metrics)
    rows = [["weights", *map(code, metrics)]]
    rows += [[_measured_name(each), *(_number(each.metrics[metric]) for metric in metrics)] for each in shown]
    lines = ["", "## Evaluation", "", *markdown_table(rows)]
    if text := summary(result.comparison):
        lines += ["", prose(f"{text[0].upper()}{text[1:]}.")]
    lines += [""] * bool(result.outcomes)
    lines += [f"- {'met' if each.met else 'not met'}: {prose(str(each))}" for each in result.outcomes]
    return lines


def _measured_name(evaluation: Evaluation) -> str:
    if evaluation.path is None:
        return prose(evaluation.name)
    refreshed = ", statistics refreshed" if evaluation.refreshed else ""
    return f"last checkpoint, {code(text_of(evaluation.path))}{refreshed}"


def _loading(result: AverageResult, name: str, config: Mapping[str, Any]) -> list[str]:
    path = json.dumps(name)
    library = _library(config) if result.files else None
    variants = [match[1] for each in result.files if (match := _VARIANT.fullmatch(each))]
    variant = f', variant="{variants[0]}"' if variants else ""
    if library == "diffusers":
        kind = _identifier(config.get("_class_name")) or "DiffusionPipeline"
        lines = [f"from diffusers import {kind}", "", f"model = {kind}.from_pretrained({path}{variant})"]
    elif library == "peft":
        lines = ["from peft import AutoPeftModel", "", f"model = AutoPeftModel.from_pretrained({path})"]
    elif library == "sentence-transformers":
        named = config.get("model_type")
        kind = named if named in ("CrossEncoder", "SparseEncoder") else "SentenceTransformer"
        lines = [f"from sentence_transformers import {kind}", "", f"model = {kind}({path})"]
    elif library == "transformers":
        kind = _class(config)
        trust = ", trust_remote_code=True" if "auto_map" in config else ""
        lines = [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({path}{variant}{trust})"]
    else:
        lines = _loading_files(result, path)
    return ["```python", *lines, "```"]


def _class(config: Mapping[str, Any]) -> str:
    """Returns the class of transformers that loads a model; of code in its folder the one that ``auto_map`` has."""
    mapped, names = config.get("auto_map"), config.get("architectures")
    if "auto_map" in config:
        classes = mapped if isinstance(mapped, dict) else {}
        kinds = [kind for kind in classes if kind.startswith("AutoModel") and _identifier(kind)]
        own = [kind for kind in kinds if isinstance(names, list) and str(classes[kind]).rpartition(".")[2] in names]
        return next(iter([*own, *kinds]), "AutoModel")
    return (_identifier(names[0]) if isinstance(names, list) and names else None) or "AutoModel"


def _loading_files(result: AverageResult, folder: str) -> list[str]:
    """Returns how to load the weights of an output that no library reads as a model."""
    weights = [name for name in result.files if name.endswith(".safetensors")]
    if len(weights) > 1:
        return ["from huggingface_hub import load_torch_model", "", f"load_torch_model(model, {folder})"]
    file = json.dumps("/".join((json.loads(folder), *weights)) if weights else text_of(result.output))
    return ["from safetensors.torch import load_file", "", f"model.load_state_dict(load_file({file}))"]


def _identifier(name: object) -> str | None:
    return name if isinstance(name, str) and name.isascii() and name.isidentifier() else None


def _verifying(result: AverageResult) -> list[str]:
    output = argument(text_of(result.output))
    lines = [
        "The weights record their checkpoints, options and digests. This checks that they are complete and undamaged, "
        "and with the checkpoints (here in `RUN`) that they are the mean of these, bit for bit:",
        "",
        "```console",
        f"$ ckpt-avg verify {output}",
        f"$ ckpt-avg verify {output} --sources RUN",
        "```",
    ]
    if result.data_digest is not None:
        lines += ["", f"Digest of the data: {code(result.data_digest)}"]
    return lines


def checkpoint_folder(checkpoints: Sequence[Path]) -> Path:
    """Returns the folder in which the configuration of the last checkpoint would be."""
    last = checkpoints[-1]
    return last if last.is_dir() else last.parent
