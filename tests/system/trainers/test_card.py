"""The model card, read by PyYAML, by huggingface_hub and by a reader of Markdown."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg import average
from ckpt_avg.commands.card import model_card
from ckpt_avg.commands.card_text import code, markdown_table, prose, yaml_lines, yaml_scalar
from ckpt_avg.user_code.comparison import Evaluation

pytestmark = pytest.mark.trainers

ANY_TEXT = st.text(st.characters(), max_size=40) | st.text(
    "-:#|>{}[]&*!%@`'\",?\n\t 01.eE+yntrueflsoY~=<é\ud83d", max_size=12
)


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@given(ANY_TEXT)
def test_every_string_is_the_same_string_for_yaml(text: str) -> None:
    """If it failed, a name could be read as a number, a date or a mapping, or end the front matter."""
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(f"key: {yaml_scalar(text)}\n") == {"key": _encodable(text)}
    assert yaml.safe_load(f"- {yaml_scalar(text)}\n") == [_encodable(text)]
    assert "\n" not in yaml_scalar(text)


@given(st.floats() | st.integers(-(2**70), 2**70))
def test_every_number_is_the_same_number_for_yaml(number: float) -> None:
    """If it failed, 1e-05 would be a string for the Hub, or a metric would lose digits."""
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(f"key: {yaml_scalar(number)}\n")["key"]
    assert type(found) is type(number)
    assert found == number or (math.isnan(number) and math.isnan(found))


_DOCUMENTS = st.recursive(
    ANY_TEXT | st.integers() | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner.filter(lambda value: not isinstance(value, list)), min_size=1, max_size=3)
        | st.dictionaries(ANY_TEXT.map(_encodable), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(ANY_TEXT.map(_encodable), _DOCUMENTS, min_size=1, max_size=4))
def test_every_document_is_the_same_document_for_yaml(document: dict[str, object]) -> None:
    """If it failed, the structure of the front matter would depend on what is in it."""
    yaml = pytest.importorskip("yaml")

    def encodable(value: object) -> object:
        if isinstance(value, dict):
            return {key: encodable(each) for key, each in value.items()}
        if isinstance(value, list):
            return [encodable(each) for each in value]
        return _encodable(value) if isinstance(value, str) else value

    assert yaml.safe_load("\n".join(yaml_lines(document))) == encodable(document)


@given(ANY_TEXT, ANY_TEXT)
def test_text_in_a_table_stays_text(first: str, second: str) -> None:
    """If it failed, a name could add HTML, a link or a cell to the page of the model."""
    markdown_it = pytest.importorskip("markdown_it")
    rows = [["a", "b"], [code(first), prose(second)]]
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse("\n".join(markdown_table(rows)))
    cells = [token for token in tokens if token.type == "inline"][2:]
    assert len(cells) == 2
    kinds = {child.type for cell in cells for child in cell.children or ()}
    assert kinds <= {"code_inline", "text", "text_special"}


def test_the_hub_reads_the_front_matter(run_folder: Path, tmp_path: Path) -> None:
    """If it failed, the Hub would show no base model, no tags and no metrics, or refuse the card."""
    hub = pytest.importorskip("huggingface_hub")
    result = average(run_folder, tmp_path / "swa.safetensors", last=3, bn="keep")
    metrics = {"accuracy": 0.5, "loss": 1e-05, "broken": math.nan}
    result = replace(result, evaluations=(Evaluation("average", None, metrics),))
    config = {"_name_or_path": "org/base", "architectures": ["LlamaForCausalLM"], "license": "mit"}
    card = hub.ModelCard(model_card(result, name="yes", config=config, recorded=result.metadata))
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("org/base", "mit", "transformers")
    assert data.base_model_relation == "merge"
    assert {"checkpoint-averaging", "swa", "ckpt-avg"} <= set(data.tags)
    assert data.model_name == "yes"
    assert {each.metric_type: each.metric_value for each in data.eval_results} == {"accuracy": 0.5, "loss": 1e-05}
    written = hub.ModelCard(str(card))
    assert written.data.to_dict() == data.to_dict()
    assert written.text == card.text
