"""A result of `tiny-align bench` for people: Markdown tables and pictures."""

from collections.abc import Callable
from pathlib import Path

from tiny_align.align.pictures import new_figure
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.parts import ALONE, THREADED
from tiny_align.benchmarks.standard.pipelines import OURS
from tiny_align.benchmarks.standard.stages import ANSWER, FIRST, PER_TOKEN, STAGES
from tiny_align.runtime.files import write_text, written_file


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def spread(told: dict) -> str:
    """Milliseconds: the median, and in brackets the 10th and 90th percentile."""
    return f"{ms(told['median'])} ({ms(told['p10'])}-{ms(told['p90'])})"


def mib(size: float) -> str:
    return f"{size / 2**20:.0f}"


def compare(parts: dict) -> str:
    """What people look for: ours and every peer, with their seconds over ours."""
    part, trained = parts["compare"], parts.get("training")
    head = [
        "",
        "speech to first token, ms",
        "over ours",
        "tokens/s",
        "ours over it",
        "real-time factor",
    ]
    head += ["over ours", "peak memory, MiB", "load, s", "training, s", "ROUGE-L"]
    rows = []
    for name, row in part["peers"].items():
        first, per_token, answer = (row["seconds"][key] for key in (FIRST, PER_TOKEN, ANSWER))
        cells = [
            name,
            spread(first),
            times(row, FIRST),
            f"{1 / per_token['median']:.0f}",
            times(row, PER_TOKEN),
        ]
        cells += [
            f"{answer['median'] / part['audio_s']:.4f}",
            times(row, ANSWER),
            mib(row["peak_bytes"]),
        ]
        seconds = f"{trained['train_seconds']:.0f}" if trained and name == OURS else ""
        rows.append([*cells, f"{row['load_s']:.2f}", seconds, f"{row['rougeL']:.3f}"])
    missing = "".join(f"\n- {name}: not measured, {why}" for name, why in part["missing"].items())
    return grid(head, rows) + (f"\n{missing}" if missing else "")


def times(row: dict, part: str) -> str:
    return f"{row['ratios'][part]:.2f}x"


def inference(parts: dict) -> str:
    """One answer by stages, and how much of it no stage explains."""
    part = parts["inference"]
    ours, whole = part["summary"][OURS], part["summary"][OURS][ANSWER]["median"]
    rows = [[name, spread(ours[name]), f"{ours[name]['median'] / whole:.1%}"] for name in STAGES]
    rows += [
        ["unexplained", "", f"{part['unexplained']:.1%}"],
        ["whole answer", spread(ours[ANSWER]), ""],
    ]
    alone, threaded = part["summary"][ALONE]["encoder"], part["summary"][THREADED][ANSWER]
    return grid(["stage", "ms", "share"], rows) + (
        f"\n\n{part['audio_s']:.1f} s of speech, {part['answer_tokens']} tokens answered. The encoder on its own takes "
        f"{spread(alone)} ms; in the table it runs after the LLM's last turn. Stages are timed on "
        "one core, one after another; with a session's hearing and reading beside each other the answer takes "
        f"{spread(threaded)} ms."
    )


def streaming(parts: dict) -> str:
    from tiny_align.benchmarks.standard.streaming import table

    return table(parts["streaming"])


def memory(parts: dict) -> str:
    part = parts["memory"]
    sizes = {
        "the bundle on disk": "bundle_bytes",
        "before loading": "before_bytes",
        "loaded": "loaded_bytes",
        "after one answer": "answered_bytes",
        "after many": "after_many_bytes",
        "peak": "peak_bytes",
    }
    rows = [[what, f"{mib(part[name])} MiB"] for what, name in sizes.items()]
    rows += [["loading", f"{part['load_s']:.2f} s"]]
    rows += [
        [f"first token, {how}", f"{ms(part[f'{how}_first_token_s'])} ms"]
        for how in ("cold", "warm")
    ]
    return grid(["", ""], rows)


def limits(parts: dict) -> str:
    """Counts, the share of the machine's limit, and the prediction for a board."""
    part = parts["limits"]
    boards = list(next(iter(part["stages"].values()))["predicted_s"])
    head = [
        "stage",
        "MFLOP",
        "MB",
        "ms",
        "limit",
        "share of it",
        *(f"*predicted*, {name}: ms" for name in boards),
    ]
    rows = []
    for name, row in part["stages"].items():
        cells = [
            name,
            f"{row['operations'] / 1e6:.0f}",
            f"{row['bytes'] / 1e6:.1f}",
            ms(row["seconds"]),
        ]
        cells += [row["limited_by"], f"{row['share']:.0%}"]
        rows.append([*cells, *(ms(row["predicted_s"][board]) for board in boards)])
    return grid(head, rows) + (
        f"\n\nOne core reads {part['bandwidth_gb_s']:.1f} GB/s and does {part['products_gflop_s']:.0f} GFLOP/s "
        "in FP32. The prediction is for an Orin Nano 8GB at 80 % of its memory's rate and by memory alone; no board "
        "was measured."
    )


def growth(parts: dict) -> str:
    rows = []
    for name, curve in parts["growth"]["curves"].items():
        first, last = curve["points"][0], curve["points"][-1]
        ends = [f"{ms(p['median'])} ms at {p['size']:g}" for p in (first, last)]
        rows.append([name, *ends, f"{curve['exponent']:.2f}"])
    return grid(["cost", "from", "to", "exponent"], rows)


def quality(parts: dict) -> str:
    part = parts["quality"]
    rows = [
        [f"typed, {part['typed']} held-out sentences: exact", f"{part['typed_exact']:.3f}"],
        [f"spoken, {part['n']} recordings of a new voice: ROUGE-L", f"{part['rougeL']:.3f}"],
        ["chance", f"{part['rougeL_chance']:.3f}"],
        ["word error rate of repeating", f"{part['wer']:.3f}"],
        [f"of {part['wordless']} sounds without a word answered", part["wordless_answered"]],
    ]
    return grid(["the general projector", ""], rows)


def training(parts: dict) -> str:
    part = parts["training"]
    forms, ratios = part["cost"]["forms"], part["cost"]["step_ratio"]
    rows = [
        [
            name,
            f"{row['step_s']:.3f}",
            f"{ratios[name]:.1f}x" if name in ratios else "",
            f"{row['peak_gb']:.2f}",
        ]
        for name, row in forms.items()
    ]
    return (
        f"{part['train_seconds']:.0f} s for {part['utterances']} recordings ({part['steps']} steps, one core, "
        f"{mib(part['peak_bytes'])} MiB): ROUGE-L {part['rougeL_before']:.3f} -> {part['rougeL_after']:.3f}, "
        f"WER {part['wer_before']:.3f} -> {part['wer_after']:.3f}.\n\n"
        + grid(["a step", "s", "over ours", "peak memory, GB"], rows)
    )


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "compare": ("Beside what would be used instead", compare),
    "inference": ("One answer, stage by stage", inference),
    "streaming": ("Time to first token, by length of the speech", streaming),
    "memory": ("Memory", memory),
    "limits": ("How far from the limit", limits),
    "growth": ("Growth", growth),
    "quality": ("Quality", quality),
    "training": ("Training", training),
}


def markdown(result: dict, pictures: list[str] = ()) -> str:
    """The whole report."""
    where = (
        result["machine"].get("jetson")
        or result["machine"].get("processor")
        or result["machine"]["system"]
    )
    state = [
        f"- {when}: " + ", ".join(f"{k} {v}" for k, v in result[when].items())
        for when in ("before", "after")
    ]
    head = [
        f"# {where}, {result['machine']['cores']} cores, {result['date']}",
        f"`{result['command']}`, {result['setting']['threads']} threads, {result['seconds']:.0f} s. "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".\n\nMilliseconds are medians, with the 10th and 90th percentile in brackets.",
        "\n".join(state),
    ]
    body = [
        f"## {TABLES[name][0]}\n\n{TABLES[name][1](result['parts'])}"
        for name in TABLES
        if name in result["parts"]
    ]
    return "\n\n".join([*head, *body, *(f"![{name}]({name})" for name in pictures)]) + "\n"


def write(path: Path, result: dict) -> None:
    """The report and its pictures beside the result at `path`."""
    drawn = {"growth": draw_growth, "inference": draw_stages}
    pictures = []
    for name, draw in drawn.items():
        if name in result["parts"]:
            pictures.append(f"{path.stem}-{name}.png")
            with written_file(path.with_name(pictures[-1])) as file:
                draw(result["parts"][name], file)
    write_text(path.with_suffix(".md"), markdown(result, pictures))


def draw_growth(part: dict, file: Path) -> None:
    """Every curve on logarithmic axes, one panel each."""
    figure = new_figure(9, 5)
    for place, (name, curve) in enumerate(part["curves"].items(), 1):
        cost, _, over = name.partition(" over ")
        axes = figure.add_subplot(
            2, 3, place, title=f"{cost}: exponent {curve['exponent']:.2f}", xlabel=over
        )
        sizes, points = [p["size"] for p in curve["points"]], curve["points"]
        axes.fill_between(
            sizes, *([1e3 * p[q] for p in points] for q in ("p10", "p90")), color="0.85"
        )
        axes.loglog(sizes, [1e3 * p["median"] for p in points], "-o", color="0", markersize=4)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.tick_params(labelsize=8)
        axes.minorticks_off()
        axes.set_ylabel("ms")
        axes.title.set_fontsize(9)
    figure.savefig(file, dpi=110, format="png")


def draw_stages(part: dict, file: Path) -> None:
    """One answer's stages, with their 10th and 90th percentile."""
    ours = part["summary"][OURS]
    figure = new_figure(7, 3)
    axes = figure.add_subplot(xlabel="ms", title=f"one answer to {part['audio_s']:.1f} s of speech")
    medians = [1e3 * ours[name]["median"] for name in STAGES]
    around = [
        [1e3 * abs(ours[name][q] - ours[name]["median"]) for name in STAGES] for q in ("p10", "p90")
    ]
    axes.barh(
        STAGES,
        medians,
        xerr=around,
        color="0.6",
        edgecolor="0",
        error_kw={"elinewidth": 1, "capsize": 3},
    )
    axes.invert_yaxis()
    figure.savefig(file, dpi=110, format="png")
