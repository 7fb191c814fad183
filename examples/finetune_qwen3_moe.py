"""Train a small Qwen3-MoE with random weights on the text of `sonicmoe train`, with the transformers Trainer.

Needs: pip install 'sonicmoe[transformers]' accelerate
"""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

import sonicmoe.integrations.transformers
from sonicmoe.training import text


class Windows(Dataset):
    """Disjoint windows of a text whose vocabulary is the 256 byte values."""

    def __init__(self, tokens: torch.Tensor, context: int, most: int) -> None:
        self.windows, _ = text.validation_windows(tokens, context=context, max_windows=most)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def make_model(context: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=context,
        # Adds the router's load balance loss, as in training from scratch it must.
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        experts_implementation=sonicmoe.integrations.transformers.NAME,
    )
    return Qwen3MoeForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="PATH", help="text file, or a folder of them (default: pydoc_data.topics)")
    parser.add_argument("--out", metavar="DIR", default="out/qwen3_moe", help="folder for the trained model (default: out/qwen3_moe)")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--context", type=int, default=128, help="bytes in a window (default: 128)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows in a step (default: 16)")
    args = parser.parse_args()
    torch.manual_seed(0)
    data = text.load(args.data, args.context)
    trainer = Trainer(
        model=make_model(args.context),
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=3e-3,
            warmup_steps=args.steps // 10,
            logging_steps=max(args.steps // 10, 1),
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=Windows(data.train, args.context, args.steps * args.batch_size),
        eval_dataset=Windows(data.validation, args.context, 64),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"validation loss {before:.3f} before, {after:.3f} after {args.steps} steps: nats a byte, plus the load balance loss")


if __name__ == "__main__":
    main()
