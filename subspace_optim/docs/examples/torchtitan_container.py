"""torchtitan's own container, schedule and checkpoints around GaLore for the matrices and AdamW for the rest."""

import torch
from torch import nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from subspace_optim.integrations.torchtitan import SubspaceOptimizersContainer

optimizer = SubspaceOptimizersContainer.Config(  # in a torchtitan configuration: Trainer.Config(optimizer=…)
    implementation="for-loop",
    param_groups=[
        ParamGroupConfig(
            pattern=r"layers.*weight",
            optimizer_name="galore",
            optimizer_kwargs={"lr": 0.01, "rank": 8, "weight_decay": 0.1},
        ),
        ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
    ],
)


def job():
    """What torchtitan's Trainer makes of it."""
    model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))})
    optimizers = optimizer.build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=10)
    checkpoints = CheckpointManager.Config(enable=True, interval=5, keep_latest_k=0).build(
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedule,
        states={},
        sd_adapter=None,
    )
    return model, optimizers, schedule, checkpoints


model, optimizers, schedule, checkpoints = job()
for step in range(1, 6):
    x = torch.randn(64, 16)
    nn.functional.mse_loss(model["layers"](x), x).backward()
    optimizers.step()
    schedule.step()
    optimizers.zero_grad()
    checkpoints.save(step)
print(next(iter(optimizers)).summary())

resumed, _, schedule, checkpoints = job()
assert checkpoints.load()
assert schedule.schedulers[0].last_epoch == 5
assert all(map(torch.equal, resumed.parameters(), model.parameters()))
