#!/usr/bin/env python3
"""Plots of what bench/vs_ksm --json has measured: SVG files, with nothing but the standard library.

usage: plot.py FILE.json DIRECTORY

Writes ratios.svg (figures beside KSM's, with target and floor), values.svg (figures that stand alone, as a share of
their floor), cpu_by_run.svg (CPU time to merge, by the length of runs) and growth.svg (CPU time and savings against
size); each only if there are figures for it.
"""
import json
import math
import os
import statistics
import sys
from xml.sax.saxutils import escape

FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, FAINT, GRID = "#1f2933", "#62707c", "#dfe4e8"
GOOD, FAIR, POOR, PLAIN = "#2f7d5b", "#c08a1e", "#b8443a", "#5b7a99"
SERIES = {"ksm": "#8a8f98", "promise-scan": "#1f5f99", "promise-merge": "#6fa8d6", "exact-scan": "#2f7d5b",
          "exact-merge": "#8cc5a8", "maps65530": "#c08a1e", "maps1048576": "#1f5f99"}
NAMES = {"ksm": "KSM", "promise-scan": "promise, scanner", "promise-merge": "promise, ksmu_merge",
         "exact-scan": "exact, scanner", "exact-merge": "exact, ksmu_merge",
         "maps65530": "ksmu, limit of 65,530 mappings", "maps1048576": "ksmu, limit of 1,048,576"}


class Svg:
    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def line(self, x1, y1, x2, y2, color=GRID, width=1, dash=None):
        dashed = f" stroke-dasharray='{dash}'" if dash else ""
        self.parts.append(f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}' "
                          f"stroke-width='{width}'{dashed}/>")

    def bar(self, x, y, width, height, color, title=""):
        self.parts.append(f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(width, 0.5):.1f}' height='{height:.1f}' "
                          f"fill='{color}'><title>{escape(title)}</title></rect>")

    def text(self, x, y, text, size=12, anchor="start", color=INK, weight="normal"):
        self.parts.append(f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' text-anchor='{anchor}' "
                          f"fill='{color}' font-weight='{weight}'>{escape(text)}</text>")

    def path(self, points, color, width=2):
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f"<polyline points='{joined}' fill='none' stroke='{color}' stroke-width='{width}'/>")
        for x, y in points:
            self.parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{2.5 + width / 2}' fill='{color}'/>")

    def save(self, path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"<svg xmlns='http://www.w3.org/2000/svg' width='{self.width}' height='{self.height}' "
                       f"viewBox='0 0 {self.width} {self.height}'>\n"
                       f"<rect width='{self.width}' height='{self.height}' fill='white'/>\n")
            file.write("\n".join(self.parts))
            file.write("\n</svg>\n")
        print(path)


def number(value):
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}"


def verdict_color(line):
    verdict = line["verdict"]
    if "target met" in verdict:
        return GOOD
    if "floor met" in verdict or "target missed" in verdict:
        return FAIR
    if "below" in verdict or "not reached" in verdict or "incomplete" in verdict:
        return POOR
    return PLAIN


def footer(svg, data, heap=True):
    machine = data["machine"]
    svg.text(16, svg.height - 10, f"{machine['kernel']}, {machine['cpus']} CPUs ({machine['cpu']}), "
             f"{machine['memory']}, {machine['date'][:10]}; "
             + (f"heap of {data['options']['size_mib']} MiB; " if heap else "")
             + f"medians of {data['options']['repetitions']}", 10, color=FAINT)


def decades(low, high):
    return [10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def bars(data, lines, path, title, subtitle, value_of, bound_of, label_of, unit_tick):
    """Horizontal bars on a logarithmic axis, grouped by row, with marks at target and floor."""
    shown = [line for line in lines if line["figure"] and value_of(line) is not None and value_of(line) > 0]
    if not shown:
        return
    values = [value_of(line) for line in shown]
    values += [b for line in shown for b in (bound_of(line, "target"), bound_of(line, "floor")) if b and b > 0]
    ticks = decades(min(values) * 0.9, max(values) * 1.1)
    low, high = ticks[0], ticks[-1]
    left, right, row_height, top = 430, 150, 22, 78
    rows = len({line["row"] for line in shown})
    height = top + len(shown) * row_height + rows * 8 + 54
    svg = Svg(1040, height)
    width = svg.width - left - right
    place = lambda v: left + width * (math.log10(v) - math.log10(low)) / (math.log10(high) - math.log10(low))
    svg.text(16, 28, title, 17, weight="bold")
    svg.text(16, 48, subtitle, 12, color=FAINT)
    bottom = height - 46
    for tick in ticks:
        svg.line(place(tick), top - 8, place(tick), bottom)
        svg.text(place(tick), bottom + 14, unit_tick(tick), 11, "middle", FAINT)
    if low < 1 < high:
        svg.line(place(1), top - 8, place(1), bottom, FAINT)
    y, last = top, None
    for line in shown:
        if line["row"] != last:
            y += 8 if last else 0
            last = line["row"]
        value = value_of(line)
        svg.text(left - 8, y + 13, line["what"], 12, "end")
        # A logarithmic bar has no natural beginning: it starts at the axis' lower end.
        svg.bar(left, y + 2, place(value) - left, row_height - 8, verdict_color(line), line["verdict"])
        for name, color, dash in (("target", GOOD, None), ("floor", POOR, "3,2")):
            bound = bound_of(line, name)
            if bound and bound > 0:
                svg.line(place(bound), y - 1, place(bound), y + row_height - 3, "white", 5)
                svg.line(place(bound), y - 1, place(bound), y + row_height - 3, color, 2.5, dash)
        svg.text(svg.width - right + 8, y + 13, label_of(line), 12)
        y += row_height
    legend = left
    for color, text in ((GOOD, "target met"), (FAIR, "floor met"), (POOR, "below the floor"), (PLAIN, "no bounds")):
        svg.bar(legend, 58, 10, 10, color)
        svg.text(legend + 14, 67, text, 11, color=FAINT)
        legend += 30 + 6.2 * len(text)
    svg.line(legend, 57, legend, 69, GOOD, 2.5)
    svg.text(legend + 6, 67, "target", 11, color=FAINT)
    svg.line(legend + 54, 57, legend + 54, 69, POOR, 2.5, "3,2")
    svg.text(legend + 60, 67, "floor", 11, color=FAINT)
    footer(svg, data)
    svg.save(path)


def ratios(data, path):
    lines = [line for line in data["lines"] if line["figure_is"] == "ratio" and line["row"] != "growth"]
    bars(data, lines, path, "ksmu beside KSM",
         "left of 1: less than KSM's (or than with nothing at all, where the line says so)",
         lambda line: line["figure"]["median"], lambda line, name: line[name],
         lambda line: number(line["figure"]["median"]) + " ×", lambda tick: f"{tick:g} ×")


def values(data, path):
    lines = [line for line in data["lines"] if line["figure_is"] != "ratio" and line["floor"]]

    def label(line):
        unit = "%" if line["figure_is"] == "slowdown_percent" else line["unit"]
        return number(line["figure"]["median"]) + " " + unit

    bars(data, lines, path, "Figures that stand alone", "as a share of the floor: left of 1 is better",
         lambda line: max(line["figure"]["median"], 0.001 * line["floor"]) / line["floor"],
         lambda line, name: line[name] / line["floor"] if line[name] else None, label, lambda tick: f"{tick:g}")


def medians(data, row, metric):
    """{case id: (median, low, high)}"""
    result = {}
    for case in data["cases"]:
        figures = [r[metric] for r in case["repetitions"] if r.get(metric) is not None]
        if case["row"].startswith(row) and figures:
            result[case["id"]] = (statistics.median(figures), min(figures), max(figures))
    return result


def legend(svg, y, variants):
    x = 16
    for variant in variants:
        svg.bar(x, y - 9, 10, 10, SERIES[variant])
        svg.text(x + 14, y, NAMES[variant], 11, color=FAINT)
        x += 34 + 6.3 * len(NAMES[variant])


def cpu_by_run(data, path):
    figures = medians(data, "cpu_", "cpu_seconds")
    runs = sorted({int(i.split("/")[0][4:]) for i in figures})
    if not runs:
        return
    variants = [v for v in ("ksm", "promise-scan", "promise-merge", "exact-scan", "exact-merge")
                if any(f"cpu_{r}/{v}" in figures for r in runs)]
    svg = Svg(900, 420)
    left, top, bottom = 64, 84, 360
    high = max(f[2] for f in figures.values()) * 1.08
    place = lambda v: bottom - (bottom - top) * v / high
    svg.text(16, 28, f"CPU time to merge {data['options']['size_mib']} MiB, half of it duplicates", 17, weight="bold")
    legend(svg, 54, variants)
    step = 10.0 ** math.floor(math.log10(high / 3))
    step *= 5 if high / step > 12 else 2 if high / step > 6 else 1
    for i in range(int(high / step) + 1):
        svg.line(left, place(i * step), svg.width - 16, place(i * step))
        svg.text(left - 8, place(i * step) + 4, number(i * step) + " s", 11, "end", FAINT)
    group = (svg.width - left - 16) / len(runs)
    bar = group * 0.8 / len(variants)
    for g, run in enumerate(runs):
        for v, variant in enumerate(variants):
            figure = figures.get(f"cpu_{run}/{variant}")
            if not figure:
                continue
            x = left + g * group + group * 0.1 + v * bar
            svg.bar(x, place(figure[0]), bar - 3, bottom - place(figure[0]), SERIES[variant],
                    f"{NAMES[variant]}: {number(figure[0])} s")
            svg.line(x + (bar - 3) / 2, place(figure[1]), x + (bar - 3) / 2, place(figure[2]), INK, 1.2)
            svg.text(x + (bar - 3) / 2, place(figure[2]) - 4, number(figure[0]), 10, "middle")
        svg.text(left + (g + 0.5) * group, bottom + 18, f"runs of {run}", 12, "middle")
    footer(svg, data)
    svg.save(path)


def growth(data, path):
    cpu, saved = medians(data, "growth", "cpu_seconds"), medians(data, "growth", "saved_share")
    runs = sorted({int(i.split("/")[1][3:]) for i in cpu}, reverse=True)
    if not runs:
        return
    variants = ["ksm", "maps65530", "maps1048576"]
    panels = [(run, what) for what in ("cpu", "saved") for run in runs]
    panel_width, panel_height, left, top = 430, 230, 62, 96
    svg = Svg(left + panel_width * len(runs) + 16, top + 2 * (panel_height + 66) + 10)
    svg.text(16, 28, "How cost and savings grow with the heap", 17, weight="bold")
    legend(svg, 54, variants)
    sizes = sorted({int(i.split("/")[2]) for i in cpu})
    low, high = min(f[0] for f in cpu.values()) * 0.8, max(f[0] for f in cpu.values()) * 1.25
    x_low, x_high = math.log2(sizes[0]) - 0.3, math.log2(sizes[-1]) + 0.3
    for n, (run, what) in enumerate(panels):
        x0 = left + (n % len(runs)) * panel_width
        y0 = top + (n // len(runs)) * (panel_height + 66)
        y1 = y0 + panel_height
        place_x = lambda s: x0 + (panel_width - 60) * (math.log2(s) - x_low) / (x_high - x_low)
        if what == "cpu":
            ticks = [t * m for t in decades(low, high) for m in (1, 2, 5) if low <= t * m <= high]
            place = lambda v: y1 - panel_height * (math.log(v) - math.log(low)) / (math.log(high) - math.log(low))
            label, figures = (lambda t: number(t) + " s"), cpu
        else:
            ticks = [0, 0.25, 0.5, 0.75, 1]
            place = lambda v: y1 - panel_height * v / 1.05
            label, figures = (lambda t: f"{t:.0%}"), saved
        svg.text(x0, y0 - 10, f"{'CPU time' if what == 'cpu' else 'saved, of what can be'}, runs of {run}", 13,
                 weight="bold")
        for tick in ticks:
            svg.line(x0, place(tick), x0 + panel_width - 60, place(tick))
            svg.text(x0 - 6, place(tick) + 4, label(tick), 11, "end", FAINT)
        for size in sizes:
            svg.line(place_x(size), y0, place_x(size), y1)
            text = f"{size} MiB" if size < 1024 else f"{size / 1024:g} GiB"
            svg.text(place_x(size), y1 + 16, text, 11, "middle", FAINT)
        for variant in variants:
            points = [(place_x(s), place(figures[f"growth/run{run}/{s}/{variant}"][0])) for s in sizes
                      if f"growth/run{run}/{s}/{variant}" in figures]
            if points:
                svg.path(points, SERIES[variant], 6 if variant == "ksm" else 2)  # seen below the others
    footer(svg, data, heap=False)
    svg.save(path)


def main():
    if len(sys.argv) != 3 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip(), file=sys.stdout if "-h" in sys.argv or "--help" in sys.argv else sys.stderr)
        return 0 if "-h" in sys.argv or "--help" in sys.argv else 2
    with open(sys.argv[1], encoding="utf-8") as file:
        data = json.load(file)
    os.makedirs(sys.argv[2], exist_ok=True)
    ratios(data, os.path.join(sys.argv[2], "ratios.svg"))
    values(data, os.path.join(sys.argv[2], "values.svg"))
    cpu_by_run(data, os.path.join(sys.argv[2], "cpu_by_run.svg"))
    growth(data, os.path.join(sys.argv[2], "growth.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
