"""What was asked for on the command line -> which networks to measure, on which images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cil import checkpoint
from cil.checkpoint import RunDir
from cil.files import read_json
from cil.tables import AFTER
from locality_probe.images import ProbeImages, load_images
from locality_probe.subject import Subject, from_file, from_model_option, from_run, is_task_of_run
from locality_probe.tables import INITIAL, NONLOCALITY
from locality_probe.typed import typed


@dataclass(frozen=True)
class Plan:
    """What `measure` will do: subjects, loaded when called; the images; the folder for the tables; the names of the runs, and
    the tasks of them that were asked for, none for all."""

    subjects: list[Callable[[], Subject]]
    images: ProbeImages
    out: Path
    names: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()
    asked: dict[str, str] = field(default_factory=dict)  # how a model that is no run was made

    def check_replaces(self, out: Path) -> None:
        """Raises ValueError where `out` holds a measurement of which this one would not replace all: on other images, of runs
        or tasks that are not measured now."""
        described, table = out / "measurement.json", out / "nonlocality.csv"
        if not described.is_file() and not table.is_file():
            return
        differ = []
        there = read_json(described) if described.is_file() else {}
        images, now = (there.get("images") if isinstance(there, dict) else None), self.images.describe()
        if isinstance(images, dict) and images.get("sha256") != now["sha256"]:
            same = (images.get("source"), images.get("n")) == (now["source"], now["n"])
            of = "others" if same else f"{now['n']} of {now['source']}"
            differ.append(f"on {images.get('n')} images of {images.get('source')}, now {of}")
        before = there.get("model") if isinstance(there, dict) else None
        if isinstance(before, dict) and before != self.asked:
            differ.append(
                f"of {' '.join(map(str, before.values()))}, now of {' '.join(self.asked.values()) or 'others'}"
            )
        if table.is_file():
            rows = NONLOCALITY.read(table)
            gone = sorted(set(rows["run"]) - set(self.names))
            if gone:
                differ.append(f"of {', '.join(gone)}, now of {', '.join(self.names)}")
            elif self.tasks and (left := sorted(set(rows["task"]) - {INITIAL, *self.tasks})):
                differ.append(f"of task {', '.join(map(str, left))} too")
        if differ:
            raise ValueError(
                f"{out} holds another measurement ({'; '.join(differ)}): give another --out, or --force to replace it"
            )


def make_plan(
    ckpts: list[str], model: str | None = None, weights: Path | None = None, pretrained: bool = False,
    images: str | None = None, n: int | None = None, seed: int = 0, tasks: list[int] | None = None,
    data_dir: str | None = None, warn: Callable[[str], None] = print, twins: bool = True,
    grid: tuple[int, int] | None = None, num_prefix_tokens: int | None = None, image_size: int | None = None,
) -> Plan:  # fmt: skip
    """Resolve the options of `locality-probe measure`. Raises ValueError for what is not there or does not go together.

    twins: whether joint twins that were not asked for are measured too; grid, num_prefix_tokens, image_size: of `model`.
    """
    if model:
        subject = from_model_option(model, weights, pretrained, warn, image_size)
        subject = replace(subject, grid=grid, num_prefix_tokens=num_prefix_tokens)
        drawn = load_images(images or "photos", n, seed, data_dir or "data")
        start = str(weights) if weights else "pretrained" if pretrained else "untrained"
        asked = {"name": model, "weights": start} | ({"image_size": str(image_size)} if image_size else {})
        return Plan([lambda: subject], drawn, Path("."), (subject.run,), asked=asked)
    files = list(dict.fromkeys(Path(c) for c in ckpts if Path(c).is_file()))
    given = [checkpoint.open_run(c) for c in ckpts if Path(c) not in files]
    directories, tasks = with_twins(given, warn), list(dict.fromkeys(tasks or ()))
    if not twins:
        directories = [d for d in directories if d.path in {g.path for g in given}]
    subjects: list[Callable[[], Subject]] = []
    of_user = {d.path for d in given}
    for directory in directories:
        # A twin that was not asked for may lack some of the tasks.
        wanted = tasks if directory.path in of_user else [t for t in tasks if t in directory.tasks]
        subjects += subjects_of([directory], wanted) if wanted or not tasks else []
    subjects += [functools.partial(from_file, path) for path in files]
    runs_of_files = {p.parent: checkpoint.open_run(p.parent) for p in files if is_task_of_run(p)}
    others = [(p.stem, p) for p in files if not is_task_of_run(p)]
    _refuse_equal_names([(d.name, d.path) for d in (*directories, *runs_of_files.values())] + others)
    runs = directories or list(runs_of_files.values())
    classes = None
    if images in (None, "dataset"):
        if not runs:
            raise ValueError(f"{files[0]} does not say on which images: give --images")
        images, classes = runs[0].run.dataset, sorted(set().union(*(d.class_order for d in runs)))
    data_dir = data_dir or (runs[0].run.data_dir if runs else "data")
    out = given[0].path if given else Path(".")
    names = [*(d.name for d in directories), *(d.name for d in runs_of_files.values()), *(name for name, _ in others)]
    return Plan(subjects, load_images(images, n, seed, data_dir, classes), out, tuple(names), tuple(tasks))


def _refuse_equal_names(places: list[tuple[str, Path]]) -> None:
    """Rows are told apart by the name of their run alone. Raises ValueError naming two places of one name."""
    seen: dict[str, Path] = {}
    for name, path in places:
        if name in seen:
            raise ValueError(
                f"{name} would be in the tables twice, from {seen[name]} and {path}: measure them one by one, or rename one"
            )
        seen[name] = path


def with_twins(directories: list[RunDir], warn: Callable[[str], None] = lambda sentence: None) -> list[RunDir]:
    """The directories, and behind each incremental run the joint twin that it names, where that is there.

    A joint run's `twin_of` comes back as the incremental run among them that it really is the twin of, or None.
    """
    by_path = {d.path.resolve(): d for d in directories}
    for directory in directories:
        twin = directory.path.resolve().parent / (directory.joint_twin or "")
        if directory.joint_twin and twin not in by_path and (twin / "run.json").is_file():
            other = checkpoint.open_run(twin)
            if not other.run.is_twin_of(directory.run):
                warn(f"{twin.name} is left out: its settings are not those of {directory.name}")
            elif other.tasks:
                by_path[twin] = other

    def paired(joint: RunDir) -> RunDir:
        partners = [d for d in directories if d.run.training == "incremental" and d.run.is_twin_of(joint.run)]
        partners.sort(key=lambda d: d.joint_twin != joint.name)
        return replace(joint, twin_of=partners[0].name if partners else None)

    return [d if d.run.training == "incremental" else paired(d) for d in by_path.values()]


def runs_of(paths: list[str], tasks: list[int], warn: Callable[[str], None]) -> list[RunDir]:
    """Run directories and the joint twins that are there. Raises ValueError for none, two of a name, or a missing task."""
    given = [checkpoint.open_run(path) for path in paths]
    for directory in given:
        directory.require()
        typed(directory.require, tasks)
    directories = [d for d in with_twins(given, warn) if d.tasks]
    _refuse_equal_names([(d.name, d.path) for d in directories])
    return directories


def subjects_of(directories: list[RunDir], tasks: list[int] | None = None) -> list[Callable[[], Subject]]:
    """What to measure of runs, each loaded when called: as initialised, then every finished task, or those in `tasks`, each
    after the checkpoints inside it.

    Raises ValueError for a run without a finished task, or a task that is not there.
    """
    subjects: list[Callable[[], Subject]] = []
    for directory in directories:
        directory.require()
        typed(directory.require, tasks or ())
        for task in [INITIAL, *(tasks or directory.tasks)]:
            for at_step in [*directory.checkpoints(task), AFTER]:
                subjects.append(functools.partial(from_run, directory, task, at_step))
    return subjects
