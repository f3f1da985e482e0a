"""DoRA adapters under GradNormLoRP: frozen weights are left out, A and B are projected, magnitudes are dense."""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import subspace_optim as so

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
adapters = peft.LoraConfig(r=16, target_modules="all-linear", use_dora=True)
model = peft.get_peft_model(LlamaForCausalLM(config), adapters)
optimizer = so.create(model, "gradnormlorp", rank=8, lr=0.01)
print(optimizer.summary())  # an adapter whose r is not larger than the rank would be dense, and the table would say so

tokens = torch.randint(0, 64, (4, 16))
for _ in range(4):
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
