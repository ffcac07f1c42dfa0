"""The model card, of real results. Its front matter is read by PyYAML and huggingface_hub in `system/trainers`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt_avg import average
from ckpt_avg.commands.card import base_model_of, card_notice, model_card, read_config
from ckpt_avg.commands.draft import AverageResult


@pytest.fixture(scope="module")
def result(run_folder: Path, train: Any, tmp_path_factory: pytest.TempPathFactory) -> AverageResult:
    """An average that was measured, refreshed and required."""
    return average(
        run_folder,
        tmp_path_factory.mktemp("card") / "swa.safetensors",
        last=3,
        model=train.make_model,
        data=train.train_loader,
        evaluate=train.evaluate,
        bn_batches=2,
        sha256=True,
        require="loss<=last+1",
        weighting="ema",
        half_life="50%",
    )


def _card(result: AverageResult, name: str = "swa", config: dict[str, Any] | None = None) -> str:
    return model_card(result, name=name, config=config, recorded=result.metadata)


def test_a_card_says_what_was_averaged_how_and_what_it_measured(result: AverageResult) -> None:
    """If it failed, a number of the card would be that of something else."""
    card = _card(result)
    assert result.weights is not None
    for path, step, weight in zip(result.checkpoints, result.steps, result.weights, strict=True):
        record = result.run[result.places[result.checkpoints.index(path)]]
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{path.name}`")]
        cells = row.strip("| ").split(" | ")
        assert cells[:3] == [f"`{path.name}`", str(step), f"{record.metrics['accuracy']:.6g}"]
        assert cells[-3:-1] == [f"{record.learning_rate:.6g}", repr(weight)]
        assert re.fullmatch("`[0-9a-f]{64}`", cells[-1])
    published = result.evaluations[-1]
    assert f"| average, statistics refreshed | {published.metrics['accuracy']:.6g} |" in card
    assert "in 2 batches" in card
    assert "`weighting ema`" in card
    assert f"`{result.data_digest}`" in card
    assert "- met: loss\\<=last+1" in card


def test_the_same_result_gives_the_same_bytes_and_no_folder_of_this_machine(result: AverageResult) -> None:
    """If it failed, a release could not be made again, or would tell where its maker works."""
    elsewhere = replace(
        result,
        output=Path("/secret/home/swa.safetensors"),
        checkpoints=tuple(Path("/secret/other") / path.name for path in result.checkpoints),
        evaluations=tuple(
            replace(each, path=each.path and Path("/secret/other") / each.path.name, name=f"/secret/{each.name}")
            if each.path
            else each
            for each in result.evaluations
        ),
    )
    assert _card(elsewhere) == _card(result)
    assert str(result.output.parent) not in _card(result)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("google/vit-base-patch16-224", True),
        ("gpt2", False),  # a folder may be called so
        ("outputs/llama", False),
        ("me/checkpoint-500", False),
        ("/home/me/llama", False),
        ("./me/llama", False),
        ("me/runs/llama", False),
        ("C:\\me\\llama", False),
        ("../llama", False),
        ("~/llama", False),
        ("org/na me", False),
        ("org/name\n", False),
        (7, False),
        ("", False),
    ],
)
@pytest.mark.parametrize("key", ["_name_or_path", "base_model_name_or_path"])
def test_a_base_model_is_a_name_on_the_hub_or_left_out(key: str, name: Any, known: bool) -> None:
    """If it failed, the card would name a folder of somebody's machine, or miss a model that it could name."""
    assert base_model_of({key: name}) == (name if known else None)


def test_a_base_model_that_is_a_folder_here_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, the folder that a run began from would be called a model of the Hub."""
    monkeypatch.chdir(tmp_path)
    assert base_model_of({"_name_or_path": "me/llama"}) == "me/llama"
    (tmp_path / "me" / "llama").mkdir(parents=True)
    assert base_model_of({"_name_or_path": "me/llama"}) is None


def test_what_is_not_known_is_left_out_and_said(result: AverageResult) -> None:
    """If it failed, a card would guess, or a user would not learn that it has a gap."""
    head = _card(result).split("\n---\n")[0]
    assert "base_model:" not in head
    assert "license:" not in head
    assert "library_name:" not in head
    assert "base_model and license" in (card_notice(None) or "")
    known = {"_name_or_path": "org/name", "license": "apache-2.0", "model_type": "llama"}
    head = _card(result, config=known).split("\n---\n")[0]
    assert "base_model: org/name\n" in head
    assert "license: apache-2.0\n" in head
    assert "library_name: transformers\n" in head
    assert card_notice(known) is None


_CODE = {"architectures": ["A"], "model_type": "x"}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, 'LlamaForCausalLM.from_pretrained("swa")'),
        ({"model_type": "llama"}, 'AutoModel.from_pretrained("swa")'),
        ({"architectures": ["os.system('x')"]}, 'AutoModel.from_pretrained("swa")'),
        ({"model_type": "x", "auto_map": {}}, 'AutoModel.from_pretrained("swa", trust_remote_code=True)'),
        (
            {"auto_map": {"AutoConfig": "m.C", "AutoModel": "m.B", "AutoModelForCausalLM": "m.A"}, **_CODE},
            'AutoModelForCausalLM.from_pretrained("swa", trust_remote_code=True)',
        ),
        ({"_diffusers_version": "1", "_class_name": "UNet2DModel"}, 'UNet2DModel.from_pretrained("swa")'),
        ({"peft_type": "LORA"}, 'AutoPeftModel.from_pretrained("swa")'),
        ({"__version__": {"sentence_transformers": "5"}}, 'SentenceTransformer("swa")'),
        ({"__version__": {"sentence_transformers": "5"}, "model_type": "CrossEncoder"}, 'CrossEncoder("swa")'),
        (None, 'load_file("swa/model.safetensors")'),
    ],
)
def test_a_card_shows_how_the_library_of_the_folder_loads_it(
    result: AverageResult, config: dict[str, Any] | None, line: str
) -> None:
    """If it failed, a reader would copy a line that does not work, or a line that a checkpoint wrote."""
    assert line in _card(replace(result, files=("model.safetensors", "README.md")), config=config)


def test_a_card_shows_how_to_load_a_variant(result: AverageResult) -> None:
    """If it failed, diffusers and transformers would not find the weights with the line of the card."""
    files = ("unet/diffusion_pytorch_model.fp16.safetensors", "README.md")
    config = {"_diffusers_version": "1", "_class_name": "UNet2DModel"}
    assert 'from_pretrained("swa", variant="fp16")' in _card(replace(result, files=files), config=config)


def test_the_card_of_a_file_opens_a_file(result: AverageResult) -> None:
    """If it failed, a library would look for a folder, which is not there."""
    assert 'load_file("swa.safetensors")' in _card(result, config={"model_type": "llama"})


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (("model.safetensors", "README.md"), 'load_file("swa/model.safetensors")'),
        (("a-1.safetensors", "a-2.safetensors", "README.md"), 'load_torch_model(model, "swa")'),
    ],
)
def test_a_card_shows_how_to_load_a_folder_without_a_configuration(
    result: AverageResult, files: tuple[str, ...], line: str
) -> None:
    """If it failed, a reader would open a folder as a file."""
    assert line in _card(replace(result, files=files))


def test_a_copy_is_not_called_a_mean(run_folder: Path, tmp_path: Path) -> None:
    """If it failed, the card of a single checkpoint would claim an average."""
    result = average([run_folder / "epoch_20.pt"], tmp_path / "a.safetensors")
    card = _card(result)
    assert "weights of `epoch_20.pt`" in card
    assert "merge" not in card
    assert "swa\n" not in card.split("\n---\n")[0]


def test_names_cannot_break_out_of_the_card(result: AverageResult) -> None:
    """If it failed, the name of a checkpoint or a metric could add markup, a row, or a line to the front matter."""
    hostile = "a|b`c``\n---\nlicense: mit\n<script>[x](y)\u202e\udc80"
    changed = replace(
        result,
        checkpoints=(Path(hostile), *result.checkpoints[1:]),
        evaluations=tuple(replace(each, metrics={hostile: 1.0}) for each in result.evaluations),
        comparison=None,
        outcomes=(),
        split=hostile,
    )
    card = _card(changed, name=hostile, config={"license": hostile, "_name_or_path": hostile, "model_type": hostile})
    plain = _card(replace(result, comparison=None, outcomes=(), split="x"), name="x", config={"model_type": "x"})
    assert [line[:1] for line in card.splitlines() if line.startswith(("|", "-", "#"))] == [
        line[:1] for line in plain.splitlines() if line.startswith(("|", "-", "#"))
    ]
    assert card.count("\n---\n") == 1
    assert "\u202e" not in card
    card.encode()


def test_a_configuration_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """If it failed, a damaged config.json would end a run, or a list would be taken for one."""
    assert read_config(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert read_config(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert read_config(tmp_path) == {"peft_type": "LORA"}
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert read_config(tmp_path) == {"peft_type": "LORA"}


def test_the_configuration_of_sentence_transformers_comes_first(tmp_path: Path) -> None:
    """If it failed, its card would load the transformer alone, without the layers after it."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "license": "mit"}')
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "SentenceTransformer"}')
    assert read_config(tmp_path) == {"model_type": "SentenceTransformer", "license": "mit"}
