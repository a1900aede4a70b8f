"""The results as Markdown and as a picture."""

import re
from xml.sax.saxutils import escape


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(quartiles, exact=False):
    if quartiles is None:
        return ""
    if exact or quartiles["n"] == 1:
        return f"{quartiles['median']:.3f}"
    return (f"{number(quartiles['median'])} "
            f"[{number(quartiles['q25'])}, {number(quartiles['q75'])}]")


def seconds(value):
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.2g} µs" if value < 1e-4 else f"{value / 1e-6:.0f} µs"


def short(operator):
    """aten::mm, MmBackward0, or a custom function's own name."""
    name = operator.split(": ")[-1]
    return re.sub(r".*CppNode<(?:\w+::)*(\w+)>", r"\1's backward", name)


def where(profile):
    """Where the time of a step goes, in one line for each side."""
    lines = []
    for name in ("ours", "base", "HF"):
        if name not in profile:
            continue
        side = profile[name]
        merged = {}
        for op, calls, time in side["operators"]:
            known = merged.setdefault(short(op), [0, 0.0])
            known[0] = max(known[0], calls)
            known[1] += time
        parts = [
            f"{op} {seconds(time)}" + (f" ({calls:.3g} calls)" if calls > 1 else "")
            for op, (calls, time) in sorted(merged.items(), key=lambda o: -o[1][1])[:6]
            if time > 0.01 * side["step"]]
        parts.append(f"outside of operators {seconds(max(side['outside'], 0))}")
        lines.append(f"{name}, {seconds(side['step'])}: " + ", ".join(parts))
    return lines


def ceiling(row):
    """Where HF is already closer to the frozen network than the target asks."""
    most = row.get("ratios", {}).get("HF/base")
    return [
        f"HF / base is {most['median']:.2f} on this machine: at the frozen network's "
        f"own speed ours would be {most['median']:.2f} times faster than HF, and "
        f"{t['value']:g} asks for less time than the frozen network takes"
        for t in row.get("targets", [])
        if most and t["ratio"] == "HF/ours" and not t["reached"]
        and most["median"] < t["value"]]


def reached(row):
    targets = row.get("targets", [])
    if not targets:
        return ""
    if all(t["reached"] for t in targets):
        return "yes"
    if len(targets) == 1:
        return "**no**"
    return "; ".join(
        t["ratio"].replace("/", " / ") + (": yes" if t["reached"] else ": **no**")
        for t in targets)


def markdown(report):
    out = ["# libpeft beside HF PEFT", ""]
    if report["quick"]:
        out += ["**A quick run on small shapes: it shows that everything runs, its "
                "figures mean nothing.**", ""]
    out += [
        "Training and inference on one thread, float32 unless said. A ratio is the "
        f"median over {report['rounds']} rounds of the two sides' processor times in "
        "the same round, with its quartiles in brackets; one without brackets is "
        "counted, not timed. *base* is the frozen network alone, `at::linear` with "
        "gradients to its input, called from C++. Below 1, ours / base would be faster "
        "than the frozen network; above 1, HF / ours is how many times faster ours "
        "is.", ""]
    out += ["| | |", "|---|---|"]
    out += [f"| {k} | {v} |" for k, v in report["environment"].items()]
    footnotes = []
    group = None
    for row in report["rows"]:
        if row["group"] != group:
            group = row["group"]
            out += ["", f"## {group}", ""]
            if group in report["about"]:
                out += [report["about"][group], ""]
            out += ["| | HF / base | ours / base | HF / ours | target | reached | "
                    "largest error |", "|---|---|---|---|---|---|---|"]
        if "failed" in row:
            out.append(f"| {row['name']} | | | | | failed: "
                       f"{row['failed'].replace('|', '/')} | |")
            continue
        ratios = row.get("ratios", {})
        mark = ""
        notes = list(row.get("notes", []))
        notes += ceiling(row)
        if row.get("profile") and "**no**" in reached(row):
            notes += where(row["profile"])
        if notes:
            footnotes.append((row, notes))
            mark = f" [{len(footnotes)}]"
        if not ratios:
            notes_text = row["notes"][0] if row.get("notes") else ""
            footnotes.pop()
            out.append(f"| {row['name']} | | | | | {notes_text} | |")
            continue
        columns = [cell(ratios.get(n), row.get("exact")) for n in
                   ("HF/base", "ours/base", "HF/ours")]
        targets = "; ".join(t["text"] for t in row.get("targets", []))
        errors = row.get("errors", {})
        worst = max(errors.items(), key=lambda e: e[1]) if errors else None
        error = f"{worst[0]} {worst[1]:.0e}" if worst else ""
        out.append(f"| {row['name']}{mark} | " + " | ".join(
            columns + [targets, reached(row), error]) + " |")
    if footnotes:
        out += ["", "## Notes, and where the time goes where a target is not reached", ""]
        for i, (row, notes) in enumerate(footnotes, 1):
            out.append(f"{i}. {row['group']}: {row['name']}")
            out += [f"   - {note}" for note in notes]
    others = sorted({r["commit"] for r in report["rows"]}
                    - {report["environment"]["libpeft"]})
    for other in others:
        names = [r["name"] for r in report["rows"] if r["commit"] == other]
        out += ["", f"Measured with libpeft {other}: {'; '.join(names)}."]
    timed = [r["steps in a sample"] for r in report["rows"] if "steps in a sample" in r]
    if timed:
        out += ["", "Every variant runs once a round, in random order, after two rounds "
                "to warm up; Python's garbage collector is off. HF's steps are called "
                "from Python, ours and the base loop in C++, as their users run them. A "
                f"sample is {min(timed)} to {max(timed)} steps. Errors are the largest "
                "differences between the two sides in this run, relative to the largest "
                "value of the tensor; for dropout, between ours and the step recomputed "
                "with the mask that it drew."]
    return "\n".join(out) + "\n"


# The picture: two panels of bars, light, one line a row.

COLOURS = {"HF/ours": "#3b7ddd", "ours/base": "#2a9d8f", "target": "#d1495b"}
PANELS = (("HF/ours", "HF / ours: how many times faster (log)"),
          ("ours/base", "ours / base: 1 is the frozen network"))


def bars(report):
    """(group, name, {ratio: quartiles}, {ratio: target}) of what has ratios."""
    found = []
    for row in report["rows"]:
        ratios = {n: row["ratios"][n] for n, _ in PANELS if n in row.get("ratios", {})}
        if ratios:
            targets = {t["ratio"]: t["value"] for t in row.get("targets", [])}
            found.append((row["group"], row["name"].split(" (")[0], ratios, targets))
    return found


def picture(report, stem):
    items = bars(report)
    try:
        import matplotlib
    except ImportError:
        return draw_svg(items, stem + ".svg")
    matplotlib.use("Agg")
    return draw_png(items, stem + ".png")


def spread(items):
    """Vertical places, with a gap and a heading before every group."""
    places, headings, y, group = [], [], 0.0, None
    for item in items:
        if item[0] != group:
            group = item[0]
            y += 1.6 if places else 0.6
            headings.append((y - 0.9, group))
        places.append(y)
        y += 1.0
    return places, headings, y


def beside(name, q, target):
    """Where a bar's number starts: behind the quartiles, and behind a target that
    it would cover."""
    end = max(q["q75"], q["median"])
    if target is None or target < q["median"]:
        return end
    near = target < end * 1.35 if name == "HF/ours" else target < end + 0.3
    return max(end, target) if near else end


def draw_png(items, path):
    import matplotlib.pyplot as plt

    places, headings, height = spread(items)
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8.5})
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.0 + 0.2 * height), sharey=True,
        gridspec_kw={"width_ratios": [1.25, 1], "wspace": 0.04})
    for axis, (name, title) in zip(axes, PANELS):
        shown = [(y, r[name], t.get(name)) for y, (_, _, r, t) in zip(places, items)
                 if name in r]
        axis.barh([y for y, _, _ in shown], [q["median"] for _, q, _ in shown],
                  height=0.66, color=COLOURS[name], alpha=0.85, zorder=2)
        for y, q, target in shown:
            axis.plot([q["q25"], q["q75"]], [y, y], color="#333", lw=0.9, zorder=3)
            if target is not None:
                axis.plot([target, target], [y - 0.42, y + 0.42],
                          color=COLOURS["target"], lw=1.8, zorder=4)
            axis.annotate(number(q["median"]), (beside(name, q, target), y),
                          xytext=(3, 0), textcoords="offset points", va="center",
                          fontsize=7.5, color="#222")
        axis.axvline(1, color="#888", lw=0.9, zorder=1)
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.grid(axis="x", color="#e3e3e3", lw=0.6, zorder=0)
        axis.tick_params(length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color("#bbb")
    axes[0].set_xscale("log")
    largest = max([max(r["HF/ours"]["q75"], t.get("HF/ours", 0))
                   for _, _, r, t in items if "HF/ours" in r] or [2])
    axes[0].set_xlim(0.5, largest * 1.8)
    ticks = [t for t in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if t <= largest * 1.8]
    axes[0].set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes[0].minorticks_off()
    over = max([r["ours/base"]["q75"] for _, _, r, _ in items if "ours/base" in r] or [1])
    axes[1].set_xlim(0, min(max(over * 1.15, 1.3), 3))
    axes[0].set_yticks(places, [name for _, name, _, _ in items])
    axes[0].set_ylim(height, -0.9)
    for y, text in headings:
        axes[0].annotate(text, (0, y), xycoords=("axes fraction", "data"),
                         xytext=(-4, 0), textcoords="offset points", ha="right",
                         va="center", fontsize=8.5, fontweight="bold", color="#222")
    axes[1].annotate("bar: median; black: quartiles; red: target", (1, 0),
                     xycoords="axes fraction", xytext=(0, -24),
                     textcoords="offset points", ha="right", va="top", fontsize=8,
                     color="#555")
    figure.savefig(path, dpi=140, bbox_inches="tight", facecolor="white")
    return path


def draw_svg(items, path):
    import math

    places, headings, height = spread(items)
    line, left, wide, top = 17, 330, 330, 46
    full = int(top + line * (height + 1.5))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 2 * wide + 120}" '
           f'height="{full}" font-family="sans-serif" font-size="11">',
           f'<rect width="{left + 2 * wide + 120}" height="{full}" fill="white"/>']

    def text(x, y, words, anchor="start", weight="normal", colour="#222"):
        out.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" '
                   f'font-weight="{weight}" fill="{colour}">{escape(words)}</text>')

    for y, words in headings:
        text(left - 8, top + line * y + 4, words, "end", "bold")
    for y, (_, name, _, _) in zip(places, items):
        text(left - 8, top + line * y + 4, name, "end")
    for panel, (name, title) in enumerate(PANELS):
        x0 = left + panel * (wide + 60)
        values = [max(r[name]["q75"], t.get(name, 0)) for _, _, r, t in items if name in r]
        most = max(values, default=2.0)
        log = name == "HF/ours"
        low = math.log(0.5) if log else 0.0
        high = math.log(max(most, 2)) if log else max(min(most, 3), 1.2)

        def place(value):
            v = math.log(max(value, 0.5)) if log else value
            return x0 + wide * min(max((v - low) / (high - low), 0), 1)

        text(x0, 22, title, weight="bold")
        out.append(f'<line x1="{place(1):.1f}" x2="{place(1):.1f}" y1="{top - 12}" '
                   f'y2="{full - line}" stroke="#888"/>')
        for y, (_, _, ratios, targets) in zip(places, items):
            if name not in ratios:
                continue
            middle, q = top + line * y, ratios[name]
            end = place(q["median"])
            out.append(f'<rect x="{x0}" y="{middle - 5.5:.1f}" width="{end - x0:.1f}" '
                       f'height="11" fill="{COLOURS[name]}" opacity="0.85"/>')
            out.append(f'<line x1="{place(q["q25"]):.1f}" x2="{place(q["q75"]):.1f}" '
                       f'y1="{middle}" y2="{middle}" stroke="#333"/>')
            if name in targets:
                at = place(targets[name])
                out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{middle - 7:.1f}" '
                           f'y2="{middle + 7:.1f}" stroke="{COLOURS["target"]}" '
                           'stroke-width="2"/>')
            text(place(beside(name, q, targets.get(name))) + 4, middle + 4,
                 number(q["median"]))
    text(left, full - 6, "bar: median; black: quartiles; red: target", colour="#555")
    out.append("</svg>")
    with open(path, "w") as f:
        f.write("\n".join(out) + "\n")
    return path
