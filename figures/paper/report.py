"""One self-contained HTML file of a study: verdicts, tables, figures, and a viewer of attention. No server, no network."""

from __future__ import annotations

import base64
import html
import io
import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from cil.files import write_text
from figures import paper_tables, style
from figures.paper.artifact import SECTIONS
from figures.paper.artifacts import ARTIFACTS, Built, NotRun, in_section
from figures.paper.artifacts.common import WORDS, setting_title, usual
from figures.paper.artifacts.distances import REGIME, distances_of
from figures.paper.judge import FAILS, HOLDS, NO_EFFECT
from figures.paper.page import provenance_line
from figures.paper.selection import Tables
from locality_probe.tables import INITIAL, after_tasks

TEMPLATE = Path(__file__).with_name("report.html")
PICTURES = [section for section in SECTIONS if section != "tables"]
MOST_BYTES = 15_000_000
SIDES = (("incremental", False, "CIL"), ("joint", False, "joint"), ("incremental", True, "CIL with LPA"))


def write(tables: Tables, built: Built, judged: pd.DataFrame, path: str | Path) -> Path:
    """The report of a study, under 15 MB. built: of all ARTIFACTS; judged: the table CLAIMS."""
    text = render(tables, built, judged)
    assert len(text.encode()) < MOST_BYTES, "the viewer's example images are too many"
    write_text(Path(path), text)
    return Path(path)


def render(tables: Tables, built: Built, judged: pd.DataFrame) -> str:
    scale = tables["runs.csv"]["scale"].iloc[0]
    parts = {
        "scale": html.escape(scale),
        "summary": summary(tables),
        "verdicts": verdicts(judged),
        "evidence": evidence(judged),
        "distances": distances(tables),
        "heat": of_artifact(built, "gap", lambda frame, drawn, runs: heat(frame)),
        "tables": artifacts_of(built, ["tables"], partial(accuracy, tables)),
        "figures": artifacts_of(built, PICTURES, partial(picture, tables)),
        "provenance": provenance(tables),
        "data": json.dumps(viewer(tables)).replace("<", "\\u003c"),  # nothing in it can end the script
    }
    text = TEMPLATE.read_text()
    for name, content in parts.items():
        text = text.replace(f"<!--{name}-->", content)
    return text


def artifacts_of(built: Built, sections: list[str], make: Callable[..., str]) -> str:
    """What `make(name, frame, drawing, runs)` gives for each figure or table of these sections, in their order."""
    names = [name for section in sections for name in in_section(section)]
    return "".join(of_artifact(built, name, partial(make, name)) for name in names)


def of_artifact(built: Built, name: str, make: Callable[..., str]) -> str:
    found = built[name]
    if isinstance(found, NotRun):
        return f'<p class="absent">{html.escape(ARTIFACTS[name].title)}: not run ({html.escape(str(found))})</p>'
    return make(*found)


def table(header: list[str], rows: list[list[str]], caption: str = "", classes: str = "") -> str:
    """Cells are HTML already; the first of a row is its heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )  # fmt: skip
    # Not in a <caption>, which would be as wide as the table, and a window may be narrower.
    above, label = (f'<p class="caption">{caption}</p>', f' aria-label="{caption}"') if caption else ("", "")
    whole = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'{above}<div class="scroll"><table class="{classes}"{label}>{whole}</table></div>'


def summary(tables: Tables) -> str:
    runs = tables["runs.csv"]
    settings = ", ".join(setting_title(s) for s in dict.fromkeys(runs["setting"]))
    hours = runs["seconds"].sum() / 3600
    return (
        f"{len(runs)} runs on {html.escape(settings)}; {runs['steps'].sum():,} training steps in {hours:.1f} hours, "
        f"one by one; seeds {', '.join(map(str, sorted(runs['seed'].unique())))}."
    )


def verdicts(judged: pd.DataFrame) -> str:
    rows = []
    for row in judged[judged["part"] == ""].itertuples():
        mark = {HOLDS: "yes", FAILS: "no", NO_EFFECT: "no"}.get(row.verdict, "open")
        rows.append(
            [row.claim, html.escape(row.statistic), f'<td class="{mark}">{row.verdict}</td>', html.escape(row.reason)]
        )
    return table(["claim", "what the paper says", "here", "why"], rows)


def evidence(judged: pd.DataFrame) -> str:
    def ends(low: float, high: float) -> str:
        return "-" if np.isnan(low) else f"{low:+.3g} to {high:+.3g}"

    rows = [
        [f"{r.claim}, {html.escape(r.part)}", html.escape(r.statistic), f"{r.value:+.3g} {html.escape(r.unit)}",
         ends(r.low, r.high), ends(r.low_images, r.high_images), f"{r.seeds} / {r.images}", r.verdict]
        for r in judged[judged["part"] != ""].itertuples()
    ]  # fmt: skip
    return table(
        ["part", "statistic", "mean", "95 % over seeds", "95 % over images", "seeds / images", "verdict"], rows
    )


def distances(tables: Tables) -> str:
    """D_loc, layer by task, of each system and training, with half its interval."""
    try:
        of_regimes = distances_of(tables, ("baseline", "dytox"), (False, True))
    except NotRun as error:
        return f'<p class="absent">Not run ({html.escape(str(error))})</p>'
    sure = of_regimes.intervals
    regimes = of_regimes.means.groupby(REGIME, sort=False)
    own = {regime: rows for regime, rows in sure[sure["other"] == ""].groupby(REGIME)}
    return "".join(
        distances_of_regime(f"{title}, {WORDS[training]}", means, own.get((title, training), sure.iloc[:0]))
        for (title, training), means in regimes
    )


def distances_of_regime(title: str, means: pd.DataFrame, own: pd.DataFrame) -> str:
    """A table of D_loc, one row per task and one column per layer. means: NONLOCALITY; own: INTERVALS of these very means."""
    own = own.set_index(["task", "layer"])
    values = means.groupby(["task", "layer"], sort=False)["d_loc"].mean().unstack("layer").sort_index()
    body = []
    for task, cells in values.iterrows():
        texts = []
        for layer, value in cells.items():
            low, high = own.loc[(task, layer), ["low", "high"]] if (task, layer) in own.index else (np.nan, np.nan)
            texts.append(f"{value:.3f}" + (f" <small>± {(high - low) / 2:.3f}</small>" if low == low else ""))
        body.append(["as initialised" if task == INITIAL else f"task {task + 1}", *texts])
    over, n = own[["over", "n"]].iloc[0] if len(own) else ("", 0)
    caption = (
        f"{html.escape(title)}: D_loc in patches, ± half a 95 % interval over {n} {over}; "
        f"uniform {means['d_uniform'].iloc[0]:.3f}"
    )
    return table(["", *(f"layer {layer + 1}" for layer in values.columns)], body, caption, "numbers")


def heat(frame: pd.DataFrame) -> str:
    """CIL minus joint, layers by tasks, as coloured cells."""
    most, blocks = frame["difference"].abs().max(), []
    for title, rows in frame.groupby("title", sort=False):
        body = []
        for layer, cells in rows.groupby("layer"):
            texts = [
                f'<td class="{"more" if c.difference > 0 else "less"}" style="--share:{abs(c.difference) / most:.2f}" '
                f'title="{c.low:+.3f} to {c.high:+.3f}, 95 % over {c.n} {c.over}">'
                + ("<b>{}</b>" if c.low > 0 or c.high < 0 else "{}").format(f"{round(c.difference, 3) + 0:+.3f}") + "</td>"
                for c in cells.sort_values("task").itertuples()
            ]  # fmt: skip
            body.append([f"layer {layer + 1}", *texts])
        header = ["", *(f"task {task + 1}" for task in sorted(rows["task"].unique()))]
        caption = f"{html.escape(title)}: D_loc of CIL minus joint, patches; bold: the 95 % interval excludes 0"
        blocks.append(table(header, body, caption, "numbers"))
    return "".join(blocks)


def accuracy(tables: Tables, name: str, frame: pd.DataFrame, page: str, runs: list[str]) -> str:
    """One of the paper's Tables: frame has the columns of paper_tables."""
    rows = []
    for (scenario, title), cells in frame.groupby(["scenario", "title"], sort=False):
        cells, texts = cells.set_index("metric"), []
        for metric in paper_tables.METRICS:
            published, ours, sd = cells.loc[metric, ["published", "ours", "sd"]]
            texts.append("-" if np.isnan(published) else f"{published:.2f}")
            spread = "" if np.isnan(sd) else f" <small>± {sd:.2f}</small>"
            texts.append("not run" if np.isnan(ours) else f"{ours:.2f}{spread}")
        rows.append([f"{html.escape(scenario)}, {html.escape(title)}", *texts, str(int(cells["seeds"].iloc[0]) or "")])
    header = ["", *(f"{m}, {who}" for m in paper_tables.METRICS for who in ("published", "ours")), "seeds"]
    behind = html.escape(provenance_line(tables, name, runs))
    caption = f"{ARTIFACTS[name].title}, percent, ± standard deviation over seeds. {behind}"
    return table(header, rows, caption, "numbers")


def picture(tables: Tables, name: str, frame: pd.DataFrame, figure: Figure, runs: list[str]) -> str:
    """A figure as a PNG in the page, with its title and provenance."""
    file = io.BytesIO()
    with style.look():
        figure.savefig(file, format="png", dpi=144, metadata=style.METADATA[".png"])
    title = html.escape(ARTIFACTS[name].title)
    return (
        f'<figure id="{name}"><img src="{uri(file.getvalue())}" alt="{title}"><figcaption>{title}. '
        f"{html.escape(provenance_line(tables, name, runs))}</figcaption></figure>"
    )


def provenance(tables: Tables) -> str:
    rows = [
        [html.escape(str(cell)) for cell in (r.run, r.training, r.seed, r.tasks, f"{r.steps:,}", f"{r.seconds / 60:.1f}",
                                             r.git, r.torch)]
        for r in tables["runs.csv"].itertuples()
    ]  # fmt: skip
    return table(["run", "training", "seed", "tasks", "steps", "minutes", "commit", "torch"], rows)


def uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def viewer(tables: Tables) -> dict[str, object]:
    """What the page's script reads. Attention is [task, layer, head, image, query, key], in 255ths of its row's largest.

    d_loc is that of the table, over the test images of the study: side -> [task][layer][head], patches.
    """
    rows, runs = tables["attention.parquet"], usual(tables)
    runs = runs[runs["run"].isin(rows["run"]) & (runs["method"] == "baseline")].sort_values("seed")
    if runs.empty:
        return {}
    sides = []
    examples = {r.image: r for r in tables["examples.parquet"].itertuples()}
    keys = ["task", "layer", "head", "image", "query"]
    shape = None
    for training, lpa, label in SIDES:
        mine = runs[(runs["training"] == training) & ((runs["n_lpa"] > 0) == lpa)]
        if mine.empty:
            continue
        run = mine["run"].iloc[0]
        of_run = rows[rows["run"] == run].sort_values(keys)
        shape = [int(of_run[key].nunique()) for key in keys]
        distance = after_tasks(tables["nonlocality.parquet"])
        distance = distance[(distance["run"] == run) & (distance["task"] != INITIAL)]
        distance = distance[distance["layer"].isin(of_run["layer"])].sort_values(["task", "layer", "head"])
        sides.append({
            "label": label, "run": run, "images": int(distance["images"].iloc[0]),
            "weights": _packed(b"".join(of_run["weights"])),
            "peak": _packed(of_run["peak"].to_numpy("<f4").tobytes()),
            "distance": _packed(of_run["distance"].to_numpy("<f4").tobytes()),
            "d_loc": distance["d_loc"].to_numpy().reshape(shape[:3]).tolist(),
            "uniform": float(distance["d_uniform"].iloc[0]),
        })  # fmt: skip
    names = sorted(rows["image"].unique())
    grid = [int(rows[key].iloc[0]) for key in ("grid_rows", "grid_columns")]
    return {
        "shape": shape, "grid": grid, "sides": sides, "layers": sorted(int(i) for i in rows["layer"].unique()),
        "images": [{"name": name, "credit": examples[name].credit, "picture": _png(examples[name])} for name in names],
    }  # fmt: skip


def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _png(example) -> str:
    pixels = np.frombuffer(example.rgb, np.uint8).reshape(example.rows, example.columns, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return uri(file.getvalue())
