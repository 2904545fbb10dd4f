"""
How far each solver lands from the converged solution under classifier-free guidance, at equal numbers of model calls.

    python benchmarks/guided_solver_error.py

measures what solver_error.py measures, in the same way, on guided paths of the packaged class-conditional checkpoint,
for several scales w of ε_null + w (ε_class − ε_null). A call is one of the pipeline's, with both branches. Writes
`benchmarks/results/guided_solver_error.json`, `guided_solver_error.md`, and `guided_solver_error.png`: the first of
the noises that errors are stated on, through each solver on its best grid, below the converged solutions.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from solver_error import (
    OWN,
    begin,
    converged,
    explanation,
    in_order,
    measure,
    noises_of,
    packaged,
    parser_of,
    run,
    scheduler_of,
    table_of,
)

NAME = "guided_solver_error"
SOLVERS = ["DDIM", "DEIS-3", "DPM-Solver++(2M)", "UniPC-2", "UniPC-3"]
SOLVERS += ["GENIE, head-free", "GENIE order 2, head-free"]
SOLVERS += ["GENIE Taylor + derivative head", "GENIE Hermite + derivative head"]
SOLVERS += ["GENIE, tables alone", "GENIE, step head"]
#: what the picture shows: solvers, numbers of calls, noises of each scale
SHOWN = ("DDIM", "DEIS-3", "DPM-Solver++(2M)", "UniPC-2", "GENIE, head-free", "GENIE, step head")
SHOWN_CALLS, COLUMNS = ("8", "10"), 5


@torch.no_grad()
def draw_pictures(errors: dict, args: argparse.Namespace, path: Path):
    """A row for the converged solutions and each solver and number of calls, a block of columns for each scale."""
    unets, sources, config = packaged()
    rows = [(name, calls) for calls in SHOWN_CALLS for name in SHOWN]
    figure = Figure(figsize=(2.3 + 0.6 * COLUMNS * len(errors), 0.4 + 0.77 * (1 + len(rows))), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.01, wspace=0.0, hspace=0.0)
    axes = figure.subplots(
        1 + len(rows), len(errors), squeeze=False, subplot_kw={"xticks": [], "yticks": [], "frame_on": False}
    )
    for column, (scale, of_solvers) in zip(axes.T, errors.items(), strict=True):
        noises = noises_of(unets[None], args.noises, args.seed + 1, float(scale))[:COLUMNS]
        show(column[0], converged(unets[None], config, noises)[:, 1])
        column[0].set_title(f"w = {scale}", fontsize=10)
        for axis, (name, calls) in zip(column[1:], rows, strict=True):
            cell = of_solvers.get(name, {}).get(calls)
            if cell is None:
                continue
            scheduler = scheduler_of(name, config, cell["grid"], cell["steps"], sources)
            show(axis, run(unets[OWN.get(name, {}).get("source")], scheduler, noises))
            axis.set_xlabel(f"{cell['error']:.3f}", fontsize=8, labelpad=1)
    labels = ["converged", *(f"{name}, {calls} calls" for name, calls in rows)]
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, rotation="horizontal", ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=100)


def show(axis, pictures: torch.Tensor):
    strip = torch.cat(list(pictures), dim=2).permute(1, 2, 0)
    axis.imshow((strip / 2 + 0.5).clamp(0, 1).numpy(), interpolation="nearest")


def main(argv: list[str] | None = None):
    parser = parser_of(__doc__, [5, 8, 10], SOLVERS)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    args = parser.parse_args(argv)
    report = begin(args, f"python benchmarks/{NAME}.py", NAME)
    path, errors = args.output_dir / NAME, report["errors"]
    for scale in args.guidance_scales:
        measure(errors.setdefault(f"{scale:g}", {}), args, scale)
        errors[f"{scale:g}"] = in_order(errors[f"{scale:g}"])
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    report["errors"] = errors = {scale: errors[scale] for scale in sorted(errors, key=float)}
    tables = [f"## w = {scale}\n\n{table_of(rows, args.calls)}" for scale, rows in errors.items()]
    text = "\n\n".join([explanation(report["command"], report["settings"]), *tables]) + "\n"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    print(text)
    draw_pictures(errors, args, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
