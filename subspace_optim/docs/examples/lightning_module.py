"""GaLore in a LightningModule: accumulation, clipping and a schedule are Lightning's own."""

import lightning
import torch
from torch import nn

import subspace_optim as so


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def training_step(self, batch, index):
        (x,) = batch
        return nn.functional.mse_loss(self.net(x), x)

    def configure_optimizers(self):
        optimizer = so.create(self.net, "galore", rank=8, lr=0.01, weight_decay=0.1)
        print(optimizer.summary())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 16)), batch_size=8)
trainer = lightning.Trainer(
    max_epochs=1,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Regression(), data)
assert type(trainer.optimizers[0]) is so.GaLore
