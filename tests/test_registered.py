"""The scale `learned`: the registered statistics by formula, the rule, the exact interval and the power."""

import functools
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest

from figures.paper import judge as rules
from figures.paper.claims import claims_of, judge
from figures.paper.judge import FAILS, HOLDS, NO_EFFECT, UNDECIDED, interval, power
from figures.paper.page import claims_page
from locality_probe.intervals import over_seeds

PRIMARY = {name: claim.decides for name, claim in claims_of("learned").items()}

TASKS, LAYERS, IMAGES, DIM = 5, 3, 4, 8
START_LPA = 0.3  # patches by which LPA starts below the baseline
GROWTH = {  # of D_loc, patches a task and layer + 1, of seed 0
    "incremental": 0.02,
    "joint": 0.01,
    "joint-terminal": 0.008,
    "joint-as-long": 0.025,
}
GROWTH_LPA = 0.004
LEARNT = 0.1  # patches by which the first task moves the baseline; LPA moves by half of it
CONTROLS = {
    "baseline-mhsa": {"attention": "mhsa"},
    "baseline-gate": {"gate_init": -2.0},
    "baseline-lpa-frozen": {"positional_frozen": True},
    "baseline-lpa-random": {"positional_start": "random"},
}
LAMBDAS = {f"baseline-lambda-{value:g}": value for value in (0.002, 0.2, 1.0)}
DEPTHS = {"baseline-nlpa-1": 1, "baseline-nlpa-2": 2}
GAINS = {"b2-2": 0.04, "b6-2": 0.03, "b2-2-alphabetical": 0.02}  # accuracy with LPA minus without


def spread(seed: int) -> float:
    """What a seed makes of an effect: a factor near 1."""
    return 1 + 0.05 * (seed * 7 % 5 - 2)


def mean_spread(seeds: int) -> float:
    return float(np.mean([spread(seed) for seed in range(seeds)]))


def gain(system: str, setting: str, seed: int) -> float:
    """Accuracy of a system minus that of the one without LPA, 0 to 1; half of what dytox gains."""
    whole = GAINS[setting] * spread(seed) * (0.5 if system.startswith("dytox") else 1)
    if system in LAMBDAS:
        return whole - 0.01 * abs(math.log10(LAMBDAS[system] / 0.02))
    if system in DEPTHS:
        return whole * (DEPTHS[system] / LAYERS) ** 2
    return whole if system.endswith("-lpa") else 0.0


def forgets(system: str) -> float:
    return 0.02 if system.endswith("-lpa") else 0.03


def d_loc(system: str, training: str, seed: int, task: int, layer: int, image: int) -> float:
    lpa = system.endswith("-lpa")
    level = 0.6 + 0.02 * layer - START_LPA * lpa + 0.01 * image
    grown = (GROWTH_LPA if lpa else GROWTH[training]) * (layer + 1) * max(task, 0) * spread(seed)
    return level - LEARNT * (0.5 if lpa else 1) * (task < 0) + grown


PLANNED = [
    *(
        ("b2-2", s, t, 8)
        for s in ("baseline", "baseline-lpa")
        for t in ("incremental", "joint-as-long", "joint-terminal")
    ),
    *(("b2-2", s, "joint", 2) for s in ("baseline", "baseline-lpa")),
    *(("b2-2", "baseline-mhsa", t, 5) for t in ("incremental", "joint-as-long")),
    *(("b2-2", s, "incremental", 4) for s in [*list(CONTROLS)[1:], *LAMBDAS, *DEPTHS, "dytox", "dytox-lpa"]),
    *(("b6-2", s, "incremental", 4) for s in ("baseline", "baseline-lpa")),
    *(("b2-2-alphabetical", s, "incremental", 3) for s in ("baseline", "baseline-lpa")),
]


def make(planned=PLANNED) -> dict[str, pd.DataFrame]:
    """A study of planned runs (setting, system, training, number of seeds): the tables and columns that claims read."""
    rows: dict[str, list] = {f: [] for f in ("runs.csv", "measurements.csv", "accuracy.csv", "layer_images.parquet",
                                             "spectrum.parquet", "spectrum_summary.parquet", "transfer.parquet")}  # fmt: skip
    for setting, system, training, seeds in planned:
        for seed in range(seeds):
            add(rows, setting, system, training, seed)
    return {file: pd.DataFrame(of_file) for file, of_file in rows.items()}


def name_of(setting: str, system: str, seed: int, training: str = "incremental") -> str:
    return f"learned-{setting}-{system}-s{seed}" + f"-{training}" * (training != "incremental")


def add(rows: dict[str, list], setting: str, system: str, training: str, seed: int) -> None:
    run = name_of(setting, system, seed, training)
    base, lpa, control = system.split("-")[0], system.split("-")[1:2] == ["lpa"], system in CONTROLS
    n_lpa = DEPTHS.get(system, LAYERS * (lpa or system in LAMBDAS))
    settings = {"recipe": run, "training": training, "seed": seed, "scenario": setting, "method": base, "n_lpa": n_lpa,
                "lambda_init": LAMBDAS.get(system, 0.02), "epochs": 10,
                "checkpoints": "0,10" * (seed == 0 and not lpa)} | CONTROLS.get(system, {})  # fmt: skip
    steps = {"incremental": 1000, "joint": 1500, "joint-terminal": 400, "joint-as-long": 995}[training]
    rows["runs.csv"].append({
        "run": run, "scale": "learned", "setting": setting, "system": system, "method": base, "n_lpa": n_lpa,
        "lpa_blocks": LAYERS, "lambda_init": settings["lambda_init"], "training": training, "seed": seed, "steps": steps,
        "trainer": 2, "settings": json.dumps(settings),
    })  # fmt: skip
    for kind in ("accuracy", "nonlocality", "spectrum", "transfer"):
        rows["measurements.csv"].append({"run": run, "kind": kind, "images": IMAGES, "sha256": "f"})
    terminal = training in ("joint-terminal", "joint-as-long")
    tasks = [TASKS - 1] if terminal else range(TASKS)
    for task in tasks:
        for on_task in range(task + 1):
            share = 0.7 + 0.01 * spread(seed) + gain(system, setting, seed) - forgets(system) * (task - on_task)
            rows["accuracy.csv"].append({"run": run, "task": task, "on_task": on_task, "images": 100, "correct": 0,
                                         "accuracy": 0.01 if control else share})  # fmt: skip
    for task, layer, image in itertools.product([-1, *tasks], range(LAYERS), range(IMAGES)):
        value = 9.0 if control else d_loc(system, training, seed, task, layer, image)
        place = {"run": run, "task": task, "layer": layer, "image": image}
        rows["layer_images.parquet"].append(place | {"at_step": -1, "d_loc": np.float32(value)})
        if task == 0:  # a checkpoint inside the task
            rows["layer_images.parquet"].append(place | {"at_step": 10, "d_loc": np.float32(7.0)})
    place = {"run": run, "layer": "token", "group": "all"}
    for task, rank in itertools.product(tasks, range(DIM)):
        larger = 10 ** (0.1 * spread(seed) * (1 - rank / 10)) if lpa else 1.0
        rows["spectrum.parquet"].append(place | {"task": task, "rank": rank, "eigenvalue": 0.5**rank * larger})
    for task in tasks:
        rows["spectrum_summary.parquet"].append(place | {"task": task, "effective_rank": 4.0 + lpa * spread(seed)})
    for task, layer in itertools.product(range(TASKS - 1) if not terminal else [], range(LAYERS)):
        accuracy = 0.6 - 0.1 * layer if task else 0.6 - 0.1 * (layer == 1)  # at task 0: ranks 2.5, 1, 2.5
        rows["transfer.parquet"].append({
            "run": run, "task": task, "layer": f"block {layer}", "group": "future", "control": "none", "probe": "linear",
            "test_images": 40, "accuracy": accuracy,
        })  # fmt: skip


@pytest.fixture(scope="module")
def tables():
    return make()


@pytest.fixture(scope="module")
def judged(tables):
    return judge(tables).set_index(["claim", "part"])


def average(system: str, seed: int, setting: str = "b2-2") -> float:
    """Avg of the formula, percent."""
    forgotten = np.mean([np.mean([forgets(system) * (t - j) for j in range(t + 1)]) for t in range(TASKS)])
    return 100 * (0.7 + 0.01 * spread(seed) + gain(system, setting, seed) - forgotten)


def differences(left: str, right: str, seeds: int, setting: str = "b2-2") -> np.ndarray:
    return np.array([average(left, s, setting) - average(right, s, setting) for s in range(seeds)])


# What is computed.

LATER, LAYER = TASKS - 1, np.mean([layer + 1 for layer in range(LAYERS)])  # tasks after the first; mean of layer + 1


def test_distances_of_the_primaries_are_those_of_the_formula(judged):
    each = LATER * LAYER * mean_spread(8)
    expected = {
        "C1": GROWTH["incremental"] * each,
        "C2": (GROWTH["incremental"] - GROWTH["joint-terminal"]) * each,
        "C2*": (GROWTH["incremental"] - GROWTH["joint-as-long"]) * each,
        "C3": (GROWTH["incremental"] - GROWTH_LPA) * each,
    }
    for claim, value in expected.items():
        row = judged.loc[(claim, PRIMARY[claim])]
        assert row["value"] == pytest.approx(value, abs=1e-6), claim
        assert (row["seeds"], row["images"], row["margin"], row["unit"]) == (8, IMAGES, 0.02, "patches")
    assert [judged.loc[(claim, ""), "verdict"] for claim in expected] == [HOLDS, HOLDS, FAILS, HOLDS]


def test_distances_of_the_secondary_parts(judged):
    for layer in range(LAYERS):
        value = GROWTH["incremental"] * (layer + 1) * LATER * mean_spread(8)
        assert judged.loc[("C1", f"layer {layer + 1}"), "value"] == pytest.approx(value, abs=1e-6)
    deep = judged.loc[("C1", "most in deep layers")]
    assert deep["value"] == pytest.approx(GROWTH["incremental"] * LATER * mean_spread(8), abs=1e-6)
    assert np.isnan(deep["margin"]) and np.isnan(deep["power"])
    by_task = judged.loc[("C2", "task by task")]
    assert by_task["value"] == pytest.approx(0.01 * LAYER * 2.5 * mean_spread(2), abs=1e-6)
    assert (by_task["seeds"], by_task["verdict"], by_task["reason"]) == (2, UNDECIDED, "2 of at least 3 seeds")
    level = START_LPA + (GROWTH["incremental"] - GROWTH_LPA) * LATER * LAYER * mean_spread(8)
    assert judged.loc[("C3", "level"), "value"] == pytest.approx(level, abs=1e-6)
    since_start = level - START_LPA + LEARNT / 2
    assert judged.loc[("C3", "level less its start"), "value"] == pytest.approx(since_start, abs=1e-6)


def test_accuracies_are_those_of_the_formula(judged):
    rows = judged.loc["C4"].drop("")
    assert list(rows.index) == ["Avg", "Last", "Fgt", "Avg, B6-2", "Avg, DyTox+", "Avg, alphabetical"]
    assert list(rows["seeds"]) == [8, 8, 8, 4, 4, 3]
    assert rows.loc["Avg", "value"] == pytest.approx(differences("baseline-lpa", "baseline", 8).mean())
    # Forgetting is 0.02 a task later with LPA, 0.03 without: after the last task 1, 2, 3 and 4 tasks later.
    assert rows.loc["Fgt", "value"] == pytest.approx(100 * 0.01 * 2.5)
    assert rows.loc["Last", "value"] == pytest.approx(100 * (0.04 * mean_spread(8) + 0.01 * 2))
    for part, pair, seeds, setting in (
        ("Avg, B6-2", ("baseline-lpa", "baseline"), 4, "b6-2"),
        ("Avg, DyTox+", ("dytox-lpa", "dytox"), 4, "b2-2"),
        ("Avg, alphabetical", ("baseline-lpa", "baseline"), 3, "b2-2-alphabetical"),
    ):
        assert rows.loc[part, "value"] == pytest.approx(differences(*pair, seeds, setting).mean()), part


def test_eigenvalues_are_those_of_the_formula(judged):
    rows = judged.loc["C5"]
    decades = 0.1 * (1 - np.arange(DIM) / 10) * mean_spread(8)
    assert rows.loc["eigenvalues", "value"] == pytest.approx(decades.mean())
    assert rows.loc["eigenvalues", "margin"] == pytest.approx(math.log10(1.05))
    assert rows.loc["largest five", "value"] == pytest.approx(decades[:5].mean())
    assert rows.loc["effective rank", "value"] == pytest.approx(mean_spread(8))


def test_sweeps_are_those_of_the_formula(judged):
    rows = judged.loc["C6"].drop("")
    against = [differences("baseline-lpa", system, 4).mean() for system in LAMBDAS]
    assert list(rows.index) == [PRIMARY["C6"], "against 0.002", "against 0.2", "against 1"]
    assert list(rows["value"]) == pytest.approx([np.mean(against), *against])
    rows = judged.loc["C7"].drop("")
    averages = [np.mean([average(s, seed) for seed in range(4)]) for s in ("baseline", *DEPTHS, "baseline-lpa")]
    assert rows.loc["slope", "value"] == pytest.approx(np.polyfit(range(4), averages, 1)[0])
    assert rows.loc["slope", "margin"] == pytest.approx(1 / 3)
    assert list(rows.loc["0 to 1":"2 to 3", "value"]) == pytest.approx(np.diff(averages))
    assert set(rows["seeds"]) == {4}


def test_rank_correlations_are_those_of_the_formula(judged):
    rows = judged.loc["C8"].drop("")
    # At task 0 accuracy has ranks 2.5, 1, 2.5 over depth: rho 0. At tasks 1, 2, 3 it falls with depth: minus rho is 1.
    assert rows.loc["local and useful", "value"] == pytest.approx(3 / 4)
    assert rows.loc["shallow is local", "value"] == pytest.approx(1)
    assert set(rows["margin"]) == {0.2}


def test_a_seed_counts_only_where_the_whole_sweep_is_there():
    planned = [("b2-2", s, "incremental", 4) for s in ("baseline", "baseline-lpa", *LAMBDAS, *DEPTHS)]
    planned[2], planned[-1] = (*planned[2][:3], 3), (*planned[-1][:3], 2)
    judged = judge(make(planned)).set_index(["claim", "part"])
    assert list(judged.loc["C6"].drop("")["seeds"]) == [3, 3, 4, 4]
    assert set(judged.loc["C7"].drop("")["seeds"]) == {2}


# Which runs.


def test_controls_are_neither_baseline_nor_lpa(tables, judged):
    assert set(tables["runs.csv"]["system"]) > set(CONTROLS)
    without = judge(make([plan for plan in PLANNED if plan[1] not in CONTROLS])).set_index(["claim", "part"])
    pd.testing.assert_frame_equal(judged, without)


def test_checkpoints_inside_a_task_are_left_out(tables, judged):
    rows = tables["layer_images.parquet"]
    old = rows[rows["at_step"] == -1].drop(columns="at_step")  # as studies without checkpoints have it
    assert len(old) < len(rows)
    pd.testing.assert_frame_equal(judged, judge(tables | {"layer_images.parquet": old}).set_index(["claim", "part"]))


SMALL = [("b2-2", s, t, 4) for s in ("baseline", "baseline-lpa") for t in ("incremental", "joint-as-long")]


@functools.cache
def small() -> dict[str, pd.DataFrame]:
    return make(SMALL)


def changed(run: str, **values) -> dict[str, pd.DataFrame]:
    """A small study in which columns or settings of one run are others."""
    runs = small()["runs.csv"].copy()
    mine = runs["run"] == run
    for key, value in values.items():
        if key in runs:
            runs.loc[mine, key] = value
        else:
            runs.loc[mine, "settings"] = json.dumps(json.loads(runs.loc[mine, "settings"].iloc[0]) | {key: value})
    return small() | {"runs.csv": runs}


@pytest.mark.parametrize(
    ("key", "value"), [("trainer", 1), ("steps", 999), ("epochs", 11), ("positional_frozen", True)]
)
def test_a_confounder_is_refused_by_name(key, value):
    run, other = name_of("b2-2", "baseline-lpa", 1), name_of("b2-2", "baseline", 1)
    judged = judge(changed(run, **{key: value})).set_index(["claim", "part"])
    for claim in ("C3", "C4", "C5"):
        assert judged.loc[(claim, PRIMARY[claim]), "seeds"] == 3
        assert f"refused: {run} and {other} differ in {key}" in judged.loc[(claim, ""), "reason"]
    assert judged.loc[("C1", "growth"), "seeds"] == 4


def test_joint_training_as_long_is_of_the_same_trainer_and_as_long():
    run = name_of("b2-2", "baseline", 1, "joint-as-long")
    for values in ({"trainer": 1}, {"steps": 970}):
        judged = judge(changed(run, **values)).set_index(["claim", "part"])
        assert judged.loc[("C2*", "CIL minus joint"), "seeds"] == 3
        assert f"and {run} differ in {next(iter(values))}" in judged.loc[("C2*", ""), "reason"]


def test_runs_of_a_study_that_does_not_know_trainers_are_compared():
    old = judge(small() | {"runs.csv": small()["runs.csv"].drop(columns="trainer")})
    pd.testing.assert_frame_equal(old, judge(small()))


# The rule.


def test_the_primary_part_comes_first_and_alone_decides(judged):
    for claim in PRIMARY:
        assert judged.loc[claim].index[1] == PRIMARY[claim]
        whole, primary = judged.loc[(claim, "")], judged.loc[(claim, PRIMARY[claim])]
        assert (whole["verdict"], whole["seeds"]) == (primary["verdict"], primary["seeds"])
        assert whole["reason"] == f"{PRIMARY[claim]} decides: {primary['reason']}"
    assert judged["low_images"].isna().all() and judged["high_images"].isna().all()


def test_secondary_parts_never_decide():
    part = {"part": "layer 1", "verdict": FAILS, "reason": "", "seeds": 8, "images": 4}
    for primary in (HOLDS, UNDECIDED, NO_EFFECT):
        parts = [part | {"part": PRIMARY["C1"], "verdict": primary, "reason": "why"}, part]
        assert rules._decided_whole(claims_of("learned")["C1"], parts, [], "learned")["verdict"] == primary
    alone = rules._decided_whole(claims_of("learned")["C1"], [part], ["refused: x"], "learned")
    assert (alone["verdict"], alone["reason"], alone["seeds"]) == (UNDECIDED, "not run; refused: x", 0)


def test_secondary_parts_hold_at_once_and_the_primary_is_not_corrected(tables, judged):
    gains = differences("baseline-lpa", "baseline", 8)
    row = judged.loc[("C4", "Avg")]
    assert (row["low"], row["high"]) == pytest.approx(interval(gains))
    assert row["power"] == pytest.approx(power(gains, 1.0))
    gains = differences("baseline-lpa", "baseline", 4, "b6-2")
    row = judged.loc[("C4", "Avg, B6-2")]
    assert (row["low"], row["high"]) == pytest.approx(tuple(over_seeds(gains, 5)))


def test_what_was_not_run_is_undecided_and_says_so():
    for tables in (small(), make([("b2-2", "baseline", "incremental", 2)])):
        judged = judge(tables).set_index(["claim", "part"])
        for claim in ("C2", "C6", "C7"):
            assert (judged.loc[(claim, ""), "verdict"], judged.loc[(claim, ""), "reason"]) == (UNDECIDED, "not run")
    assert judged.loc[("C1", ""), "reason"] == "growth decides: 2 of at least 3 seeds"
    assert judged.loc[("C1", "growth"), ["low", "power"]].isna().tolist() == [False, True]


def test_page_shows_margin_power_and_which_part_decides(judged):
    page = claims_page(judged.reset_index())
    assert page.count("(decides)") == len(PRIMARY) and "registered on 2026-11-26" in page
    assert "| part | statistic | mean | over seeds | margin | power | n | verdict |" in page
    for claim, part in PRIMARY.items():
        row, section = judged.loc[(claim, part)], page.split(f"## {claim}\n")[1].split("\n## ")[0]
        line = next(line for line in section.splitlines() if line.startswith(f"| **{part} (decides)** |"))
        assert f"| {row['margin']:.3g} | {row['power']:.3g} | {row['seeds']} (images: {row['images']}) |" in line
        assert line.endswith(f"| {row['verdict']} |")
        secondary = [line for line in section.splitlines() if line.startswith("| ") and "**" not in line]
        assert len(secondary) == len(judged.loc[claim]) - 1  # the head, and all parts but the one that decides
    assert "| most in deep layers |" in page and "| - | - | 8 (images: 4) |" in page
