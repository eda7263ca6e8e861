"""The pictures of the alignment study, as PNG files beside its results."""

from pathlib import Path
from typing import Any

from tiny_align.align.pictures import new_figure
from tiny_align.benchmarks.studies.alignment_curves import SNR_DB, median_of
from tiny_align.benchmarks.studies.alignment_table import REPORTED

CLEAN_DB = 30  # where recordings without noise are drawn

Line = tuple[list[float], list[float]]  # x and y


def plot_table(report: dict[str, Any], folder: Path) -> list[str]:
    """Quality over training time, by objective; the file names."""
    lines: dict[str, Line] = {}
    for row in report["results"].values():
        if row["projector"] == REPORTED:
            seconds = [point["seconds"] for point in row["budget_curve"]]
            rouge = [point["rougeL"] for point in row["budget_curve"]]
            lines[row["objective"]] = (seconds, rouge)
    return [draw(folder / "alignment-time.png", "seconds of training, known voices", lines)]


def plot_curves(report: dict[str, Any], folder: Path) -> list[str]:
    """Quality over the number of utterances, and over noise, by speaker; the file names."""
    few: dict[str, Line] = {}
    noise: dict[str, Line] = {}
    for name, row in report["results"].items():
        numbers = [0.0]
        rouge = [row["general"]["rougeL"]]
        for n, runs in row["few"].items():
            numbers.append(int(n))
            rouge.append(median_of(runs, "rougeL"))
        few[name] = (numbers, rouge)
        levels = [CLEAN_DB if snr_db is None else snr_db for snr_db in SNR_DB]
        noise[name] = (levels, [median_of(row["noise"][str(db)], "rougeL") for db in SNR_DB])
    noise_label = f"signal to noise, dB ({CLEAN_DB}: clean)"
    return [
        draw(folder / "alignment-few.png", "utterances trained on", few),
        draw(folder / "alignment-noise.png", noise_label, noise),
    ]


def draw(path: Path, label: str, lines: dict[str, Line]) -> str:
    """ROUGE-L over something else, a line for each name; the file's name."""
    figure = new_figure(6, 4)
    axes = figure.add_subplot(xlabel=label, ylabel="ROUGE-L", ylim=(0, 1))
    for name, (x, y) in lines.items():
        axes.plot(x, y, "-o", markersize=3, label=name)
    axes.legend()
    figure.savefig(path, dpi=110)
    return path.name
