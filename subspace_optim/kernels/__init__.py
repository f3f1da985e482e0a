"""Kernels: `reference.py` is the ground truth in torch ops; `select.py` says which implementation runs."""
