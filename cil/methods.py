"""Class-incremental methods: what distinguishes them, one line each. A new method is a line in METHODS."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """token_per_task: DyTox's task tokens, head t reading token t; else one class token read by all heads.
    divergence: weight of the divergence head's loss, 0 for none.
    frozen: parts of the network (names of modules or parameters) that stay as they are from task 1 on; `{old}` stands for
    the number of each old task. finetuned: the only parts that balanced fine-tuning changes.
    """

    token_per_task: bool
    divergence: float
    frozen: tuple[str, ...]
    finetuned: tuple[str, ...]


METHODS = {
    "baseline": Method(False, 0.0, frozen=("heads.{old}",), finetuned=("tokens", "backbone.cls_token", "heads")),
    "dytox": Method(True, 0.1, frozen=("heads.{old}", "tokens.{old}"), finetuned=("tokens", "task_block", "heads")),
}
