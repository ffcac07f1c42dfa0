"""The dtype that a copied ``config.json`` names is kept true: that one value is rewritten, and no other byte."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME

_KEYS = ("dtype", "torch_dtype")  # of transformers since version 5, and before
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]:,]')


def with_true_dtype(config: bytes, sizes: Counter[str]) -> tuple[bytes, str]:
    """Returns a configuration that names a dtype of the output, and what was changed; empty if nothing was.

    A composite configuration names dtypes in the configurations inside it, too.

    Args:
        config: the contents of a ``config.json``.
        sizes: the bytes of each floating-point dtype in the output, as torch calls them.
    """
    if not sizes:
        return config, ""
    most = sizes.most_common(1)[0][0]
    changed, end, old = b"", 0, set[str]()
    for begin, after in _values(config):
        value = json.loads(config[begin:after])
        name = value.removeprefix("torch.")
        if name in BY_TORCH_NAME and BY_TORCH_NAME[name].kind == "float" and name not in sizes:
            changed += config[end:begin] + json.dumps(value.replace(name, most)).encode()
            end = after
            old.add(name)
    if not old:
        return config, ""
    return changed + config[end:], f"names {most}, the dtype of the output, instead of {' and '.join(sorted(old))}"


def _values(config: bytes) -> Iterator[tuple[int, int]]:
    """Yields where the dtypes are, as strings with quotes: at the top, and in objects called ``…_config``."""
    try:
        if not isinstance(json.loads(config), dict):
            return
    except (ValueError, RecursionError):
        return
    path: list[str] = []  # the key of each object or list around a token
    key, last, is_value = "", "", False
    for match in _TOKEN.finditer(config):
        token = match[0]
        if token in (b"{", b"["):
            path.append(key)
            key, is_value = "", False
        elif token in (b"}", b"]"):
            path.pop()
            is_value = False
        elif token == b":":
            key, is_value = last, True
        elif token == b",":
            key, is_value = "", False
        else:
            last = json.loads(token)
            inner = path[1:]
            if (
                is_value
                and key in _KEYS
                and all(each.endswith("_config") and each != "quantization_config" for each in inner)
            ):
                yield match.span()
