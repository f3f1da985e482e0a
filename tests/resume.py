"""Run by test_state.py in a new process: continue every checkpoint of a folder and save where the weights end."""

import sys
from pathlib import Path

import torch
from training import ALL_METHODS, build, net, snapshot, train


def main(folder: Path) -> None:
    methods = {str(method): method for method in ALL_METHODS}
    torch.set_num_threads(1)
    for path in sorted(folder.glob("*.ckpt")):
        saved = torch.load(path)
        params = net(saved["dtype"])
        params.load_state_dict(saved["weights"])
        opt = build(methods[saved["method"]], params)
        opt.load_state_dict(saved["optimizer"])
        train(params, opt, saved["steps"])
        torch.save(snapshot(params), path.with_suffix(".end"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
