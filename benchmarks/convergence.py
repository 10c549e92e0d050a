"""How fast the deterministic error falls: "exact", "paper" and "comfyui" against an exact probability flow.

    python -m benchmarks.convergence [--count 512] [--json FILE]
    python -m benchmarks.convergence --peers 20

Three tables.  Observed order: least squares of log error over log steps on Gaussian data (the flow is known in closed form),
equal steps of log lambda from 10 to 0.1, from an ordinary start and with the first evaluations exact.  64 steps on a mixture
with well separated parts.  Digits: 1797 handwritten digits as a mixture, by steps, median and RMS over starting points.

With --peers another table alone: what makes the RMS error on the digits (Karras) with so many steps, for every noise-free
sampler that calls the model once a step: with and without the share `WORST` of the starting points at which it is worst.
"""
from __future__ import annotations

import argparse
import json

import numpy as np
import torch

import ersde
from tests.problems import digits, flow_exact, flow_schedule, gaussian, karras, rms, separated

KINDS = {"exact": {}, "exact, no corrector": {"corrector": False}, "exact, order 2": {"order": 2},
         "paper": {"method": "paper"}, "comfyui": {"method": "comfyui"}}


def run(model, x, sigmas, **kw):
    """The ODE member."""
    return ersde.sample_er_sde(model, x, torch.as_tensor(sigmas), eta=0.0, disable=True, process=model.process, **kw)


def order_table(counts=(32, 64, 128, 256, 512)):
    """Process -> kind -> observed order from an ordinary start."""
    table = {}
    for process in ("ve", "flow"):
        model = gaussian(0.5, 0.3, process=process)
        lam = {n: 10 * 0.01 ** np.linspace(0, 1, n + 1) for n in counts}
        sigmas = {n: v if process == "ve" else v / (1 + v) for n, v in lam.items()}
        x = model.start(16, sigmas[counts[0]][0], torch.Generator().manual_seed(0))
        exact = flow_exact(model, x, torch.tensor(sigmas[counts[0]]))
        kinds = {f"exact, order {k}{'' if c else ', no corrector'}": {"order": k, "corrector": c}
                 for k in (1, 2, 3) for c in (False, True)}
        for name, kw in {**kinds, "paper": {"method": "paper"}, "comfyui": {"method": "comfyui"}}.items():
            errors = [rms(run(model, x, sigmas[n], **kw), exact) for n in counts]
            table.setdefault(name, {})[process] = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    return table


def mixture_table():
    """Process -> kind -> RMS error over comfyui's, 64 steps, 200 starting points."""
    table = {}
    for process in ("ve", "flow"):
        model = separated(process)
        sigmas = torch.tensor(np.geomspace(10, 0.1, 65) if process == "ve" else np.linspace(0.97, 0.05, 65))
        x = model.start(200, sigmas[0].item(), torch.Generator().manual_seed(0))
        exact = flow_exact(model, x, sigmas)
        errors = {name: rms(run(model, x, sigmas, **kw), exact) for name, kw in KINDS.items()}
        for name, error in errors.items():
            table.setdefault(name, {})[process] = {"rms": error, "over_comfyui": error / errors["comfyui"]}
    return table


WORST = 0.01         # of the starting points, in the table of `--peers`


def peers_table(steps, seeds=512):
    """Sampler -> its errors on the digits under Karras' schedule, one per starting point, best RMS first."""
    from . import quality

    model, sigmas = digits("ve"), karras(steps)
    x = model.start(seeds, sigmas[0].item(), torch.Generator().manual_seed(1))
    exact = flow_exact(model, x, sigmas, steps=250)
    kinds = {f"exact, order {k}": {"order": k} for k in (2, 3, 4, 5)}
    kinds.update({name: KINDS[name] for name in ("paper", "comfyui")})
    found = {name: run(model, x, sigmas, **kw) for name, kw in kinds.items()}
    for method in quality.methods():
        if method.family in (quality.KDIFFUSION, quality.AZULA) and not method.noisy and method.calls_per_step == 1:
            found[method.name] = method.run(model, x, sigmas, None, None)
    errors = {name: ((out - exact) ** 2).mean(1).sqrt().numpy() for name, out in found.items()}
    return dict(sorted(errors.items(), key=lambda item: (item[1] ** 2).mean()))


def print_errors(errors, unit, title):
    """A table of errors per starting point, over those of the row `unit`."""
    base = errors[unit]
    worst = max(1, round(WORST * len(base)))

    def root(e):
        return float(np.sqrt((e ** 2).mean()))

    def rest(e):
        return root(np.sort(e)[:-worst])

    print(f"{title}\n\n| sampler | RMS (95 %) | RMS without the {worst} worst points of each | their share in the sum of "
          "squares | mean | median | points off by more than 0.1 |\n|" + "---|" * 7)
    for name, e in errors.items():
        share, (low, high) = float((np.sort(e)[-worst:] ** 2).sum() / (e ** 2).sum()), interval(e, base)
        mean, median = e.mean() / base.mean(), np.median(e) / np.median(base)
        print(f"| {name} | {root(e) / root(base):.2f} ({low:.2f} to {high:.2f}) | {rest(e) / rest(base):.2f} | "
              f"{share:.0%} | {mean:.2f} | {median:.2f} | {int((e > 0.1).sum())} |")


def interval(errors, base, resamples=1000):
    """95 % interval of the ratio of two RMS errors by bootstrap over the starting points, the same in both."""
    rows = np.random.default_rng(0).integers(len(errors), size=(resamples, len(errors)))
    ratios = np.sqrt((errors[rows] ** 2).mean(1) / (base[rows] ** 2).mean(1))
    return [float(q) for q in np.quantile(ratios, (0.025, 0.975))]


def digits_table(counts=(5, 6, 8, 10, 15, 20, 30, 50), seeds=512):
    """Process -> steps -> kind -> median and RMS over starting points of the error, its RMS over comfyui's and interval."""
    table, found = {}, {}
    for process in ("ve", "flow"):
        model = digits(process)
        for n in counts:
            sigmas = karras(n) if process == "ve" else flow_schedule(n)
            x = model.start(seeds, sigmas[0].item(), torch.Generator().manual_seed(1))
            span = process, round(sigmas[-2].item(), 9)
            if span not in found:
                found[span] = flow_exact(model, x, sigmas, steps=250)
            errors = {name: ((run(model, x, sigmas, **kw) - found[span]) ** 2).mean(1).sqrt().numpy()
                      for name, kw in KINDS.items()}
            total = {name: float(np.sqrt((e ** 2).mean())) for name, e in errors.items()}
            table.setdefault(process, {})[n] = {
                name: {"median": float(np.median(e)), "rms": total[name], "over_comfyui": total[name] / total["comfyui"],
                       "interval": interval(e, errors["comfyui"])} for name, e in errors.items()}
    return table


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=512, help="starting points on the digits")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--peers", type=int, metavar="STEPS", help="all noise-free samplers on the digits, and nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peers:
        print_errors(peers_table(args.peers, args.count), "comfyui",
                     f"Digits, ve, Karras, {args.peers} steps, N = {args.count}, over comfyui's")
        return
    result = {"torch": torch.__version__}
    print("Observed order on Gaussian data, 32 to 512 steps, ordinary start\n\n| method | ve | flow |\n|---|---|---|")
    result["order"] = order_table()
    for name, row in result["order"].items():
        print(f"| {name} | {row['ve']:.2f} | {row['flow']:.2f} |")
    print("\nSeparated mixture, 64 steps, N = 200: RMS error (over comfyui's)\n\n| method | ve | flow |\n|---|---|---|")
    result["mixture"] = mixture_table()
    for name, row in result["mixture"].items():
        cells = (f"{row[process]['rms']:.1e} ({row[process]['over_comfyui']:.3f})" for process in ("ve", "flow"))
        print(f"| {name} | {' | '.join(cells)} |")
    result["digits"] = digits_table(seeds=args.count)
    for process, rows in result["digits"].items():
        schedule = "Karras" if process == "ve" else "shift 3"
        print(f"\nDigits, {process}, {schedule}, N = {args.count}: median error\n\n| steps | " + " | ".join(KINDS)
              + " | exact / comfyui |\n|" + "---|" * (2 + len(KINDS)))
        for n, row in rows.items():
            print(f"| {n} | " + " | ".join(f"{row[name]['median']:.1e}" for name in KINDS)
                  + f" | {row['exact']['median'] / row['comfyui']['median']:.2f} |")
        print(f"\nDigits, {process}, {schedule}, N = {args.count}: RMS error, which the few points that end in another "
              "digit make\n\n| steps | " + " | ".join(KINDS) + " | exact / comfyui (95 %) |\n|" + "---|" * (2 + len(KINDS)))
        for n, row in rows.items():
            low, high = row["exact"]["interval"]
            print(f"| {n} | " + " | ".join(f"{row[name]['rms']:.1e}" for name in KINDS)
                  + f" | {row['exact']['over_comfyui']:.2f} ({low:.2f} to {high:.2f}) |")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
