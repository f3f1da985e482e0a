"""A real LLaMA of a few thousand parameters, real token rows, and a Trainer of both."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS, HALF = 6, 3


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def rows(count=64):
    """Each token is the one before plus one, modulo 32: something to learn in a few steps."""
    tokens = (torch.randint(0, 32, (count, 1), generator=torch.Generator().manual_seed(1)) + torch.arange(12)) % 32
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, **settings):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": HALF,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**defaults | settings)


def trainer(args, optimizer=None, model=None):
    """A Trainer; `optimizer` is its `optimizer_cls_and_kwargs`."""
    return Trainer(model=model or llama(), args=args, train_dataset=rows(), optimizer_cls_and_kwargs=optimizer)


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}
