"""libpeft beside HF PEFT: runs the rows of rows.py and writes the table.

Both sides run in this process on the same tensors, on one thread; what is timed
is the processor time of that thread. Called by the preset bench; see
benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROUNDS = 21


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", help="folder of the built peft_compare module")
    parser.add_argument("--startup", help="the built start-up program")
    parser.add_argument("--output", default=".", help="folder of the results")
    parser.add_argument("--copy", help="also written here, with .md, .json, .png or "
                        ".svg at its end; not by a quick run")
    parser.add_argument("--only", default="", help="regular expression on the rows")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true",
                        help="small shapes, few rounds: does everything run?")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--profile", action="store_true",
                        help="profile every row, not only where a target is missed")
    parser.add_argument("--render", action="store_true",
                        help="make table and picture again from the results")
    return parser.parse_args()


def say(text="", end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def cpu():
    name, flags = platform.processor() or platform.machine(), []
    try:
        with open("/proc/cpuinfo") as f:
            info = f.read()
        name = re.search(r"model name\s*: (.*)", info)[1]
        has = set(re.search(r"flags\s*: (.*)", info)[1].split())
        flags = [f for f in ("avx2", "fma", "avx512f", "avx512bw", "avx512dq",
                             "avx512vl", "avx512_bf16", "amx_bf16") if f in has]
    except (OSError, TypeError):
        pass
    return name, flags


def environment(module):
    import peft
    import torch
    import transformers

    here = os.path.dirname(os.path.abspath(__file__))

    def git(*command):
        done = subprocess.run(["git", "-C", here, *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    name, flags = cpu()
    config = torch.__config__.show()
    parts = [re.search(pattern, config) for pattern in (
        r"Intel\(R\) oneAPI Math Kernel Library Version [\d.]+", r"MKL-DNN\) v[\d.]+",
        r"CPU capability usage: \S+")]
    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "../../include")
    return {
        "CPU": f"{name}, {os.cpu_count()} cores",
        "CPU flags": " ".join(flags),
        "load average": " ".join(f"{v:.2f}" for v in os.getloadavg()),
        "threads": torch.get_num_threads(),
        "torch": f"{torch.__version__}; " + "; ".join(
            p[0].replace("MKL-DNN)", "oneDNN") for p in parts if p),
        "HF": f"peft {peft.__version__}, transformers {transformers.__version__}, "
              f"Python {platform.python_version()}",
        "libpeft": f"{module.version}, commit {commit or 'unknown'}"
                   + (" and changes to it" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def profile(module, trial, k):
    """Processor time by operator, of k steps of every variant."""
    found = {}
    for name, variant in trial.variants.items():
        module.set_timed(True)
        variant(1)
        record = module.Profile()
        try:
            seconds = variant(k)
        finally:
            record.stop()
            module.set_timed(True)
        own = sorted(
            ((n, calls / k, t / k) for n, (calls, t) in record.operators.items()),
            key=lambda item: -item[2])
        found[name] = {"step": seconds / k, "operators": own[:20],
                       "outside": (seconds - sum(o[2] * k for o in own)) / k}
    return found


def measure(row, module, count, quick, always_profile):
    from measure import quartiles, ratio, rounds

    result = {"group": row.group, "name": row.name}
    trial = row.make()
    result["notes"] = trial.notes
    if not trial.variants and not trial.exact:
        return result
    result["ratios"] = {name: quartiles([value]) for name, value in trial.exact.items()}
    result["exact"] = bool(trial.exact) and not trial.variants
    k = 1
    if trial.variants:
        times, k = rounds(
            trial.variants, trial.rounds or count, repeats=trial.repeats)
        result["steps in a sample"] = k
        result["seconds"] = {name: quartiles(t) for name, t in times.items()}
        for above, below in (("HF", "ours"), ("ours", "base"), ("HF", "base")):
            found = ratio(times, above, below)
            if found:
                result["ratios"][f"{above}/{below}"] = found
    result["errors"] = trial.check()
    result["targets"] = []
    for target in row.targets:
        value = result["ratios"][target.ratio]["median"]
        result["targets"].append(
            {"text": str(target), "ratio": target.ratio, "op": target.op,
             "value": target.value, "reached": target.reached(value)})
    missed = not all(t["reached"] for t in result["targets"])
    if trial.variants and row.profiled and (always_profile or missed) and not quick:
        result["profile"] = profile(module, trial, max(1, k))
    return result


def summary(result):
    ratios = result.get("ratios", {})
    text = ", ".join(f"{n} {q['median']:.3g}" for n, q in ratios.items())
    missed = [t["text"] for t in result.get("targets", []) if not t["reached"]]
    return (text or "; ".join(result.get("notes", []))) + (
        f"   MISSED {'; '.join(missed)}" if missed else "")


def run(options, rows, about, module, path):
    """Results of the rows; with --only, the others stay as `path` has them."""
    env = environment(module)
    kept = {}
    if options.only and os.path.exists(path):
        with open(path) as f:
            kept = {f"{r['group']}: {r['name']}": r for r in json.load(f)["rows"]}
    chosen = [r for r in rows if re.search(options.only, r.key)]
    if not chosen:
        sys.exit(f"no row matches {options.only!r}; --list names them")
    count = 3 if options.quick else options.rounds
    if count < 15 and not options.quick:
        say("fewer than 15 rounds: figures to look at, not to keep")
    done, failed = {}, 0
    whole, begin = sum(r.cost for r in chosen), time.monotonic()
    spent = 0.0
    for i, row in enumerate(chosen, 1):
        say(f"[{i:2}/{len(chosen)}] {row.key} ... ", end="")
        start = time.monotonic()
        load = os.getloadavg()[0]
        try:
            result = measure(row, module, count, options.quick, options.profile)
        except Exception as e:
            failed += 1
            reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            result = {"group": row.group, "name": row.name, "failed": reason}
            say(f"FAILED: {reason}\n" + "".join(traceback.format_tb(e.__traceback__)),
                end="")
        else:
            say(summary(result), end="")
            now = time.monotonic()
            spent += row.cost
            left = (whole - spent) * (now - begin) / spent
            say(f"   ({now - start:.0f} s, {left / 60:.0f} min left)")
        result["commit"] = env["libpeft"]
        result["load"] = load
        done[row.key] = result
    order = [r.key for r in rows]
    results = {**kept, **done}
    report = {
        "environment": env,
        "quick": options.quick,
        "rounds": count,
        "about": about,
        "rows": [results[key] for key in order if key in results]}
    return report, failed


def main():
    options = arguments()
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import render

    folder = os.path.join(options.output, "quick") if options.quick else options.output
    path = os.path.join(folder, "benchmarks.json")
    failed = 0
    if options.render:
        with open(path) as f:
            report = json.load(f)
    else:
        if options.module:
            sys.path.insert(0, options.module)
        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # HF's, on files without a base model's name
        import rows

        rows.QUICK = options.quick
        table = rows.table(options.startup)
        if options.list:
            print("\n".join(r.key for r in table))
            return 0
        report, failed = run(options, table, rows.ABOUT, rows.ours, path)
    text = render.markdown(report)
    print(text)
    stems = [os.path.join(folder, "benchmarks")]
    if options.copy and not report["quick"]:
        stems.append(options.copy)
    for stem in stems:
        os.makedirs(os.path.dirname(stem) or ".", exist_ok=True)
        with open(stem + ".md", "w") as f:
            f.write(text)
        with open(stem + ".json", "w") as f:
            json.dump(report, f, indent=1)
        picture = render.picture(report, stem)
        say(f"Written: {stem}.md, .json and {os.path.splitext(picture)[1]}")
    if failed:
        say(f"{failed} row(s) failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
