"""A result of `tiny-align bench` as a report: Markdown tables and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_align.align.pictures import new_figure
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.parts import ENCODER_ALONE, WITH_THREADS
from tiny_align.benchmarks.standard.pipelines import OURS
from tiny_align.benchmarks.standard.stages import ANSWER, FIRST, PER_TOKEN, STAGES
from tiny_align.runtime.files import write_text, written_file

CURVE_NAMES = {  # of results files -> as we call them today
    "readout over tokens that are heard": "readout over tokens of the speech vocabulary",
    "loading a person over persons kept": "loading a user over users of the bundle",
}


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def ms_spread(seconds: dict[str, float]) -> str:
    """Milliseconds: the median, and in brackets the 10th and 90th percentile."""
    return f"{ms(seconds['median'])} ({ms(seconds['p10'])}-{ms(seconds['p90'])})"


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.0f}"


# --- tables ---


def compare(parts: dict[str, Any]) -> str:
    """Ours and every peer, with their seconds over ours."""
    part = parts["compare"]
    training = parts.get("training")
    head = [
        "",
        "speech to first token, ms",
        "over ours",
        "tokens/s",
        "ours over it",
        "real-time factor",
        "over ours",
        "peak memory, MiB",
        "load, s",
        "training, s",
        "ROUGE-L",
    ]
    rows = []
    for name, row in part["peers"].items():
        seconds = row["seconds"]
        ratios = row["ratios"]
        training_s = ""
        if training and name == OURS:
            training_s = f"{training['train_seconds']:.0f}"
        rows.append(
            [
                name,
                ms_spread(seconds[FIRST]),
                f"{ratios[FIRST]:.2f}x",
                f"{1 / seconds[PER_TOKEN]['median']:.0f}",
                f"{ratios[PER_TOKEN]:.2f}x",
                f"{seconds[ANSWER]['median'] / part['audio_s']:.4f}",
                f"{ratios[ANSWER]:.2f}x",
                mib(row["peak_bytes"]),
                f"{row['load_s']:.2f}",
                training_s,
                f"{row['rougeL']:.3f}",
            ]
        )
    text = grid(head, rows)
    if part["missing"]:
        text += "\n"
        for name, reason in part["missing"].items():
            text += f"\n- {name}: not measured, {reason}"
    return text


def inference(parts: dict[str, Any]) -> str:
    """One answer by stages, and how much of it no stage explains."""
    part = parts["inference"]
    ours = part["summary"][OURS]
    answer_s = ours[ANSWER]["median"]
    rows = []
    for stage in STAGES:
        share = ours[stage]["median"] / answer_s
        rows.append([stage, ms_spread(ours[stage]), f"{share:.1%}"])
    rows.append(["unexplained", "", f"{part['unexplained']:.1%}"])
    rows.append(["whole answer", ms_spread(ours[ANSWER]), ""])
    alone = ms_spread(part["summary"][ENCODER_ALONE]["encoder"])
    with_threads = ms_spread(part["summary"][WITH_THREADS][ANSWER])
    return (
        f"{grid(['stage', 'ms', 'share'], rows)}\n\n"
        f"{part['audio_s']:.1f} s of speech, {part['answer_tokens']} tokens answered. "
        f"The encoder on its own takes {alone} ms; in the table it runs after the LLM's last "
        "turn. Stages are timed on one core, one after another; with a session's threads for "
        f"encoding and prefill side by side the answer takes {with_threads} ms."
    )


def streaming(parts: dict[str, Any]) -> str:
    from tiny_align.benchmarks.standard.streaming import table

    return table(parts["streaming"])


def memory(parts: dict[str, Any]) -> str:
    part = parts["memory"]
    sizes = {
        "the bundle on disk": "bundle_bytes",
        "before loading": "before_bytes",
        "loaded": "loaded_bytes",
        "after one answer": "answered_bytes",
        "after many": "after_many_bytes",
        "peak": "peak_bytes",
    }
    rows = [[label, f"{mib(part[name])} MiB"] for label, name in sizes.items()]
    rows.append(["loading", f"{part['load_s']:.2f} s"])
    rows.append(["first token, cold", f"{ms(part['cold_first_token_s'])} ms"])
    rows.append(["first token, warm", f"{ms(part['warm_first_token_s'])} ms"])
    return grid(["", ""], rows)


def limits(parts: dict[str, Any]) -> str:
    """Counts, the share of the machine's limit, and the prediction for a board."""
    part = parts["limits"]
    first_stage = next(iter(part["stages"].values()))
    boards = list(first_stage["predicted_s"])
    head = ["stage", "MFLOP", "MB", "ms", "limit", "share of it"]
    head += [f"*predicted*, {board}: ms" for board in boards]
    rows = []
    for name, row in part["stages"].items():
        cells = [
            name,
            f"{row['operations'] / 1e6:.0f}",
            f"{row['bytes'] / 1e6:.1f}",
            ms(row["seconds"]),
            row["limited_by"],
            f"{row['share']:.0%}",
        ]
        cells += [ms(row["predicted_s"][board]) for board in boards]
        rows.append(cells)
    return (
        f"{grid(head, rows)}\n\n"
        f"One core reads {part['bandwidth_gb_s']:.1f} GB/s and does "
        f"{part['products_gflop_s']:.0f} GFLOP/s in FP32. The prediction is for an Orin Nano 8GB "
        "at 80 % of its memory's rate and by memory alone; no board was measured."
    )


def growth(parts: dict[str, Any]) -> str:
    rows = []
    for name, curve in parts["growth"]["curves"].items():
        cells = [CURVE_NAMES.get(name, name)]
        for point in (curve["points"][0], curve["points"][-1]):
            cells.append(f"{ms(point['median'])} ms at {point['size']:g}")
        rows.append([*cells, f"{curve['exponent']:.2f}"])
    return grid(["cost", "from", "to", "exponent"], rows)


def quality(parts: dict[str, Any]) -> str:
    part = parts["quality"]
    rows = [
        [f"typed, {part['typed']} held-out sentences: exact", f"{part['typed_exact']:.3f}"],
        [f"spoken, {part['n']} recordings of a new voice: ROUGE-L", f"{part['rougeL']:.3f}"],
        ["chance", f"{part['rougeL_chance']:.3f}"],
        ["word error rate of repeating", f"{part['wer']:.3f}"],
        [f"of {part['wordless']} non-speech sounds answered", part["wordless_answered"]],
    ]
    return grid(["the general projector", ""], rows)


def training(parts: dict[str, Any]) -> str:
    part = parts["training"]
    ratios = part["cost"]["step_ratio"]
    rows = []
    for name, row in part["cost"]["forms"].items():
        ratio = f"{ratios[name]:.1f}x" if name in ratios else ""
        rows.append([name, f"{row['step_s']:.3f}", ratio, f"{row['peak_gb']:.2f}"])
    return (
        f"{part['train_seconds']:.0f} s for {part['utterances']} recordings "
        f"({part['steps']} steps, one core, {mib(part['peak_bytes'])} MiB): "
        f"ROUGE-L {part['rougeL_before']:.3f} -> {part['rougeL_after']:.3f}, "
        f"WER {part['wer_before']:.3f} -> {part['wer_after']:.3f}.\n\n"
        f"{grid(['a step', 's', 'over ours', 'peak memory, GB'], rows)}"
    )


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {  # part -> title, table
    "compare": ("Beside what would be used instead", compare),
    "inference": ("One answer, stage by stage", inference),
    "streaming": ("Time to first token, by length of the speech", streaming),
    "memory": ("Memory", memory),
    "limits": ("How far from the limit", limits),
    "growth": ("Growth", growth),
    "quality": ("Quality", quality),
    "training": ("Training", training),
}


# --- the report ---


def markdown(result: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """The whole report; `pictures` are file names beside it."""
    machine = result["machine"]
    where = machine.get("jetson") or machine.get("processor") or machine["system"]
    versions = [f"{package} {version}" for package, version in result["versions"].items()]
    sections = [
        f"# {where}, {machine['cores']} cores, {result['date']}",
        f"`{result['command']}`, {result['setting']['threads']} threads, "
        f"{result['seconds']:.0f} s. {', '.join(versions)}.",
        "Milliseconds are medians, with the 10th and 90th percentile in brackets.",
        "\n".join(f"- {when}: {_state(result[when])}" for when in ("before", "after")),
    ]
    for name, (title, table) in TABLES.items():
        if name in result["parts"]:
            sections.append(f"## {title}\n\n{table(result['parts'])}")
    for picture in pictures:
        sections.append(f"![{picture}]({picture})")
    return "\n\n".join(sections) + "\n"


def _state(state: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in state.items())


def write(path: Path, result: dict[str, Any]) -> None:
    """The report and its pictures beside the result at `path`."""
    drawings = {"growth": draw_growth, "inference": draw_stages}
    pictures = []
    for name, draw in drawings.items():
        if name in result["parts"]:
            picture = f"{path.stem}-{name}.png"
            with written_file(path.with_name(picture)) as file:
                draw(result["parts"][name], file)
            pictures.append(picture)
    write_text(path.with_suffix(".md"), markdown(result, pictures))


def draw_growth(part: dict[str, Any], file: Path) -> None:
    """Every curve on logarithmic axes, one panel each."""
    figure = new_figure(9, 5)
    for place, (name, curve) in enumerate(part["curves"].items(), 1):
        cost, _, over = CURVE_NAMES.get(name, name).partition(" over ")
        title = f"{cost}: exponent {curve['exponent']:.2f}"
        axes = figure.add_subplot(2, 3, place, title=title, xlabel=over)
        sizes = [point["size"] for point in curve["points"]]
        medians = [1e3 * point["median"] for point in curve["points"]]
        low = [1e3 * point["p10"] for point in curve["points"]]
        high = [1e3 * point["p90"] for point in curve["points"]]
        axes.fill_between(sizes, low, high, color="0.85")
        axes.loglog(sizes, medians, "-o", color="0", markersize=4)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.tick_params(labelsize=8)
        axes.minorticks_off()
        axes.set_ylabel("ms")
        axes.title.set_fontsize(9)
    figure.savefig(file, dpi=110, format="png")


def draw_stages(part: dict[str, Any], file: Path) -> None:
    """One answer's stages, with their 10th and 90th percentile."""
    ours = part["summary"][OURS]
    medians = []
    below = []
    above = []
    for stage in STAGES:
        seconds = ours[stage]
        medians.append(1e3 * seconds["median"])
        below.append(1e3 * (seconds["median"] - seconds["p10"]))
        above.append(1e3 * (seconds["p90"] - seconds["median"]))
    figure = new_figure(7, 3)
    axes = figure.add_subplot(xlabel="ms", title=f"one answer to {part['audio_s']:.1f} s of speech")
    axes.barh(
        STAGES,
        medians,
        xerr=[below, above],
        color="0.6",
        edgecolor="0",
        error_kw={"elinewidth": 1, "capsize": 3},
    )
    axes.invert_yaxis()
    figure.savefig(file, dpi=110, format="png")
