"""A student that starts from a saved one: its heads and CLS tokens stay, new teachers get theirs beside them."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from transformers_radio.modeling import RadioConfig, RadioModel

from .recipe import Recipe

logger = logging.getLogger(__name__)


def continued_student(recipe: Recipe, adaptors: dict[str, dict[str, Any]]) -> RadioModel:
    """The student of `recipe.student.checkpoint` with heads for the recipe's teachers.

    Its own heads for teachers that it knows stay, and so do those for others (see `student.keep_adaptors`). A new
    teacher with a summary gets a CLS token that no head reads yet, or a new one behind the others.

    Args:
        adaptors: entries of `RadioConfig.adaptors` for the recipe's teachers.

    Raises:
        ValueError: there is no such checkpoint; it knows a teacher of this name with other widths.
    """
    checkpoint = str(recipe.student.checkpoint)
    if not Path(checkpoint).is_dir() and checkpoint.count("/") > 1:
        raise ValueError(f"student.checkpoint is {checkpoint!r}; there is no such folder")
    config = RadioConfig.from_pretrained(checkpoint)
    kept = _kept_adaptors(recipe, config)
    entries = {**kept, **{name: dict(adaptor) for name, adaptor in adaptors.items()}}
    for name, adaptor in adaptors.items():
        known = config.adaptors.get(name)
        if known is None:
            continue
        for width in ("summary_dim", "feature_dim"):
            if adaptor[width] is not None and adaptor[width] != known[width]:
                raise ValueError(
                    f"student.checkpoint {checkpoint} has an adaptor {name!r} with {width} {known[width]}, but "
                    f"teachers.{name} needs {adaptor[width]}; give this teacher another name, or use the one it was "
                    "trained with"
                )
        entries[name] = {**known, **{key: adaptor[key] for key in ("teacher", "teacher_weights")}}
    new = [name for name in adaptors if name not in config.adaptors]
    tokens, summary_idxs = _place_summaries(config, entries, new)

    as_saved = RadioConfig.from_dict({**config.to_dict(), **recipe.student.config})
    try:
        saved = RadioModel.from_pretrained(checkpoint, config=as_saved)
    except ValueError as error:
        if "other shapes" not in str(error):
            raise
        raise ValueError(
            f"the weights of student.checkpoint {checkpoint} do not have the shapes that student.config "
            f"{recipe.student.config} gives them; leave out the fields that change shapes"
        ) from error
    grown = {"adaptors": entries, "num_cls_tokens": tokens, "summary_idxs": summary_idxs}
    student = RadioModel(RadioConfig.from_dict({**as_saved.to_dict(), **grown}))
    state = saved.state_dict()
    state["summary_idxs"] = student.summary_idxs
    table = state["embeddings.cls_register_token"]  # (CLS tokens + registers, D)
    copies = table[config.summary_idxs[:1]].repeat(tokens - config.num_cls_tokens, 1)
    before, registers = table[: config.num_cls_tokens], table[config.num_cls_tokens :]
    state["embeddings.cls_register_token"] = torch.cat([before, copies, registers])
    wanted = student.state_dict()
    student.load_state_dict({**wanted, **{name: tensor for name, tensor in state.items() if name in wanted}})
    return student.train(saved.training)


def _kept_adaptors(recipe: Recipe, config: RadioConfig) -> dict[str, dict[str, Any]]:
    """Those of the checkpoint that no teacher of the recipe trains."""
    others = {name: adaptor for name, adaptor in config.adaptors.items() if name not in recipe.teachers}
    keep = recipe.student.keep_adaptors
    for name in keep or []:
        if name not in others:
            raise ValueError(
                f"student.keep_adaptors names {name!r}; student.checkpoint {recipe.student.checkpoint} has, beside "
                f"the recipe's teachers, the adaptors {', '.join(others) or '(none)'}"
            )
    kept = {name: adaptor for name, adaptor in others.items() if keep is None or name in keep}
    for name in others:
        what = "kept as it is, frozen" if name in kept else "left out, as student.keep_adaptors says"
        _say(f"the student's adaptor {name!r} has no teacher in this recipe: it is {what}")
    return kept


def _place_summaries(config: RadioConfig, entries: dict[str, dict[str, Any]], new: list[str]) -> tuple[int, list[int]]:
    """Gives new adaptors with a summary their token, in place; returns the number of CLS tokens and `summary_idxs`."""
    tokens, summary_idxs = config.num_cls_tokens, list(config.summary_idxs or [])
    if config.summary_type == "mean":
        return tokens, summary_idxs
    read = [adaptor["summary_token"] for adaptor in config.adaptors.values() if adaptor["summary_dim"] is not None]
    free = [token for token in range(tokens) if token not in read]
    for name in new:
        if entries[name]["summary_dim"] is None:
            continue
        if len(read) > 1 and len(set(read)) == 1:  # a student with one token for all its teachers
            token, which = read[0], "which all summaries of this student share"
        elif free:
            token, which = free.pop(0), "which no other adaptor reads"
        else:
            token, which = tokens, f"which is new, a copy of token {summary_idxs[0]}"
            tokens += 1
        entries[name]["summary_token"] = token
        grown = "" if token in summary_idxs else ", and the student's summary has it at its end"
        summary_idxs += [] if token in summary_idxs else [token]
        _say(f"the summary of the new adaptor {name!r} is read from CLS token {token}, {which}{grown}")
    return tokens, summary_idxs


def _say(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:  # every process builds the student
        logger.warning(line)
