"""GaLore in transformers' Trainer, from the Trainer's own arguments."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import subspace_optim as so
from subspace_optim.integrations.transformers import SubspaceFactory, check_trainer

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (32, 16))]
args = TrainingArguments(
    output_dir="hf_trainer",
    max_steps=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=0.01,
    weight_decay=0.1,
    max_grad_norm=1.0,
    optim_target_modules=["self_attn", "mlp"],
    optim_args="rank=8, update_proj_gap=2, scale=0.25",
    use_cpu=True,
    report_to="none",
)
model = LlamaForCausalLM(config)
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=rows,
    optimizer_cls_and_kwargs=(SubspaceFactory, {"name": "galore", "training_args": args, "model": model}),
)
optimizer = check_trainer(trainer)  # raises if a setting of the arguments would be ignored
trainer.train()

assert type(optimizer) is so.GaLore
print(optimizer.summary())
