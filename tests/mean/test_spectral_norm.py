"""Spectral norm after averaging, against torch's own layers in evaluation mode and an exact decomposition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mean.inputs import save
from mean.plans import spec_of
from safetensors import safe_open
from safetensors.torch import load_file
from system.faults.rank_runs import in_threads
from torch import Tensor, nn

from ckpt_avg import VerificationError, average, sweep, verify
from ckpt_avg.mean.recognisers import SpectralNorm, spectral_norms

Layer = Callable[[], nn.Module]
HOOK, PARAMETRIZATION = nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm
LAYERS: dict[str, Layer] = {
    "hook": lambda: HOOK(nn.Linear(7, 5)),
    "hook, square": lambda: HOOK(nn.Linear(6, 6)),
    "hook, columns of a square": lambda: HOOK(nn.Linear(6, 6), dim=1),
    "hook, convolution": lambda: HOOK(nn.Conv2d(3, 4, 3)),
    "hook, transposed convolution": lambda: HOOK(nn.ConvTranspose2d(4, 4, 4)),
    "hook, last dimension": lambda: HOOK(nn.Conv2d(4, 3, 4), dim=3),
    "hook, another name": lambda: HOOK(nn.Bilinear(3, 4, 5), "weight"),
    "parametrization": lambda: PARAMETRIZATION(nn.Linear(7, 5)),
    "parametrization, columns": lambda: PARAMETRIZATION(nn.Linear(6, 6), dim=1),
    "parametrization, convolution": lambda: PARAMETRIZATION(nn.Conv1d(4, 4, 4)),
}


def run(make: Layer, folder: Path, count: int = 4, **options: Any) -> tuple[list[Path], nn.Module]:
    """Checkpoints whose weights wander, each after one power iteration of its own; and the layer of the average."""
    torch.manual_seed(0)
    layer = make().train()
    weight = next(value for name, value in layer.named_parameters() if "weight" in name)
    states = []
    for _ in range(count):
        with torch.no_grad():
            weight += 0.3 * torch.randn_like(weight)
            for each in layer.train().modules():
                effective(each)
        states.append({name: value.clone() for name, value in layer.state_dict().items()})
    paths = save(folder, states, ".pt")
    average(paths, folder / "mean.safetensors", **options)
    layer.load_state_dict(load_file(folder / "mean.safetensors"))
    return paths, layer.eval()


def effective(layer: nn.Module) -> Any:
    """The weight that the layer computes with, after its power iteration if it is in train mode."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())
    return getattr(layer, "weight", None)


def dim_of(layer: nn.Module) -> int:
    if layer._forward_pre_hooks:
        return next(iter(layer._forward_pre_hooks.values())).dim
    return layer.parametrizations["weight"][0].dim


@pytest.mark.guarantee("spectral-norm")
@pytest.mark.parametrize("options", [{}, {"weights": [1.5, -0.75, 0.25, 0.0]}], ids=["equal", "weights"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_largest_singular_value_of_the_effective_weight_is_one(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """With averaged vectors it would be several times that; this is what the layer promises in evaluation mode."""
    _, layer = run(LAYERS[kind], tmp_path, **options)
    matrix = effective(layer).detach().double().movedim(dim_of(layer), 0).flatten(1)
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=2e-5)


def test_nothing_but_the_vectors_differs_from_the_mean(tmp_path: Path) -> None:
    paths, _ = run(LAYERS["hook, convolution"], tmp_path)
    states = [torch.load(path) for path in paths]
    found = load_file(tmp_path / "mean.safetensors")
    for name in ("weight_orig", "bias"):
        assert torch.equal(found[name], (sum(state[name].double() for state in states) / len(states)).float())
    u, v = found["weight_u"].double(), found["weight_v"].double()
    assert u.norm().item() == pytest.approx(1, abs=1e-6)
    assert v.norm().item() == pytest.approx(1, abs=1e-6)
    assert u.dot(states[-1]["weight_u"].double()) > 0, "the iteration begins at the last checkpoint's vector"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_vectors_belong_to_the_rounded_weight(tmp_path: Path, dtype: str) -> None:
    run(LAYERS["hook"], tmp_path, dtype=dtype)
    found = load_file(tmp_path / "mean.safetensors")
    left, _, right = torch.linalg.svd(found["weight_orig"].double())
    for name, vector in (("weight_u", left[:, 0]), ("weight_v", right[0])):
        assert found[name].dtype == getattr(torch, dtype)
        expected = vector * (vector.dot(found[name].double()) / vector.dot(found[name].double()).abs())
        eps = torch.finfo(found[name].dtype).eps
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=max(eps, 1e-4))


def test_vectors_of_other_implementations() -> None:
    """Weights called ``_bar`` or ``_unspec``, and a row vector u0 without v, as BigGAN's layers store it.

    Other vectors of these names are parameters, such as the factors of a change of rank one.
    """
    found = spec_of({
        "a.weight_bar": ("F32", (4, 3, 2)), "a.weight_u": ("F32", (4,)), "a.weight_v": ("F32", (6,)),
        "b.weight": ("F32", (4, 3)), "b.u0": ("F32", (1, 4)), "b.sv0": ("F32", (1,)),
        "c.weight": ("F32", (4, 3)), "c.weight_u": ("F32", (4,)), "c.weight_v": ("F32", (3,)), "c.u0": ("F32", (4,)),
        "attention.pos_bias_u": ("F32", (4,)), "attention.pos_bias_v": ("F32", (4,)),
    })  # fmt: skip
    assert list(spectral_norms(found.tensors)) == [
        SpectralNorm("a.weight_bar", "a.weight_u", "a.weight_v"),
        SpectralNorm("b.weight", "b.u0", ""),
    ]


@pytest.mark.parametrize("length", [1.0, 1.5])
def test_vectors_called_u_and_v_are_those_of_spectral_norm_if_they_have_a_length_of_one(
    tmp_path: Path, length: float
) -> None:
    """As in residual flows and σReparam; parameters of these names are averaged."""
    torch.manual_seed(0)
    states = []
    for _ in range(2):
        left, _, right = torch.linalg.svd(weight := torch.randn(4, 6))
        states.append({"l.weight": weight, "l.u": length * left[:, 0], "l.v": length * right[0]})
    average(save(tmp_path, states, ".pt"), tmp_path / "mean")
    found = load_file(tmp_path / "mean")
    norm = found["l.u"].dot(found["l.weight"].mv(found["l.v"])).item()
    largest = torch.linalg.matrix_norm(found["l.weight"], 2).item()
    mean = (states[0]["l.u"] + states[1]["l.u"]) / 2
    assert (norm == pytest.approx(largest, rel=1e-5)) == (length == 1)
    assert torch.allclose(found["l.u"], mean) == (length != 1)


def test_vectors_that_the_weight_does_not_determine_are_the_lasts_with_a_notice(tmp_path: Path) -> None:
    """A parametrization before spectral norm changes the weight that it sees."""

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    def make() -> nn.Module:
        layer = nn.Linear(4, 4)
        nn.utils.parametrize.register_parametrization(layer, "weight", Double())
        return PARAMETRIZATION(layer)

    torch.manual_seed(0)
    states = [make().state_dict() for _ in range(2)]
    result = average(save(tmp_path, states, ".pt"), tmp_path / "mean")
    found = load_file(tmp_path / "mean")
    assert torch.equal(found["parametrizations.weight.1._u"], states[1]["parametrizations.weight.1._u"])
    assert any("of spectral norm copied from the last checkpoint" in notice for notice in result.notices)


def test_one_checkpoint_and_a_weight_of_zeros_keep_their_vectors(tmp_path: Path) -> None:
    state = HOOK(nn.Linear(3, 3)).state_dict()
    zeros = {**state, "weight_orig": torch.zeros(3, 3)}
    for name, states in (("one", [state]), ("zeros", [zeros, {**zeros, "bias": torch.ones(3)}])):
        (tmp_path / name).mkdir()
        average(save(tmp_path / name, states, ".pt"), tmp_path / f"{name}.out")
        assert torch.equal(load_file(tmp_path / f"{name}.out")["weight_u"], state["weight_u"]), name


def test_slow_convergence_is_said(tmp_path: Path) -> None:
    """Singular values that are nearly equal: σ is right to a few digits, and the vectors are not settled."""
    values = torch.linspace(1, 1.005, 40, dtype=torch.float64)
    state = {"weight_orig": torch.diag(values), "weight_u": torch.ones(40).double() / 40**0.5}
    state["weight_v"] = state["weight_u"].clone()
    result = average(save(tmp_path, [state, state], ".pt"), tmp_path / "mean")
    assert any("still changing after 1,000 power iterations" in notice for notice in result.notices)


# -- Commands ---------------------------------------------------------------------------------------------------------


def test_it_is_recorded_verified_and_planned(tmp_path: Path) -> None:
    paths, _ = run(LAYERS["hook"], tmp_path)
    output = tmp_path / "mean.safetensors"
    with safe_open(output, framework="pt") as reader:
        assert json.loads(reader.metadata()["ckpt_avg.spectral_norm"]) == {"vectors": "recomputed", "weights": 1}
    assert verify(output, sources=paths).spectral_norms == ("weight_orig",)
    assert average(paths, tmp_path / "dry", dry_run=True).spectral_norms == ("weight_orig",)


def test_names_that_keep_the_prefix_of_a_wrapper_are_computed_alike(tmp_path: Path) -> None:
    run(lambda: nn.DataParallel(nn.Sequential(HOOK(nn.Linear(7, 5)))), tmp_path, strip_prefix="")
    found = load_file(tmp_path / "mean.safetensors")
    _, sigma, _ = torch.linalg.svd(found["module.0.weight_orig"].double())
    image = found["module.0.weight_orig"].double().mv(found["module.0.weight_v"].double())
    assert found["module.0.weight_u"].double().dot(image).item() == pytest.approx(sigma[0].item(), rel=1e-5)


def test_verify_finds_vectors_of_another_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with sound digests whose vectors were not computed from its weight."""
    monkeypatch.setattr("ckpt_avg.mean.spectral_norm.leading_vectors", lambda *arguments: {})
    paths, _ = run(LAYERS["hook, convolution"], tmp_path)
    with pytest.raises(VerificationError, match="'weight_orig': u and v are not the vectors of the averaged weight"):
        verify(tmp_path / "mean.safetensors", sources=paths)


def test_a_sweep_measures_layers_with_their_own_vectors(tmp_path: Path) -> None:
    paths, _ = run(LAYERS["hook"], tmp_path)
    norms = []

    def evaluate(layer: nn.Module) -> float:
        norms.append(torch.linalg.matrix_norm(effective(layer).detach().double(), 2).item())
        return norms[-1]

    sweep(paths, model=LAYERS["hook"], evaluate=evaluate, minimize="evaluate")
    assert len(norms) == 1 + 7
    windows = [norms[number] for number in (2, 3, 4, 6, 7)]  # of more than one checkpoint
    assert windows == pytest.approx([1] * 5, abs=2e-5)


@pytest.mark.guarantee("same-bytes")
def test_ranks_write_the_same_bytes(tmp_path: Path) -> None:
    paths, _ = run(LAYERS["hook, convolution"], tmp_path)
    ends = in_threads(2, lambda ranks: average(paths, tmp_path / "ranks.safetensors", ranks=ranks).written)
    assert ends == [True, True]
    assert (tmp_path / "ranks.safetensors").read_bytes() == (tmp_path / "mean.safetensors").read_bytes()
