"""LitEma of latent diffusion: model_ema.* in a state dict, with names without dots (ldm/modules/ema.py)."""

from typing import Any

_COUNTER = "model_ema.num_updates"


def averaged_weights(state: Any) -> dict[str, object] | None:
    """Returns a state dict with the running averages in it in place of the weights; None if it has none."""
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    counter = next((name for name in names if name.endswith(_COUNTER)), None)
    if counter is None:
        return None
    outside = counter.removesuffix(_COUNTER)
    model, averages = f"{outside}model.", f"{outside}model_ema."
    average_of = {
        name: averages + name.removeprefix(model).replace(".", "") for name in names if name.startswith(model)
    }
    if len(set(average_of.values()) & state.keys()) < sum(name.startswith(averages) for name in names) - 2:
        return None  # other than num_updates and decay
    return {
        name: state.get(average_of.get(name), item)
        for name, item in state.items()
        if not (isinstance(name, str) and name.startswith(averages))
    }
