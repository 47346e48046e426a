"""`eval resolution`: what a model says at other resolutions, where one that has learnt two modes falls apart.

RADIO v2.1 has 82.9 % zero-shot at 432 pixels and 0.2 % at 1024: above some size it speaks SAM's language only.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from omegaconf import MISSING
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from transformers_radio.evaluation.classification.knn import knn_accuracy
from transformers_radio.evaluation.classification.words import (
    OPENAI_IMAGENET,
    load_class_names,
    load_templates,
    warn_of_other_classes,
)
from transformers_radio.evaluation.classification.zero_shot import (
    Template,
    zero_shot_accuracy,
    zero_shot_classifier,
)
from transformers_radio.evaluation.features.statistics import feature_cosine
from transformers_radio.evaluation.images.labelled import COUNTED, extract_summaries
from transformers_radio.evaluation.images.sampled import (
    SAMPLE_SEED,
    LabelledFiles,
    ResizedBatches,
    sample_labelled_files,
)
from transformers_radio.evaluation.llava.train import claim_folder
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, Features, VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.paths import fingerprint_checkpoint, path_name
from transformers_radio.evaluation.result import Result, done, result_path, slug, work_folder

from .figure import Size, resolution_figure, size_name

logger = logging.getLogger(__name__)

ZERO_SHOT, KNN, KNN_REFERENCE = "Zero-shot", "k-NN", "k-NN, reference bank"
SUMMARY_COSINE, FEATURE_COSINE = "Summary cosine", "Feature cosine"
FEATURE_BATCH = 4  # images
CLASSES_NAMED = 5  # in the protocol, of those without an image in the bank
# What a result is known by, of its settings.
RESULT_COUNTED = (
    *ENCODER_COUNTED,
    *("sizes", "reference", "flag_below", "bank_images", "images", "feature_images", "k", "temperature", "seed"),
    *("words", "text"),
    *(f"{split}.{name}" for split in ("bank", "queries") for name in COUNTED),
)


@dataclass
class ResolutionConfig:
    """Settings of the task."""

    data: str = MISSING  # labelled images: class folders, webdataset tars with .cls, or what load_dataset opens
    name: str | None = None  # of the data, in results; null: the last part of `data`
    config_name: str | None = None  # of a Hub dataset that has several configurations
    train_split: str = "train"  # the bank of k-NN
    split: str = "validation"
    image_column: str | None = None  # null: found among the usual names
    label_column: str | None = None
    # Sides in pixels or [height, width]; each goes to the nearest multiple that the model takes.
    sizes: list[Any] = field(default_factory=lambda: [224, 336, 432, 512, 768, 1024, [432, 768]])
    reference: int | None = None  # side that the others are compared with; null: the model's own
    flag_below: float = 0.5  # what has less than this share of its value at the reference is flagged
    bank_images: int | None = 5000  # drawn with seed 0; null: all
    images: int | None = 1000  # of the split, likewise
    feature_images: int = 32  # of these, whose patch features are compared
    k: int = 20
    temperature: float = 0.07
    classes: Any = None  # names for zero-shot: a file, a list or openai_imagenet; null: those that the data states
    templates: Any = OPENAI_IMAGENET  # a file or list of templates with {} for the name, or OpenAI's 80
    text: str | None = None  # text tower, as open_clip:... or transformers:...; null: the adaptor's teacher's
    adaptor: str | None = None  # the student's that zero-shot reads; null: the one to a text tower
    dtype: str = "float32"
    batch_size: int = 32  # at the reference; other sizes take as many pixels at once
    overwrite: bool = False


@dataclass
class Words:
    """For zero-shot. names: of the classes; None where there are none, and `missing` says why."""

    names: list[str] | None
    templates: Sequence[Template]
    missing: str = ""

    def digest(self) -> str | None:
        if self.names is None:
            return None
        templates = [template if isinstance(template, str) else template("{}") for template in self.templates]
        return hashlib.blake2b("\n".join(self.names + templates).encode(), digest_size=16).hexdigest()


@dataclass
class Reference:
    """What the other sizes are compared with; on the CPU."""

    side: int  # pixels
    bank: torch.Tensor  # (N, D) summaries
    queries: torch.Tensor  # (M, D)
    features: list[Features]  # a batch each

    def write(self, path: Path) -> None:
        features = {f"features {number}": feature for number, (feature, _) in enumerate(self.features)}
        tensors = {"bank": self.bank, "queries": self.queries, "grid": torch.tensor(self.features[0][1]), **features}
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    @classmethod
    def read(cls, path: Path, side: int) -> "Reference":
        tensors = load_file(path)
        rows, columns = tensors.pop("grid").tolist()
        bank, queries = tensors.pop("bank"), tensors.pop("queries")
        return cls(side, bank, queries, [(tensors[f"features {n}"], (rows, columns)) for n in range(len(tensors))])


def run(models: list[str], config: ResolutionConfig, output: Path) -> list[Result]:
    """One `Result` a model, with metrics "MEASURE @ SIZE"; and OUTPUT/resolution.<data>.png of all of them.

    Sizes that a model cannot take (teachers take only squares) are left out, counted and named with the reason in
    `settings["left_out"]`; `settings["flagged"]` holds the sizes at which a measure falls below `flag_below` of its
    value at the reference. A killed run goes on at the first size that is not whole.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before any image is encoded.
    """
    sizes = _check(config)
    device = Accelerator(mixed_precision="no").device
    encoders = [_load(spec, config, device) for spec in models]
    name = config.name or path_name(config.data)
    read = (config.config_name, config.image_column, config.label_column)
    queries = sample_labelled_files(config.data, config.split, *read, config.images)
    bank = sample_labelled_files(config.data, config.train_split, *read, config.bank_images)
    if len(bank.files) < config.k:
        raise ValueError(f"The bank has {len(bank.files)} images, fewer than k ({config.k}): raise bank_images.")
    words = _words(config, queries)
    if queries.class_names is not None:
        warn_of_other_classes(config.name, config.classes, config.data, len(queries.class_names))
    results = [_measure(encoder, sizes, bank, queries, words, config, name, output) for encoder in encoders]
    resolution_figure(results, output / f"resolution.{slug(name)}.png")
    return results


def _check(config: ResolutionConfig) -> list[Size]:
    """The sizes, (height, width) each."""
    sizes = []
    for size in config.sizes:
        sides = size if isinstance(size, list) else [size, size]
        if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
            raise ValueError(f"sizes has {size!r}; expected a side or [height, width], in whole pixels from 1.")
        sizes.append((sides[0], sides[1]))
    for name in ("feature_images", "k", "batch_size", "temperature"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; expected more than 0.")
    if not 0 < config.flag_below < 1:
        raise ValueError(f"flag_below is {config.flag_below}; expected a share between 0 and 1.")
    return sizes


def _load(spec: str, config: ResolutionConfig, device: torch.device) -> VisionEncoder:
    """At the reference, or the nearest side that this model takes."""
    adaptor = config.adaptor if ModelSpec.parse(spec).is_student else None
    encoder = load_encoder(spec, None, config.dtype, device, adaptor)
    if config.reference is None:
        return encoder
    side, _ = _fitted((config.reference, config.reference), encoder.step)
    return encoder if side == encoder.image_size else load_encoder(spec, side, config.dtype, device, adaptor)


def _measure(
    encoder: VisionEncoder,
    sizes: list[Size],
    bank: LabelledFiles,
    queries: LabelledFiles,
    words: Words,
    config: ResolutionConfig,
    name: str,
    output: Path,
) -> Result:
    path = result_path(output, encoder.name, "resolution", name)
    reference_size = (encoder.image_size, encoder.image_size)
    settings = {
        **{key: value for key, value in asdict(config).items() if key not in ("overwrite", "batch_size")},
        **encoder.settings(),
        "reference": encoder.image_size,
        "words": words.digest(),
        "text": fingerprint_checkpoint(config.text),
        "bank": bank.split.fingerprint(),
        "queries": queries.split.fingerprint(),
        "seed": SAMPLE_SEED,
    }

    def before(there: dict[str, Any]) -> dict[str, Any]:
        text = settings["text"] if there.get("text") == config.text else there.get("text")
        parts = {name: part.split.recognized(there.get(name)) for name, part in (("bank", bank), ("queries", queries))}
        return {**there, "text": text, **parts}

    finished = done(path, settings, RESULT_COUNTED, config.overwrite, before)
    if finished is not None:
        return finished
    classifier, no_words = _classifier(encoder, words, config)
    folder = work_folder(path)
    claim_folder(folder, settings, RESULT_COUNTED, config.overwrite, before)
    left_out = {} if classifier is not None else {ZERO_SHOT: no_words}
    used: dict[Size, Size] = {size: _fitted(size, encoder.step) for size in sizes}
    measured: dict[Size, dict[str, float]] = {}
    reference: Reference | None = None
    for size in dict.fromkeys([reference_size, *used.values()]):
        path_of_size, path_of_reference = folder / f"{size_name(size)}.json", folder / "reference.safetensors"
        if path_of_size.exists():
            measured[size] = json.loads(path_of_size.read_text(encoding="utf-8"))
            continue
        try:
            at_size = _encoder_at(encoder, size, config)
        except ValueError as error:  # not for this model; said in the result
            left_out[size_name(size)] = str(error)
            continue
        if reference is None and size != reference_size:
            reference = Reference.read(path_of_reference, encoder.image_size)
        measured[size], reference = _at_size(at_size, size, bank, queries, classifier, config, reference)
        if size == reference_size:
            reference.write(path_of_reference)
        path_of_size.with_suffix(".tmp").write_text(json.dumps(measured[size]), encoding="utf-8")
        os.replace(path_of_size.with_suffix(".tmp"), path_of_size)
    flagged = find_collapses(measured, reference_size, config.flag_below)
    for side, what in flagged.items():
        logger.warning("%s at %s: below %g of the reference: %s", encoder.name, side, config.flag_below, what)
    missing = sorted(set(queries.labels.tolist()) - set(bank.labels.tolist()))
    result = Result(
        "resolution",
        encoder.name,
        name,
        {f"{measure} @ {size_name(size)}": value for size, one in measured.items() for measure, value in one.items()},
        _protocol(encoder, bank, queries, missing, config, flagged, left_out, len(measured)),
        {
            **settings,
            "used_sizes": {size_name(asked): size_name(size) for asked, size in used.items()},
            "left_out": left_out,
            "flagged": flagged,
        },
        {
            "images": len(queries.files),
            "bank_images": len(bank.files),
            "feature_images": min(config.feature_images, len(queries.files)),
            "skipped_images": len(queries.unusable | bank.unusable),  # one of both splits is one
            "classes": len(set(queries.labels.tolist())),
            "classes_without_bank": len(missing),
            "sizes": len(measured),
            "sizes_left_out": len([one for one in left_out if one != ZERO_SHOT]),
            "sizes_flagged": len(flagged),
        },
        encoder.params,
        encoder.image_size,
    ).write(path)
    shutil.rmtree(folder)  # features of large models fill disks, and nothing reads them again
    return result


def _fitted(size: Size, step: int) -> Size:
    """The nearest size that a model takes."""
    height, width = (max(1, round(side / step)) * step for side in size)
    return height, width


def _encoder_at(encoder: VisionEncoder, size: Size, config: ResolutionConfig) -> VisionEncoder:
    """The encoder for one size: a student as it is, a teacher built anew.

    Raises:
        ValueError: it cannot take this size.
    """
    if encoder.is_student or size == (encoder.image_size, encoder.image_size):
        encoder.check_size(*size)
        return encoder
    if size[0] != size[1]:
        raise ValueError(f"{encoder.name} is a teacher, which takes only squares.")
    device = next(encoder.model.parameters()).device
    return load_encoder(f"{encoder.name}={encoder.spec}", size[0], config.dtype, device)


def _at_size(
    encoder: VisionEncoder,
    size: Size,
    bank: LabelledFiles,
    queries: LabelledFiles,
    classifier: torch.Tensor | None,
    config: ResolutionConfig,
    reference: Reference | None,
) -> tuple[dict[str, float], Reference]:
    """All measures at one size, and the reference; without one, this size is it."""
    device = next(encoder.model.parameters()).device
    side = encoder.image_size if reference is None else reference.side
    batch_size = max(1, config.batch_size * side**2 // (size[0] * size[1]))
    title = f"{encoder.name} {size_name(size)}"
    batches = queries.batches(size, batch_size)
    of_bank = extract_summaries(
        encoder.summary, bank.batches(size, batch_size), device=device, description=f"{title} bank"
    )
    of_queries = extract_summaries(encoder.summary, batches, device=device, description=f"{title} queries")
    # batches of one number at every size, so that they hold the same images
    pictured = ResizedBatches(queries.files[: config.feature_images], size, FEATURE_BATCH)
    encode_features = tqdm(pictured, desc=f"{title} features", unit="batch")
    features = (encoder.features(batch.to(device).float() / 255) for batch in encode_features)
    if reference is None:
        kept = [(feature.cpu().contiguous(), grid) for feature, grid in features]
        reference = Reference(side, of_bank, of_queries, kept)
        features = (one for one in kept)
    similar = [
        feature_cosine(feature.cpu(), grid, *expected)
        for (feature, grid), expected in zip(features, reference.features, strict=True)
    ]
    found = {}
    if classifier is not None:
        language = extract_summaries(encoder.language, batches, device=device, description=f"{title} zero-shot")
        found[ZERO_SHOT] = zero_shot_accuracy(language, classifier, queries.labels)
    for measure, vectors in ((KNN, of_bank), (KNN_REFERENCE, reference.bank)):
        found[measure] = knn_accuracy(vectors, bank.labels, of_queries, queries.labels, config.k, config.temperature)
    found[SUMMARY_COSINE] = F.cosine_similarity(of_queries, reference.queries).mean().item()
    found[FEATURE_COSINE] = torch.cat(similar).mean().item()
    return found, reference


def find_collapses(measured: dict[Size, dict[str, float]], reference: Size, flag_below: float) -> dict[str, list[str]]:
    """Size -> the measures that have less than `flag_below` times their value at the reference."""
    expected = measured[reference]
    found = {
        size_name(size): [measure for measure, value in one.items() if value < flag_below * expected[measure]]
        for size, one in measured.items()
    }
    return {size: what for size, what in found.items() if what}


def _words(config: ResolutionConfig, queries: LabelledFiles) -> Words:
    templates = load_templates(config.templates)
    try:
        names = load_class_names(config.classes, queries.class_names, config.data)
    except ValueError as error:
        if config.classes is not None:
            raise
        return Words(None, templates, str(error))
    if int(queries.labels.max()) >= len(names):
        raise ValueError(
            f"The data has the label {int(queries.labels.max())}, but there are {len(names)} class names: give one "
            "name a class."
        )
    return Words(names, templates)


def _classifier(encoder: VisionEncoder, words: Words, config: ResolutionConfig) -> tuple[torch.Tensor | None, str]:
    """(C, D) for zero-shot, or None and the reason."""
    if words.names is None:
        return None, words.missing
    try:
        tower = config.text or encoder.text_tower()
    except ValueError as error:
        return None, str(error)
    text = load_text_tower(tower).to(next(encoder.model.parameters()).device)
    return zero_shot_classifier(text, words.names, words.templates).cpu(), ""


def _protocol(
    encoder: VisionEncoder,
    bank: LabelledFiles,
    queries: LabelledFiles,
    missing: list[int],
    config: ResolutionConfig,
    flagged: dict[str, list[str]],
    left_out: dict[str, str],
    sizes: int,
) -> str:
    if flagged:
        falls = "; ".join(f"{size} ({', '.join(what)})" for size, what in flagged.items())
        verdict = f"MODE SWITCH? Below {config.flag_below:g} of the reference at {falls}."
    else:
        verdict = "Nothing collapses." if sizes > 1 else "No size to compare with the reference."
    without = ""
    if missing:
        names = [bank.class_names[label] if bank.class_names else label for label in missing[:CLASSES_NAMED]]
        more = f" and {len(missing) - len(names)} more" if len(missing) > len(names) else ""
        without = (
            f" The bank has no image of {len(missing)} of the classes, which k-NN therefore gets wrong: "
            f"{', '.join(map(str, names))}{more}."
        )
    return (
        f"{len(queries.files)} whole images scaled to each size, bicubic; {config.k}-NN in {len(bank.files)} images "
        f"at the same size and at {encoder.image_size}; cosines to {encoder.image_size}, features on the coarser "
        f"grid.{without} {verdict}" + (f" Left out: {', '.join(left_out)}." if left_out else "")
    )
