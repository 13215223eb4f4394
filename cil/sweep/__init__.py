"""Many runs, here or on Slurm: jobs.py, places.py, worker.py, watch.py, table.py."""

from cil.sweep.jobs import Job, expand, parse_seeds, planned
from cil.sweep.places import EXECUTORS, Place, adopted, choose_place, choose_workers, submit, visible_gpus
from cil.sweep.table import as_table, format_table, read_rows
from cil.sweep.watch import Display, leave, look, seconds_left, state_of, status, sweep
from cil.sweep.worker import train_job

__all__ = [
    "EXECUTORS",
    "Display",
    "Job",
    "Place",
    "adopted",
    "as_table",
    "choose_place",
    "choose_workers",
    "expand",
    "format_table",
    "leave",
    "look",
    "parse_seeds",
    "planned",
    "read_rows",
    "seconds_left",
    "state_of",
    "status",
    "submit",
    "sweep",
    "train_job",
    "visible_gpus",
]
