"""The plot of real work, from the table in benchmarks/README.md: `python docs/_plots.py`, with matplotlib.

The others are those that `make bench` leaves in benchmarks/results/.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| ((?:aneuron|infinity)[^|]*?) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", re.MULTILINE)
rows = [
    (name, float(bulk), float(callers))
    for name, bulk, callers in ROW.findall((ROOT / "benchmarks/README.md").read_text())
]

figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained", facecolor="white")
for i, (name, *values) in enumerate(rows):
    for value, place, faint, label in zip(
        values, (-0.19, 0.19), (0.45, 1.0), ("in bulk", "64 callers, one by one"), strict=True
    ):
        color = "#0b62c4" if name.startswith("aneuron") else "#888888"
        axes.barh(i + place, value, 0.36, color=color, alpha=faint, label=label if i == len(rows) - 1 else None)
        axes.text(value + 0.03, i + place, f"{value:.2f}", va="center", fontsize=9)
axes.axvline(1, color="black", linestyle=":", linewidth=1, label="sentence-transformers")
axes.set_yticks(range(len(rows)), [name.split(" (")[0] for name, *_ in rows])
axes.invert_yaxis()
axes.set(
    xlabel="docstrings a second, beside sentence-transformers", title="all-MiniLM-L6-v2, float32, two CPUs with AVX2"
)
axes.set_xlim(right=1.1 * max(max(values) for _, *values in rows))
axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
axes.set_axisbelow(True)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper right")
figure.savefig(ROOT / "docs/assets/benchmarks/docstrings.png", dpi=120)
