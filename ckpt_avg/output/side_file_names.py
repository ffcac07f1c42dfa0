"""Which files next to weights are needed to load them, by their names. docs/releasing.md has the rules."""

from __future__ import annotations

import re

from ckpt_avg.formats.sharded import SUFFIX as INDEX_SUFFIX

CONFIG, ADAPTER_CONFIG, PIPELINE, MODULES = "config.json", "adapter_config.json", "model_index.json", "modules.json"
CONFIGURATION, TEXT = "configuration", "tokenizer or processor"  # the kinds
KINDS = (CONFIGURATION, TEXT)
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
MAIN = frozenset(
    (CONFIG, ADAPTER_CONFIG, PIPELINE, MODULES)
)  # without one of them, no loader knows what the weights are
# Of a run folder, which may contain anybody's files.
_OF_RUNS = frozenset((CONFIG, ADAPTER_CONFIG, "generation_config.json"))

_CONFIGURATION = re.compile(
    r"config\.json|[\w.-]+_config\.json|config_[\w-]+\.json|modules\.json|model_index\.json"
    r"|(LICEN[CS]E|NOTICE)(\.txt|\.md)?"
)
_TEXT = re.compile(
    r"[\w.-]*(tokeniz|vocab|merges|sentencepiece|spiece|processor|preprocess|feature_extract|chat_template|bpe)[\w.-]*"
    r"\.(json|txt|jinja|model|model\.v\d+|codes|vocab|tokenizer)"
    r"|[\w.-]+\.(spm|tiktoken|jinja|tokenizer)|(added_tokens|special_tokens_map|tekken|normalizer|id2label|label2id)\.json"
    r"|tokens\.txt",
    re.IGNORECASE,
)
# How the training was set up, which no loader reads.
_TRAINING = re.compile(
    r"(ds|deepspeed|zero|accelerate|fsdp|train|training|trainer|run|wandb|sweep|data|dataset|eval|optim\w*)[-_].*",
    re.IGNORECASE,
)


def kind_of(name: str) -> str | None:
    """Returns the kind of a side file; None if the name is not that of one.

    Example:
        >>> kind_of("generation_config.json"), kind_of("tokenizer_config.json"), kind_of("trainer_state.json")
        ('configuration', 'tokenizer or processor', None)
    """
    if name.startswith(".") or name.endswith(INDEX_SUFFIX) or _TRAINING.fullmatch(name):
        return None
    return TEXT if _TEXT.fullmatch(name) else CONFIGURATION if _CONFIGURATION.fullmatch(name) else None


def is_of_run(name: str) -> bool:
    """Whether a side file may be taken from the run folder."""
    return name in _OF_RUNS or kind_of(name) == TEXT
