"""GaLore in a loop of accelerate: accumulation, clipping, and state that is saved and loaded."""

import torch
from accelerate import Accelerator
from torch import nn

import subspace_optim as so

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
optimizer = so.create(model, "galore", rank=8, lr=0.01, weight_decay=0.1)
print(optimizer.summary())
data = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=8)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for x in data:
    with accelerator.accumulate(model):
        accelerator.backward(nn.functional.mse_loss(model(x), x))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
accelerator.save_state("accelerate_state")
accelerator.load_state("accelerate_state")
