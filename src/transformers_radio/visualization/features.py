"""Patch features of several models over the same images, each in its own space or in one that they have in common."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from transformers_radio.evaluation.models.encoder import Features, VisionEncoder
from transformers_radio.teachers import portable_checkpoint

Columns = dict[str, Features]


def own_columns(encoders: Sequence[VisionEncoder], images: Mapping[str, torch.Tensor]) -> Columns:
    """The models' own features for `teacher_student_figure`: name -> (features (N, h*w, C) on the CPU, grid (h, w)).

    Args:
        images: name -> float (N, 3, H, W) in [0, 1], the same images at each model's size.
    """
    return {encoder.name: _encode(encoder.features, images[encoder.name]) for encoder in encoders}


def common_columns(
    encoders: Sequence[VisionEncoder], images: Mapping[str, torch.Tensor]
) -> tuple[Columns, dict[str, str]]:
    """Features that share a space, and for each column the one whose basis it takes.

    A teacher's own features and those of a student's adaptor to it are in one space: each teacher is followed by every
    student's adaptor to it, in the teacher's basis. Without teachers, or without students, all share the first model's
    basis; that makes sense for checkpoints of one run, and needs features of one width.

    Args:
        images: as for `own_columns`.

    Raises:
        ValueError: a student without an adaptor to one of the teachers.
    """
    teachers = [encoder for encoder in encoders if not encoder.is_student]
    students = [encoder for encoder in encoders if encoder.is_student]
    if not teachers or not students:
        return own_columns(encoders, images), {encoder.name: encoders[0].name for encoder in encoders}
    adaptors = {(s.name, t.name): adaptor_to(s, t) for t in teachers for s in students}  # raises before long work
    columns: Columns = {}
    basis_of = {}
    for teacher in teachers:
        columns |= own_columns([teacher], images)
        for student in students:
            title = f"{student.name} as {teacher.name}"
            encode = _adaptor_features(student, adaptors[student.name, teacher.name])
            columns[title] = _encode(encode, images[student.name])
            basis_of[title] = teacher.name
    return columns, basis_of


def adaptor_to(student: VisionEncoder, teacher: VisionEncoder) -> str:
    """The student's adaptor whose features are in this teacher's space: one that records it, or that has its name.

    Raises:
        ValueError: there is none, or it has features of another width.
    """
    adaptors = student.model.config.adaptors
    found = [name for name, one in adaptors.items() if _same_model(one["teacher"], str(teacher.spec))]
    found = found or [name for name in adaptors if name == teacher.name]
    if not found:
        taught = ", ".join(f"{name} ({one['teacher']})" for name, one in adaptors.items()) or "none"
        raise ValueError(
            f"{student.name} and {teacher.name} have no space in common: none of the student's adaptors is to "
            f"{teacher.spec}, they are {taught}. If one of them is, title the teacher like it, as ADAPTOR=MODEL."
        )
    width = adaptors[found[0]]["feature_dim"]
    if width != teacher.model.feature_dim:
        raise ValueError(
            f"The adaptor {found[0]!r} of {student.name} has features of width {width}, but those of {teacher.name} "
            f"have {teacher.model.feature_dim}: it is not this model that was its teacher."
        )
    return found[0]


def _same_model(one: str, other: str) -> bool:
    (kind, _, path), (other_kind, _, other_path) = one.partition(":"), other.partition(":")
    if one in (other, f"{other_kind}:{portable_checkpoint(other_path)}"):  # as a student records its teacher
        return True
    both_there = Path(path).exists() and Path(other_path).exists()
    return kind == other_kind and both_there and Path(path).resolve() == Path(other_path).resolve()


def _adaptor_features(student: VisionEncoder, adaptor: str) -> Callable[[torch.Tensor], Features]:
    @torch.no_grad()
    def encode(images: torch.Tensor) -> Features:
        output = student.model(images.to(student.model.dtype), adaptors=[adaptor]).adaptors[adaptor]
        return output.features, output.grid

    return encode


def _encode(encode: Callable[[torch.Tensor], Features], images: torch.Tensor) -> Features:
    """One image at a time, so that high resolutions fit the memory."""
    outputs = [encode(image[None]) for image in images]
    return torch.cat([features.float().cpu() for features, _ in outputs]), outputs[0][1]
