import importlib

import pytest
import torch

from dispatch import debug


def test_checks_hold_inside_the_block_only() -> None:
    with debug.checks(False):
        with debug.checks():
            assert debug.enabled()
        assert not debug.enabled()


def test_switch_returns_to_its_state_after_an_error() -> None:
    with debug.checks(False):
        with pytest.raises(ValueError, match="wrong"), debug.checks():
            debug.check_values(torch.tensor([True, False]), "wrong")
        assert not debug.enabled()


def test_check_passes_where_all_values_hold() -> None:
    debug.check_values(torch.tensor([True, True]), "wrong")
    debug.check_values(torch.empty(0, dtype=torch.bool), "wrong")


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False), (None, False)])
def test_environment_sets_the_switch(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("SONICMOE_DEBUG", raising=False)
    else:
        monkeypatch.setenv("SONICMOE_DEBUG", value)
    try:
        assert importlib.reload(debug).enabled() == expected
    finally:
        monkeypatch.undo()
        importlib.reload(debug)
