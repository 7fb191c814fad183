"""Exchange the experts of a Mixtral model for sonicmoe's and see that it is the same model.

Random weights by default; with --model, a checkpoint in a folder. Needs: pip install 'sonicmoe[transformers]'
"""

import argparse
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from sonicmoe.integrations.transformers import swap


def make_model(folder: str | None, device: str, dtype: torch.dtype) -> MixtralForCausalLM:
    if folder:
        model = MixtralForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    else:
        config = MixtralConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
        # transformers' initial weights are so small that experts hardly matter to the logits.
        config.initializer_range = 0.1
        model = MixtralForCausalLM(config).to(dtype)
        model.set_experts_implementation("eager")
    return model.to(device).eval()


@torch.inference_mode()
def logits_and_seconds(model: MixtralForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of a second call: the first one also loads kernels."""
    model(tokens)
    begin = time.perf_counter()
    logits = model(tokens).logits.float().cpu()
    return logits, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="a Mixtral checkpoint (default: a small model with random weights)")
    parser.add_argument("--tokens", type=int, default=256, help="length of the prompt (default: 256)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(args.model, args.device, getattr(torch, args.dtype))
    tokens = torch.randint(model.config.vocab_size, (1, args.tokens), device=args.device)

    expected, eager_seconds = logits_and_seconds(model, tokens)
    swap(model)
    got, seconds = logits_and_seconds(model, tokens)

    error = (torch.linalg.norm(got - expected) / torch.linalg.norm(expected)).item()
    print(f"eager experts {eager_seconds * 1e3:.1f} ms, sonicmoe's {seconds * 1e3:.1f} ms for {args.tokens} tokens")
    print(f"relative difference of the logits: {error:.1e}")
    print("next tokens:", model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, -8:].tolist())


if __name__ == "__main__":
    main()
