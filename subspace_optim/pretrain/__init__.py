"""The main job: pretrain a LLaMA on real text under any of the optimizers."""
