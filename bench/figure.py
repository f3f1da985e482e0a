"""The figure of a record: where the time of a step goes, in units of a step of fused AdamW.

python -m bench.figure results/<record>.json        draws it anew
"""

import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BYTES, FLOPS, REST, TEXT = "#2b6cb0", "#dd8833", "#d4d8dd", "#555555"
REACH = 12  # × fused AdamW: what takes longer is cut off, and says how long it takes


def draw(record, path):
    """Write it to `path`; the suffix chooses the format."""
    rows = sorted(record["arms"].items(), key=lambda item: -item[1]["ratio"])
    unit = rows[-1][1]["step_ms"] / rows[-1][1]["ratio"]  # of fused AdamW
    reach = min(REACH, 1.02 * rows[0][1]["ratio"])
    names = [name for name, _ in rows]
    options, limit = record["options"], record["limit"]
    with rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "bench"}):
        figure = Figure(figsize=(9, 1.6 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(names, [min(row["ratio"], reach) for _, row in rows], color=REST, label="more than the limit")
        left = [0.0] * len(rows)
        for key, colour, text in (("bytes_ms", BYTES, "bytes / bandwidth"), ("flops_ms", FLOPS, "FLOPs / rate")):
            widths = [row[key] / unit for _, row in rows]
            axes.barh(names, widths, left=left, color=colour, label=text)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for at, ((name, row), label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            text = f" {'→ ' * (row['ratio'] > reach)}{row['ratio']:.2f}  ({row['of_limit']:.1f} × limit)"
            axes.text(min(max(row["ratio"], left[at]), reach), at, text, va="center", fontsize=8, color=TEXT)
            label.set_color(TEXT if name.startswith(("torch", "peer")) else "black")
        axes.set_xlim(0, 1.25 * reach)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("time of an ordinary step, × torch's fused AdamW")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(
            f"{options['model']}, {options['dtype']}, rank {record['rank']}, {options['threads']} thread(s), "
            f"commit {record['machine']['commit']}\n{record['machine']['cpu']}: {limit['bandwidth'] / 1e9:.1f} GB/s, "
            f"{limit['rate'] / 1e9:.0f} GFLOP/s",
            loc="left",
            fontsize=9,
        )
        axes.legend(loc="upper right", frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    return path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(json.loads(Path(name).read_text()), Path(name).with_suffix(".svg")))
