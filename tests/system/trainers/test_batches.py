"""The batches of Hugging Face's tokenizers, image processors and collators reach the model as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from system.trainers.runs import needs
from torch import Tensor, nn

from ckpt_avg import UserCodeError, refresh_batch_norm
from ckpt_avg.user_code.batches import count_samples, to_device

pytestmark = pytest.mark.trainers
SAMPLES = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 1
WORDS = torch.randint(0, 20, (11, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def transformers() -> Any:
    """Returns the library, or skips."""
    needs("transformers")
    import transformers

    return transformers


class Reader(nn.Module):
    """Takes what a tokenizer gives, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.norm((self.embedding(input_ids) * attention_mask.unsqueeze(2)).mean(1))


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader()


def assert_measured(report: Any, seen: Tensor) -> None:
    measured = report.statistics["norm"]
    channels = seen.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(measured.mean, channels.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(measured.variance, channels.var(1, correction=1), rtol=1e-12, atol=1e-12)
    assert measured.count == channels.shape[1]


def tokens(part: Tensor) -> dict[str, Tensor]:
    return {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part[:, 0]}


KINDS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "BatchEncoding": lambda library, given: library.BatchEncoding(given),
    "BatchFeature": lambda library, given: library.BatchFeature(given),
    "dict of a collator": lambda library, given: library.default_data_collator(
        [{name: value[index] for name, value in given.items()} for index in range(len(given["labels"]))]
    ),
}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_passed_as_keywords(transformers: Any, kind: str, device: str | None) -> None:
    """They are mappings, yet no dicts."""
    batches = [KINDS[kind](transformers, tokens(part)) for part in WORDS.split([5, 4, 2])]
    model = reader()
    report = refresh_batch_norm(model, batches, device=device)
    assert (report.batches, report.samples) == (3, 11)
    with torch.no_grad():
        assert_measured(report, model.embedding(WORDS).mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_moved_whole_and_stays_what_it_is(transformers: Any, kind: str) -> None:
    batch = KINDS[kind](transformers, tokens(WORDS))
    moved = to_device(batch, "meta")
    assert type(moved) is type(batch)
    assert {value.device.type for value in moved.values()} == {"meta"}
    assert count_samples(moved) == 11


def test_a_convolutional_model_of_the_library_is_refreshed(transformers: Any) -> None:
    """Named by its own layers; the first one's statistics are those of all samples at once."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model = transformers.ResNetForImageClassification(config)
    batches = [transformers.BatchFeature({"pixel_values": part}) for part in SAMPLES.split([6, 5])]
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[Tensor] = []
    hook = model.get_submodule(first).register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
    report = refresh_batch_norm(model, batches)
    hook.remove()
    channels = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(report.statistics[first].mean, channels.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.statistics[first].variance, channels.var(1), rtol=1e-12, atol=1e-12)
    assert set(report.statistics) == {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }


def test_an_encoding_without_tensors_is_refused_by_the_model_and_named(transformers: Any) -> None:
    """A tokenizer called without return_tensors gives lists of numbers."""
    batch = transformers.BatchEncoding({"input_ids": WORDS.tolist(), "attention_mask": WORDS.tolist()})
    with pytest.raises(UserCodeError, match=r"batch 1 \(a mapping with the keys 'input_ids', 'attention_mask'\)"):
        refresh_batch_norm(reader(), [batch])


def test_forward_batch_takes_the_librarys_own_object(transformers: Any) -> None:
    given: list[object] = []

    def forward_batch(model: nn.Module, batch: Any) -> None:
        given.append(type(batch))
        model(batch.input_ids, batch["attention_mask"])

    batches = [transformers.BatchEncoding(tokens(part)) for part in WORDS.split(6)]
    model = reader()
    report = refresh_batch_norm(model, batches, device="cpu", forward_batch=forward_batch)
    assert given == [transformers.BatchEncoding] * 2
    with torch.no_grad():
        assert_measured(report, model.embedding(WORDS).mean(1))


def test_an_output_of_a_model_is_a_mapping_too(transformers: Any) -> None:
    """Features that another model put out."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, last_hidden_state: Tensor) -> Tensor:
            return self.norm(last_hidden_state.transpose(1, 2))

    with torch.no_grad():
        hidden = reader().embedding(WORDS)
    from transformers.modeling_outputs import BaseModelOutput

    batches = [BaseModelOutput(last_hidden_state=part) for part in hidden.split(4)]
    report = refresh_batch_norm(Head(), batches)
    assert report.samples == 11
    assert_measured(report, hidden.transpose(1, 2))
    moved = to_device(batches[0], "meta")
    assert moved["last_hidden_state"].device.type == "meta"
