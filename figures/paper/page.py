"""What a study is written as: each drawing with its table and provenance, and the page of claims.

The page counts layers and tasks from 1, as the paper does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from cil.files import atomically, write_text
from figures import style
from figures.paper.artifacts import ARTIFACTS, Built, NotRun
from figures.paper.claims import claims_of
from figures.paper.judge import FAILS, HOLDS, MIN_SEEDS, NO_EFFECT, UNDECIDED
from figures.paper.selection import Tables
from locality_probe.tables import CLAIMS

ALL_PARTS_DECIDE = (
    "Statistics and rule were fixed beforehand: `figures/paper/claims/general.py`, `figures/paper/judge.py`. Above 0 is what "
    "the paper says. Intervals are 95 %: Student's t over seeds, for all parts of a claim at once, and bootstrap over images. "
    f"A part holds where both lie above 0, does not hold where both lie below; fewer than {MIN_SEEDS} seeds decide nothing.\n"
    "A claim holds if all its parts do, and does not hold if one of them does not. C2* is a control, added after C2 was "
    "looked at."
)
REGISTERED = {  # scale with claims of its own -> where and when they were registered
    "learned": "Statistics and rule were registered on 2026-11-26, before the main runs had ended: "
    "`figures/paper/claims/registered.py`, `figures/paper/judge.py`. ",
}
ONE_PART_DECIDES = (
    "Above 0 is what the paper says. One statistic per claim decides it: the one in bold. The other parts are shown and never "
    "decide. Intervals are 95 %, over seeds, paired: Student's t and, from six seeds on, the exact interval of the sign-flip "
    "test; the wider one is shown, for all parts that do not decide at once. The verdict is the first that is true: fewer than "
    f"{MIN_SEEDS} seeds, {UNDECIDED}; the interval inside -margin to margin, {NO_EFFECT}; above 0, {HOLDS}; below 0, {FAILS}; "
    f"else {UNDECIDED}. Margin is the smallest effect that matters. Power is the chance that so many seeds, which spread as "
    "these do, have a t interval above 0 if the true effect is twice the margin."
)


def write(built: Built, tables: Tables, out: str | Path, echo: Callable[[str], None] = print) -> None:
    """NAME.png, .pdf, .csv and .txt (provenance) of each figure, NAME.md, .csv and .txt of each table, in the folder `out`.

    What was not run is said, not drawn, and an earlier drawing of it goes.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, made in built.items():
        if isinstance(made, NotRun):
            for suffix in (".png", ".pdf", ".csv", ".txt", ".md"):
                (out / f"{name}{suffix}").unlink(missing_ok=True)
            echo(f"{name}: not run ({made})")
            continue
        frame, drawn, runs = made
        atomically(out / f"{name}.csv", functools.partial(_nine_digits(frame).to_csv, index=False))
        write_text(out / f"{name}.txt", f"{ARTIFACTS[name].title}. {provenance_line(tables, name, runs)}\n")
        if isinstance(drawn, str):
            write_text(out / f"{name}.md", drawn)
            echo(f"wrote {out / name}.md, .csv")
        else:
            for suffix in (".png", ".pdf"):
                style.save(drawn, out / f"{name}{suffix}")
            echo(f"wrote {out / name}.png, .pdf, .csv")


def write_claims(judged: pd.DataFrame, out: str | Path, echo: Callable[[str], None] = print) -> None:
    """claims.csv and claims.md in the folder `out`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    CLAIMS.write(_nine_digits(judged), out / "claims.csv")
    write_text(out / "claims.md", claims_page(judged))
    echo(f"wrote {out / 'claims'}.csv, .md")


def _nine_digits(frame: pd.DataFrame) -> pd.DataFrame:
    """With numbers of nine significant digits: the last of sixteen differ from one CPU to the next."""
    numbers = frame.select_dtypes("float")
    return frame.assign(**numbers.map(lambda value: float(f"{value:.9g}")))


def provenance_line(tables: Tables, name: str, runs: Iterable[str]) -> str:
    """A line: scale, how many runs and seeds, by which commits and torch, and the images that NAME's measurements took."""
    rows = tables["runs.csv"].set_index("run").loc[list(dict.fromkeys(runs))]
    if rows.empty:
        return "Not run."
    measured = tables["measurements.csv"]
    measured = measured[measured["run"].isin(rows.index) & measured["kind"].isin(ARTIFACTS[name].kinds)]
    seeds = sorted(rows["seed"].unique())
    seeds_words = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    shown = [
        f"{kind}: {images} images of {source} ({', '.join(sha[:8] for sha in same['sha256'].unique())})"
        for (kind, images, source), same in measured[measured["sha256"] != ""].groupby(["kind", "images", "source"])
    ]
    words = [
        f"Scale {rows['scale'].iloc[0]}", f"{len(rows)} runs, {seeds_words}", f"{rows['steps'].sum()} training steps",
        f"trained at {', '.join(sorted(rows['git'].unique()))} with torch {', '.join(sorted(rows['torch'].unique()))}",
    ]  # fmt: skip
    return "; ".join(words + shown) + "."


def claims_page(judged: pd.DataFrame) -> str:
    """CLAIMS as Markdown: one verdict per claim, and below each the numbers that it rests on.

    Where one part alone decides, it is in bold and marked, and margin and power are shown.
    """
    scale = judged["scale"].iloc[0] if len(judged) else ""
    decides = {name: claim.decides for name, claim in claims_of(scale).items() if claim.decides}
    rule = REGISTERED.get(scale, "") + ONE_PART_DECIDES if decides else ALL_PARTS_DECIDE
    lines = ["# The paper's claims", "", f"Scale `{scale}`. {rule}", "", "| claim | verdict | why |", "|---|---|---|"]
    for row in judged[judged["part"] == ""].itertuples():
        lines.append(f"| {row.claim}: {row.statistic} | **{row.verdict}** | {row.reason} |")
    head = ["over seeds", "margin", "power"] if decides else ["over seeds", "over images"]
    head = ["part", "statistic", "mean", *head, "n", "verdict"]
    for claim, rows in judged[judged["part"] != ""].groupby("claim"):
        lines += ["", f"## {claim}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [_part_line(row, decides.get(claim, "") if decides else None) for row in rows.itertuples()]
    return "\n".join(lines) + "\n"


def _part_line(row, decides: str | None) -> str:
    """A part as a row of the page's table. decides: the part that decides its claim; None where all parts do."""

    def ends(low: float, high: float) -> str:
        return f"{low:+.3g} to {high:+.3g}" if low == low else "-"

    part, shown = row.part, [ends(row.low, row.high), ends(row.low_images, row.high_images)]
    if decides is not None:
        part = f"**{part} (decides)**" if part == decides else part
        shown = [shown[0], *("-" if np.isnan(value) else f"{value:.3g}" for value in (row.margin, row.power))]
    return (
        f"| {part} | {row.statistic} ({row.unit}) | {row.value:+.3g} | {' | '.join(shown)} | {row.seeds} "
        f"(images: {row.images}) | {row.verdict} |"
    )
