"""The optimizers written from the mathematics alone, in NumPy float64.

Nothing here may import `subspace_optim` or `torch`: an oracle that shares code with what it judges judges nothing.
Each class keeps the paper's symbols; `official=True` follows the authors' code where it departs from ours
(ALGORITHMS.md section 8, right column).
"""
