import dataclasses

import pytest
import torch

from routing import RouterConfig, Routing, token_rounding, top_k


def same(a: Routing, b: Routing) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3:] == b[3:]


def test_every_setting_reaches_the_router() -> None:
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 8)
    scoring = {
        "scoring": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "num_groups": 4,
        "groups_per_token": 2,
        "group_score": "max",
    }
    config = RouterConfig(k=3, **scoring)
    config.validate(8)
    assert same(config.route(logits, selection_bias=bias), top_k(logits, 3, selection_bias=bias, **scoring))
    config = RouterConfig(k=3, method="token_rounding", tile_m=4, mode="stochastic", **scoring)
    config.validate(8)
    got = config.route(logits, selection_bias=bias, generator=torch.Generator().manual_seed(5))
    expected = token_rounding(logits, 3, 4, "stochastic", selection_bias=bias, generator=torch.Generator().manual_seed(5), **scoring)
    assert same(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "hash"}, "method='hash': must be one of top_k, token_rounding"),
        ({"k": 9}, "k=9: must be between 1 and the number of experts, 8"),
        ({"scoring": "x"}, "scoring='x': must be one of"),
        ({"num_groups": 3}, "num_groups=3: must be at least 1 and divide"),
        ({"tile_m": 0}, "tile_m=0: must be at least 1"),
        ({"mode": "x"}, "mode='x': must be one of"),
    ],
)
def test_invalid_settings_are_refused_by_name(change: dict, message: str) -> None:
    config = RouterConfig(**{"k": 2, "method": "token_rounding", **change})
    with pytest.raises(ValueError, match=message):
        config.validate(8)
    with pytest.raises(ValueError, match=message):
        config.route(torch.zeros(4, 8))


def test_settings_cannot_change_after_validation() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RouterConfig(k=2).k = 3
