"""A whole training step, with gradients projected within backward or not, beside fused AdamW at an equal batch.

    python -m bench.backward [--model 60m] [--batch 2] [--seq 256] [--rounds 5]

Forward, backward, clipping, step, zero_grad of a real LLaMA; time and peak bytes as in bench.run. No basis is renewed.
"""

import argparse
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import subspace_optim as so
from subspace_optim.pretrain.machine import peak_bytes

from .arms import BASELINE, MODELS, NEVER
from .measures import RESULTS, machine, timed, written

PATHS = {  # proj_type, and how project_in_backward is called
    "galore": ("std", None),
    "galore hooks": ("std", {}),
    "galore linear": ("std", {"linear": True}),
    "galore right": ("right", None),
    "galore right linear": ("right", {"linear": True}),
}
BOUND = 1e-4  # float32 weights of about 0.02 after three steps of 1e-4, against the ordinary path


def llama(name, dtype):
    hidden, wide, layers, vocabulary, rank = MODELS[name]
    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 64 or 1, "num_hidden_layers": layers, "use_cache": False}
    shape = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide, **heads)
    return LlamaForCausalLM(shape).to(dtype).train(), rank


def training_step(arm, options, tokens):
    """A model of its own and the call that trains it by one step; its bases are set."""
    model, rank = llama(options.model, getattr(torch, options.dtype))
    if arm == BASELINE:
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), 1.0)
    else:
        proj_type, how = PATHS[arm]
        opt = so.create(model, "galore", rank=rank, lr=1e-4, update_proj_gap=NEVER, proj_type=proj_type, stagger=False)
        if how is not None:
            so.project_in_backward(model, opt, **how)
        clip = partial(opt.clip_grad_norm_, 1.0)

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        clip()
        opt.step()
        opt.zero_grad()

    step()
    return model, step


def held(model):
    """Bytes of the weights."""
    return sum(p.nbytes for p in model.parameters())


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.backward", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="1 measures CPU time; more measure the wall clock")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    vocabulary = MODELS[options.model][3]
    tokens = torch.randint(0, vocabulary, (options.batch, options.seq), generator=torch.Generator().manual_seed(0))
    made = {arm: training_step(arm, options, tokens) for arm in (BASELINE, *PATHS)}
    for _ in range(2):
        for _, step in made.values():
            step()
    failed = {}
    for arm, (proj_type, how) in PATHS.items():
        if how is not None:
            plain = next(other for other, path in PATHS.items() if path == (proj_type, None))
            pairs = zip(made[arm][0].parameters(), made[plain][0].parameters(), strict=True)
            error = max(float((p - q).detach().norm() / q.detach().norm()) for p, q in pairs)
            if not error < BOUND and options.dtype == "float32":
                failed[arm] = error
                print(f"{arm}: parity fails ({error:.1e}, bound {BOUND:.0e}); it is not timed")
    steps = {arm: step for arm, (_, step) in made.items() if arm not in failed}
    clock = time.process_time if options.threads == 1 else time.perf_counter
    taken = timed(steps, options.rounds, clock)
    median = {arm: statistics.median(times) for arm, times in taken.items()}
    weights = held(made[BASELINE][0])
    rows = {
        arm: {"step_ms": median[arm], "ratio": median[arm] / median[BASELINE], "times_ms": taken[arm]}
        | {"peak_bytes": peak_bytes(step)}
        for arm, step in steps.items()
    }
    said = {key: value for key, value in vars(options).items() if key != "out"}
    record = {"options": said, "machine": machine(), "parity_failed": failed, "weight_bytes": weights, "arms": rows}
    about = f"{tokens.numel()} tokens, {options.threads} thread(s); {weights / 2**20:.0f} MiB of weights"
    print(f"\n{options.model}, {options.dtype}, {about}")
    for arm, row in rows.items():
        cells = f"{row['step_ms']:10.0f} ms{row['ratio']:8.3f} × AdamW{row['peak_bytes'] / 2**20:10.1f} MiB"
        print(f"{arm:24}{cells} peak of a step")
    written(options.out, record, platform.machine(), options.model, options.dtype, "backward")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
