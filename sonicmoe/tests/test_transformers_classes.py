"""Every experts class that the installed transformers lets one exchange is computed exactly, or refused: none is approximated."""

import importlib
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from sonicmoe.integrations import transformers as integration  # noqa: E402

EXPERTS, H, I = 8, 32, 24

# Gate functions of their own, and a norm behind the experts.
REFUSED = {
    "BeamExperts",
    "DeepseekV4Experts",
    "Glm5NextTextExperts",
    "HYV4Experts",
    "Inkling2Experts",
    "MiniMaxM3VLExperts",
    "MuseSparkExperts",
    "OpenAIPrivacyFilterExperts",
}


class AnyConfig:
    """A config of whatever model: sizes by what their names have in common."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name:
            return "silu"
        if re.fullmatch(r"(num|n)_(local_|routed_)*experts", name):
            return EXPERTS
        if "intermediate" in name:
            return I
        if "latent" in name:
            return None
        return {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "rms_norm_eps": 1e-6}.get(name, H)


def experts_classes():
    pattern = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in pattern.findall(path.read_text()):
            yield getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)


def test_every_experts_class_is_exact_or_refused():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, H, generator=generator)
    weights, index = torch.randn(6, EXPERTS, generator=generator).softmax(1).topk(2)
    errors, refused = {}, set()
    for cls in experts_classes():
        experts = cls(AnyConfig())
        for parameter in experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        try:
            got = integration.experts_forward(experts, x, index, weights)
        except ValueError:
            refused.add(cls.__name__)
            continue
        expected = cls.forward.__wrapped__(experts, x, index, weights)
        errors[cls.__name__] = (torch.linalg.norm(got - expected) / torch.linalg.norm(expected)).item()
    assert len(errors) >= 45
    assert refused <= REFUSED
    assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}
