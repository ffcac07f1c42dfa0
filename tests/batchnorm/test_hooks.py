"""What each kind of layer returns and stores while it is measured: as in training, by either estimator."""

from __future__ import annotations

import copy
import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from batchnorm.oracles import all_at_once, assert_close, assert_measured, model_of, randn
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from ckpt_avg import UsageError, UserCodeError, refresh_batch_norm

CHANNELS = 5


# -- A layer with the batch's statistics in its buffers returns what it does in train mode --------------------------


class Checked(nn.BatchNorm2d):
    """A subclass with torch's own forward that accepts one more shape."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (3, 4):
            raise ValueError(f"expected 3 or 4 dimensions, got {input.dim()}")


class Shifted(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values) + (1 if self.training else 1000)


KINDS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "1d of 2 dimensions": (nn.BatchNorm1d, (11, CHANNELS)),
    "1d of 3 dimensions": (nn.BatchNorm1d, (11, CHANNELS, 7)),
    "2d": (nn.BatchNorm2d, (11, CHANNELS, 3, 4)),
    "3d": (nn.BatchNorm3d, (11, CHANNELS, 2, 3, 2)),
    "sync": (nn.SyncBatchNorm, (11, CHANNELS, 3, 4)),
    "own check": (Checked, (11, CHANNELS, 6)),
    "own forward": (Shifted, (11, CHANNELS, 3, 4)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "channels last": lambda values: (
        values.movedim(1, -1).contiguous().movedim(-1, 1) if values.dim() > 2 else values.t().contiguous().t()
    ),
    "every other sample": lambda values: values.repeat_interleave(2, dim=0)[::2],
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"affine": False},
    {"momentum": None},
    {"momentum": 1.0, "eps": 10.0},
    {"momentum": 0.0, "affine": False, "eps": 1e-12},
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.0, torch.float16: 0.0}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_returns_what_it_does_in_train_mode(kind: str, layout: str) -> None:
    """Otherwise the next layer would be measured at something that training never showed it."""
    for options, dtype in itertools.product(OPTIONS, TOLERANCE):
        assert_returns_as_in_train_mode(kind, layout, options, dtype)


def assert_returns_as_in_train_mode(kind: str, layout: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    make, shape = KINDS[kind]
    layer = make(CHANNELS, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
            layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    layer.to(dtype)
    reference = copy.deepcopy(layer).train()
    values = 3 * randn(*shape) + torch.arange(float(CHANNELS)).view(1, -1, *[1] * (len(shape) - 2))
    values = LAYOUTS[layout](values.to(dtype))
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))

    for mode in (True, False):
        layer.train(mode)
        refresh_batch_norm(nn.Sequential(layer), [values])

    expected = reference(values).detach()
    for output in outputs:
        assert output.dtype == expected.dtype
        assert output.stride() == expected.stride()
        assert_close(output, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_at_a_full_precision_layer(dtype: torch.dtype) -> None:
    """As in mixed precision: the layer's own tensors are float32."""
    layer = nn.BatchNorm2d(CHANNELS)
    reference = copy.deepcopy(layer).train()
    values = (2 * randn(20, CHANNELS, 4, 4) + 1).to(dtype)
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    report = refresh_batch_norm(nn.Sequential(layer), [values])
    expected = reference(values).detach()
    assert outputs[0].dtype == expected.dtype
    one_step = torch.finfo(dtype).eps
    torch.testing.assert_close(outputs[0], expected, rtol=one_step, atol=one_step)
    assert_measured(report.statistics["0"], values)


def test_a_layer_far_from_zero_returns_what_it_does_in_train_mode() -> None:
    """The mean in the buffer is rounded to float32, which must cost no more than it does in torch."""
    values = randn(200, 3) + torch.tensor([1e3, -1e5, 1e6])
    layer = nn.BatchNorm1d(3, affine=False)
    reference, exact = copy.deepcopy(layer).train(), copy.deepcopy(layer).double().train()
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    refresh_batch_norm(nn.Sequential(layer), [values])
    wanted = exact(values.double())
    ours, theirs = (output.double().sub(wanted).abs().amax(0) for output in (outputs[0], reference(values)))
    assert (ours <= 2 * theirs + 1e-6).all()


def test_a_forward_of_one_instance_is_run_in_train_mode() -> None:
    """Not the class's, which is torch's: what an instance's own forward makes of running statistics is unknown."""
    layer = nn.BatchNorm1d(3)
    modes: list[bool] = []

    def forward(self: nn.BatchNorm1d, values: Tensor) -> Tensor:
        modes.append(self.training)
        return nn.functional.batch_norm(values, None, None, training=True)

    layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]
    report = refresh_batch_norm(nn.Sequential(layer), [randn(8, 3)])
    assert modes == [True]
    assert_close(report.statistics["0"].mean, all_at_once(randn(8, 3))[0])


class Wrapped(nn.BatchNorm2d):
    """A subclass whose own forward adds nothing."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, Wrapped], ids=["torch's own", "own forward"])
def test_a_forward_batch_that_calls_eval_disturbs_no_measurement(make: Callable[..., nn.Module]) -> None:
    """Functions written for evaluation put the model in evaluation mode first."""

    def forward_batch(model: nn.Module, batch: Tensor) -> None:
        model.eval()
        model(batch)

    batches = [7 * randn(16, 3, 2, 2) + 3, randn(16, 3, 2, 2, seed=1)]
    torch.manual_seed(0)
    model, other = (nn.Sequential(make(3), nn.ReLU(), make(3)) for _ in range(2))
    report = refresh_batch_norm(model, batches, forward_batch=forward_batch)
    expected = refresh_batch_norm(other, batches)
    for name, layer in expected.statistics.items():
        assert_close(report.statistics[name].mean, layer.mean, 1e-6)
        assert_close(report.statistics[name].variance, layer.variance, 1e-6)
    assert all(module.training for module in model.modules())


# -- batch-mean: what torch's update_bn computes ----------------------------------------------------------------------


class Network(nn.Module):
    """Convolutions, a layer that is used twice, one without affine parameters, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.twice = nn.BatchNorm2d(6, momentum=None)
        self.plain = nn.BatchNorm2d(6, affine=False, momentum=0.7)
        self.head = nn.Linear(6, 4)
        self.last = nn.BatchNorm1d(4)

    def forward(self, values: Tensor) -> Tensor:
        values = self.first(values)
        values = self.twice(self.again(values)).relu()
        values = self.plain(self.twice(self.again(values) + 1))
        return self.last(self.head(values.mean((2, 3))))


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(5)
    return Network().to(dtype)


def norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield name, module


@pytest.mark.parametrize("sizes", [[8, 8, 8], [8, 7, 2], [9]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=str)
def test_batch_mean_is_update_bn(sizes: list[int], dtype: torch.dtype, tolerance: float) -> None:
    batches = [batch + 0.3 * index for index, batch in enumerate(randn(sum(sizes), 3, 6, 6).to(dtype).split(sizes))]
    ours, theirs = network(dtype), network(dtype)
    refresh_batch_norm(ours, batches, estimator="batch-mean")
    update_bn(batches, theirs)
    for (name, layer), (_, other) in zip(norms(ours), norms(theirs), strict=True):
        assert_close(layer.running_mean, other.running_mean, tolerance)
        assert_close(layer.running_var, other.running_var, tolerance)
        assert layer.num_batches_tracked.item() == other.num_batches_tracked.item(), name
        assert layer.num_batches_tracked.item() == len(sizes) * (2 if name == "twice" else 1)


def test_both_estimators_show_deeper_layers_the_same() -> None:
    """They differ in what they make of the moments, not in what passes the layers."""
    batches = randn(23, 3, 6, 6).split(8)
    counts = []
    for estimator in ("pooled", "batch-mean"):
        model = network()
        seen: list[Tensor] = []
        model.last.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].clone()))
        report = refresh_batch_norm(model, batches, estimator=estimator)
        counts.append(([layer.count for layer in report.statistics.values()], seen))
    assert counts[0][0] == counts[1][0]
    assert all(map(torch.equal, counts[0][1], counts[1][1]))


def test_of_one_batch_both_estimators_give_the_same() -> None:
    pooled, mean = network(), network()
    refresh_batch_norm(pooled, [randn(9, 3, 6, 6)])
    refresh_batch_norm(mean, [randn(9, 3, 6, 6)], estimator="batch-mean")
    for (name, layer), (_, other) in zip(norms(pooled), norms(mean), strict=True):
        if name != "twice":
            assert torch.equal(layer.running_mean, other.running_mean)
            assert torch.equal(layer.running_var, other.running_var)


# -- Half precision and mixed precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["pooled", "batch-mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_models_of_any_precision_are_measured_in_float64(dtype: torch.dtype, estimator: str) -> None:
    """At every layer, over the activations that torch itself shows it in train mode."""
    model, reference = network(dtype), network(dtype).train()
    batches = randn(20, 3, 6, 6).to(dtype).split([9, 8, 3])
    seen: dict[str, list[Tensor]] = {}
    for name, layer in norms(reference):
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0]))
    with torch.no_grad():
        for batch in batches:
            reference(batch)

    report = refresh_batch_norm(model, batches, estimator=estimator)

    for name, layer in norms(model):
        parts = [all_at_once(part) for part in seen[name]]
        if estimator == "pooled":
            mean, variance = all_at_once(torch.cat([part.transpose(0, 1).flatten(1).t() for part in seen[name]]))
        else:
            mean, variance = (torch.stack(each).mean(0) for each in zip(*parts, strict=True))
        assert_close(report.statistics[name].mean, mean)
        assert_close(report.statistics[name].variance, variance)
        assert layer.running_mean.dtype == layer.running_var.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=half_a_step, atol=1e-7)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=half_a_step, atol=1e-7)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_measures_what_autocast_shows_the_layers(amp: str) -> None:
    """Convolutions in half precision, statistics in float64, buffers in float32; and autocast ends with the refresh."""
    model, reference = network(), network().train()
    batches = randn(20, 3, 6, 6).split([9, 8, 3])
    seen: dict[str, list[Tensor]] = {}
    reference.first[1].register_forward_pre_hook(lambda _, given: seen.setdefault("first.1", []).append(given[0]))
    with torch.no_grad(), torch.autocast("cpu", getattr(torch, amp)):
        for batch in batches:
            reference(batch)
    assert seen["first.1"][0].dtype == getattr(torch, amp)

    report = refresh_batch_norm(model, batches, amp=amp)
    assert report.amp == amp
    assert not torch.is_autocast_enabled("cpu")
    assert_measured(report.statistics["first.1"], torch.cat(seen["first.1"]))
    full = network()
    refresh_batch_norm(full, batches)
    for (_, layer), (_, other) in zip(norms(model), norms(full), strict=True):
        assert layer.running_mean.dtype == torch.float32
        torch.testing.assert_close(layer.running_var, other.running_var, rtol=0.05, atol=0.02)
        assert not torch.equal(layer.running_var, other.running_var)


def test_mixed_precision_ends_when_the_loader_raises() -> None:
    def loader() -> Iterator[Tensor]:
        yield randn(4, 3, 6, 6)
        raise OSError

    with pytest.raises(UserCodeError):
        refresh_batch_norm(network(), loader(), amp="bfloat16")
    assert not torch.is_autocast_enabled("cpu")


# -- Layers and models of other kinds ---------------------------------------------------------------------------------


def test_lazy_layers_without_weights_are_refused_and_stay_lazy() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(UserCodeError, match=r"lazy tensors without a shape: '0\.weight'.*Load the weights first"):
        refresh_batch_norm(model, [randn(4, 3, 6, 6)])
    assert model[1].has_uninitialized_params()


def test_lazy_layers_with_loaded_weights_are_measured() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    model.load_state_dict(made.state_dict())
    batches = randn(9, 3, 6, 6).split(4)
    ours = refresh_batch_norm(model, batches).statistics["1"]
    expected = refresh_batch_norm(made, batches).statistics["1"]
    assert torch.equal(ours.mean, expected.mean)
    assert torch.equal(ours.variance, expected.variance)
    assert torch.equal(model[1].running_var, made[1].running_var)


def test_a_hook_of_the_user_that_changes_the_input_counts() -> None:
    """What is measured is what the layer normalises."""
    layer = nn.BatchNorm1d(3)
    layer.register_forward_pre_hook(lambda module, arguments: (5 * arguments[0] - 1,))
    measured = refresh_batch_norm(nn.Sequential(layer), [randn(8, 3)]).statistics["0"]
    assert_measured(measured, 5 * randn(8, 3) - 1)


def test_a_layer_under_two_names_is_measured_once_and_frozen_by_its_first() -> None:
    """Its second name is refused: if it were ignored, a layer that should be frozen would be measured."""

    first, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model = model_of(lambda model, values: model.c(model.b(model.a(values))), a=first, b=first, c=other)
    measured = refresh_batch_norm(copy.deepcopy(model), [randn(8, 3)])
    assert list(measured.statistics) == ["a", "c"]
    assert measured.used_twice == ("a",)
    with pytest.raises(UsageError, match=r"got 'b'.*The model has 'a', 'c'"):
        refresh_batch_norm(model, [randn(8, 3)], frozen=["b"])
    assert list(refresh_batch_norm(model, [randn(8, 3)], frozen=["a"]).statistics) == ["c"]
    assert model.a.num_batches_tracked.item() == 0


def test_a_layer_of_which_only_the_buffers_are_used_is_unreached() -> None:
    """`F.batch_norm(x, layer.running_mean, …)` bypasses the layer: its hook sees nothing."""

    def forward(model: Any, values: Tensor) -> Tensor:
        mean, variance = model.fused.running_mean, model.fused.running_var
        return nn.functional.batch_norm(model.seen(values), mean, variance, training=model.training)

    model = model_of(forward, seen=nn.BatchNorm1d(3), fused=nn.BatchNorm1d(3))
    with pytest.raises(UserCodeError, match="no batch reaches the BatchNorm layers 'fused'"):
        refresh_batch_norm(model, [randn(8, 3)])
    assert model.seen.running_mean.tolist() == [0.0, 0.0, 0.0]


def test_a_forward_that_reads_the_running_mean_ends_with_the_right_statistics() -> None:
    means: list[Tensor] = []

    def forward(model: Any, values: Tensor) -> Tensor:
        values = model.norm(values)
        means.append(model.norm.running_mean.clone())
        return values

    model = model_of(forward, norm=nn.BatchNorm1d(3))
    batches = randn(8, 3).split(4)
    refresh_batch_norm(model, batches)
    assert_close(model.norm.running_mean, all_at_once(randn(8, 3))[0].float())
    for batch, read in zip(batches, means, strict=True):
        assert_close(read, all_at_once(batch)[0].float())  # that of the batch, while it passes


class Renamed(nn.BatchNorm1d):
    """A subclass whose forward has another name for its argument."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values)


@pytest.mark.parametrize(("make", "keyword"), [(nn.BatchNorm1d, "input"), (Renamed, "values")])
def test_a_layer_called_by_a_keyword_is_measured(make: Callable[..., nn.Module], keyword: str) -> None:
    model = model_of(lambda model, values: model.norm(**{keyword: values}), norm=make(3))
    assert_measured(refresh_batch_norm(model, [randn(8, 3)]).statistics["norm"], randn(8, 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_measures_each_batch_once(reentrant: bool) -> None:
    model = model_of(
        lambda model, values: checkpoint(model.norm, values, use_reentrant=reentrant), norm=nn.BatchNorm1d(3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no gradients
        measured = refresh_batch_norm(model, [randn(8, 3)]).statistics["norm"]
    assert (measured.calls_per_batch, measured.count) == (1, 8)


def test_data_parallel_without_devices_is_measured() -> None:
    model = nn.DataParallel(network())
    batches = randn(20, 3, 6, 6).split(8)
    report = refresh_batch_norm(model, batches)
    expected = refresh_batch_norm(network(), batches)
    for name, layer in expected.statistics.items():
        assert torch.equal(report.statistics[f"module.{name}"].mean, layer.mean)
        assert torch.equal(report.statistics[f"module.{name}"].variance, layer.variance)


@pytest.mark.filterwarnings("default")  # of torch's own about itself
@pytest.mark.parametrize("has_run", [False, True], ids=["not yet run", "run in eval mode"])
def test_a_compiled_model_is_measured_like_any_other(has_run: bool) -> None:
    """The graph of a model that has run in evaluation mode would be used again, without the hooks."""
    torch._dynamo.reset()
    inner = network()
    model = torch.compile(inner, backend="eager")
    batches = randn(16, 3, 6, 6).split(8)
    if has_run:
        with torch.no_grad():
            model.eval()(batches[0])
    report = refresh_batch_norm(model, batches)
    expected = refresh_batch_norm(network(), batches)
    for name, layer in expected.statistics.items():
        assert_close(report.statistics[f"_orig_mod.{name}"].mean, layer.mean, 1e-6)
        assert_close(report.statistics[f"_orig_mod.{name}"].variance, layer.variance, 1e-5)
    with torch.no_grad():  # and what is compiled uses them afterwards
        assert_close(model.eval()(batches[0]), inner(batches[0]), 1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("default")  # TorchScript is deprecated
def test_a_scripted_model_is_no_model_without_statistics() -> None:
    """Its layers are no BatchNorm modules to Python, and have no hooks."""
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(UserCodeError, match=r"'1'.*TorchScript"):
        refresh_batch_norm(model, [randn(8, 3)])


@pytest.mark.filterwarnings("default")  # TorchScript is deprecated
def test_a_scripted_part_without_statistics_is_run_like_any_other() -> None:
    """Its modules keep their buffers in a wrapper that has not all methods of a dict."""
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    measured = refresh_batch_norm(model, [randn(8, 3)]).statistics["1"]
    with torch.no_grad():
        assert_close(measured.mean, all_at_once(model[0](randn(8, 3)))[0])
    assert all(module.training for module in model.modules())


def test_two_layers_that_share_their_buffers_are_refused() -> None:
    """One buffer cannot hold the statistics of both."""

    model = model_of(lambda model, values: model.b(5 * model.a(values)), a=nn.BatchNorm1d(3), b=nn.BatchNorm1d(3))
    model.b.running_mean, model.b.running_var = model.a.running_mean, model.a.running_var
    with pytest.raises(UserCodeError, match=r"'a'.*'b'|'b'.*'a'"):
        refresh_batch_norm(model, [randn(8, 3)])
