"""`eval resolution`: k-NN, zero-shot and cosines at other resolutions, where a model that has learned two modes fails.

RADIO v2.1 has 82.9 % zero-shot at 432 pixels and 0.2 % at 1024: above some size its outputs are those for SAM only.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from transformers_radio.disk import digest, replace_whole, write_json
from transformers_radio.evaluation.classification.knn import knn_accuracy
from transformers_radio.evaluation.classification.words import (
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
from transformers_radio.evaluation.images.labeled import COUNTED, LabeledSplit
from transformers_radio.evaluation.images.sampled import (
    SAMPLE_SEED,
    LabeledFiles,
    ResizedBatches,
    sample_labeled_files,
)
from transformers_radio.evaluation.images.summaries import extract_summaries
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, Features, VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.paths import fingerprint_checkpoint
from transformers_radio.evaluation.result import Result, slug
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.evaluation.workspace import claim_folder

from .config import ResolutionConfig
from .figure import Size, resolution_figure, size_name

logger = logging.getLogger(__name__)

ZERO_SHOT, KNN, KNN_REFERENCE = "Zero-shot", "k-NN", "k-NN, reference bank"
SUMMARY_COSINE, FEATURE_COSINE = "Summary cosine", "Feature cosine"
FEATURE_BATCH = 4  # images
CLASSES_NAMED = 5  # in the protocol, of those without an image in the bank


@dataclass
class Prompts:
    """For zero-shot. names: of the classes; None if there are none, and `missing` says why."""

    names: list[str] | None
    templates: Sequence[Template]
    missing: str = ""

    def digest(self) -> str | None:
        if self.names is None:
            return None
        templates = [template if isinstance(template, str) else template("{}") for template in self.templates]
        return digest(["\n".join(self.names + templates)])


@dataclass
class Reference:
    """What the other sizes are compared with; on the CPU."""

    side: int  # pixels
    bank: torch.Tensor  # (N, D) summaries
    queries: torch.Tensor  # (M, D)
    features: list[Features]  # one entry per batch

    def write(self, path: Path) -> None:
        features = {f"features {number}": feature for number, (feature, _) in enumerate(self.features)}
        tensors = {"bank": self.bank, "queries": self.queries, "grid": torch.tensor(self.features[0][1]), **features}
        with replace_whole(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def read(cls, path: Path, side: int) -> "Reference":
        tensors = load_file(path)
        rows, columns = tensors.pop("grid").tolist()
        bank, queries = tensors.pop("bank"), tensors.pop("queries")
        return cls(side, bank, queries, [(tensors[f"features {n}"], (rows, columns)) for n in range(len(tensors))])


class Resolution(Task):
    """Metrics "MEASURE @ SIZE"; and OUTPUT/resolution.<data>.png of all models.

    Sizes that a model cannot take (teachers take only squares) are left out, counted and named with the reason in
    `settings["left_out"]`; `settings["flagged"]` holds the sizes at which a measure falls below `flag_below` of its
    value at the reference. A killed run resumes at the first size that is not finished.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before any image is encoded.
    """

    name = "resolution"
    config_class = ResolutionConfig
    config: ResolutionConfig
    counted = (
        *ENCODER_COUNTED,
        *("sizes", "reference", "flag_below", "bank_images", "images", "feature_images", "k", "temperature", "seed"),
        *("words", "text"),
        *(f"{split}.{name}" for split in ("bank", "queries") for name in COUNTED),
    )
    keeps_work = False  # features of large models fill disks, and nothing reads them again

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        self.sizes = _check(config)
        device = Accelerator(mixed_precision="no").device
        encoders = [self._load(spec, device) for spec in models]
        columns = (config.config_name, config.image_column, config.label_column)
        self.queries = sample_labeled_files(LabeledSplit(config.data, config.split, *columns), config.images)
        self.bank = sample_labeled_files(LabeledSplit(config.data, config.train_split, *columns), config.bank_images)
        if len(self.bank.files) < config.k:
            raise ValueError(
                f"The bank has {len(self.bank.files)} images, fewer than k ({config.k}): raise bank_images."
            )
        self.prompts = _prompts(config, self.queries)
        if self.queries.class_names is not None:
            warn_of_other_classes(config.name, config.classes, config.data, len(self.queries.class_names))
        return [self._job(encoder) for encoder in encoders]

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        text, place = settings.get("text"), self.config.text
        text = fingerprint_checkpoint(place) if text == place else text  # earlier versions knew it by its place alone
        files = {
            name: part.split.recognized(settings.get(name))
            for name, part in (("bank", self.bank), ("queries", self.queries))
        }
        return {**settings, "text": text, **files}

    def measure(self, job: Job, folder: Path) -> Measured:
        config, encoder = self.config, job.encoder
        classifier, reason = self._classifier(encoder)
        claim_folder(folder, job.settings, self.counted, config.overwrite, self.recognized)
        used = {size: _fitted(size, encoder.step) for size in self.sizes}
        measured, left_out = self._measure_sizes(encoder, classifier, list(used.values()), folder)
        if classifier is None:
            left_out = {ZERO_SHOT: reason, **left_out}
        own = (encoder.image_size, encoder.image_size)
        flagged = find_collapses(measured, own, config.flag_below)
        for side, what in flagged.items():
            logger.warning("%s at %s: below %g of the reference: %s", encoder.name, side, config.flag_below, what)
        return Measured(
            {f"{name} @ {size_name(size)}": value for size, one in measured.items() for name, value in one.items()},
            self._protocol(own[0], len(measured), flagged, left_out),
            {
                **self._counts(),
                "sizes": len(measured),
                "sizes_left_out": len([one for one in left_out if one != ZERO_SHOT]),
                "sizes_flagged": len(flagged),
            },
            {
                "used_sizes": {size_name(asked): size_name(size) for asked, size in used.items()},
                "left_out": left_out,
                "flagged": flagged,
            },
        )

    def finish(self, results: list[Result]) -> None:
        resolution_figure(results, self.output / f"resolution.{slug(self.config.title)}.png")

    def _load(self, spec: str, device: torch.device) -> VisionEncoder:
        """At the reference, or the nearest side that this model takes."""
        config = self.config
        adaptor = config.adaptor if ModelSpec.parse(spec).is_student else None
        encoder = load_encoder(spec, None, config.dtype, device, adaptor)
        if config.reference is None:
            return encoder
        side, _ = _fitted((config.reference, config.reference), encoder.step)
        return encoder if side == encoder.image_size else load_encoder(spec, side, config.dtype, device, adaptor)

    def _job(self, encoder: VisionEncoder) -> Job:
        config = self.config
        settings = {
            **{name: value for name, value in asdict(config).items() if name not in ("overwrite", "batch_size")},
            **encoder.settings(),
            "reference": encoder.image_size,
            "words": self.prompts.digest(),
            "text": fingerprint_checkpoint(config.text),
            "bank": self.bank.split.fingerprint(),
            "queries": self.queries.split.fingerprint(),
            "seed": SAMPLE_SEED,
        }
        return Job.of(encoder, self.config.title, settings)

    def _classifier(self, encoder: VisionEncoder) -> tuple[torch.Tensor | None, str]:
        """(C, D) for zero-shot, or None and the reason."""
        prompts = self.prompts
        if prompts.names is None:
            return None, prompts.missing
        try:
            tower = self.config.text or encoder.text_tower()
        except ValueError as error:
            return None, str(error)
        text = load_text_tower(tower).to(encoder.device)
        return zero_shot_classifier(text, prompts.names, prompts.templates).cpu(), ""

    def _encoder_at(self, encoder: VisionEncoder, size: Size) -> VisionEncoder:
        """The encoder for one size: a student as it is, a teacher built anew.

        Raises:
            ValueError: it cannot take this size.
        """
        if encoder.is_student or size == (encoder.image_size, encoder.image_size):
            encoder.check_size(*size)
            return encoder
        if size[0] != size[1]:
            raise ValueError(f"{encoder.name} is a teacher, which takes only squares.")
        device = encoder.device
        return load_encoder(f"{encoder.name}={encoder.spec}", size[0], self.config.dtype, device)

    def _measure_sizes(
        self, encoder: VisionEncoder, classifier: torch.Tensor | None, sizes: list[Size], folder: Path
    ) -> tuple[dict[Size, dict[str, float]], dict[str, str]]:
        """Size -> its measures, for the reference and `sizes`; and the sizes that are left out, with reasons."""
        measured: dict[Size, dict[str, float]] = {}
        left_out: dict[str, str] = {}
        reference: Reference | None = None
        own, path_of_reference = (encoder.image_size, encoder.image_size), folder / "reference.safetensors"
        for size in dict.fromkeys([own, *sizes]):
            path = folder / f"{size_name(size)}.json"
            if path.exists():
                measured[size] = json.loads(path.read_text(encoding="utf-8"))
                continue
            try:
                at_size = self._encoder_at(encoder, size)
            except ValueError as error:  # not for this model; the result says so
                left_out[size_name(size)] = str(error)
                continue
            if reference is None and size != own:
                reference = Reference.read(path_of_reference, encoder.image_size)
            measured[size], reference = self._at_size(at_size, size, classifier, reference)
            if size == own:
                reference.write(path_of_reference)
            write_json(path, measured[size])
        return measured, left_out

    def _at_size(
        self, encoder: VisionEncoder, size: Size, classifier: torch.Tensor | None, reference: Reference | None
    ) -> tuple[dict[str, float], Reference]:
        """All measures at one size, and the reference; without one, this size becomes the reference."""
        config, bank, queries = self.config, self.bank, self.queries
        side = encoder.image_size if reference is None else reference.side
        batch_size = max(1, config.batch_size * side**2 // (size[0] * size[1]))
        device = encoder.device
        title = f"{encoder.name} {size_name(size)}"
        batches = queries.batches(size, batch_size)
        bank_batches = bank.batches(size, batch_size)
        of_bank = extract_summaries(encoder.summary, bank_batches, device=device, description=f"{title} bank")
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
        for name, vectors in ((KNN, of_bank), (KNN_REFERENCE, reference.bank)):
            found[name] = knn_accuracy(vectors, bank.labels, of_queries, queries.labels, config.k, config.temperature)
        found[SUMMARY_COSINE] = F.cosine_similarity(of_queries, reference.queries).mean().item()
        found[FEATURE_COSINE] = torch.cat(similar).mean().item()
        return found, reference

    def _counts(self) -> dict[str, int]:
        bank, queries, asked = self.bank, self.queries, set(self.queries.labels.tolist())
        return {
            "images": len(queries.files),
            "bank_images": len(bank.files),
            "feature_images": min(self.config.feature_images, len(queries.files)),
            "skipped_images": len(queries.unusable | bank.unusable),  # an image of both splits counts once
            "classes": len(asked),
            "classes_without_bank": len(asked - set(bank.labels.tolist())),
        }

    def _protocol(self, side: int, sizes: int, flagged: dict[str, list[str]], left_out: dict[str, str]) -> str:
        config, bank = self.config, self.bank
        if flagged:
            falls = "; ".join(f"{size} ({', '.join(what)})" for size, what in flagged.items())
            verdict = f"MODE SWITCH? Below {config.flag_below:g} of the reference at {falls}."
        else:
            verdict = "Nothing collapses." if sizes > 1 else "No size to compare with the reference."
        without = ""
        missing = sorted(set(self.queries.labels.tolist()) - set(bank.labels.tolist()))
        if missing:
            names = [bank.class_names[label] if bank.class_names else label for label in missing[:CLASSES_NAMED]]
            more = f" and {len(missing) - len(names)} more" if len(missing) > len(names) else ""
            without = (
                f" The bank has no image of {len(missing)} of the classes, which k-NN therefore gets wrong: "
                f"{', '.join(map(str, names))}{more}."
            )
        reasons = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
        return (
            f"{len(self.queries.files)} whole images scaled to each size, bicubic; {config.k}-NN in {len(bank.files)} "
            f"images at the same size and at {side}; cosines to {side}, features on the coarser grid.{without} "
            f"{verdict}" + (f" Left out: {reasons}." if reasons else "")
        )


def _check(config: ResolutionConfig) -> list[Size]:
    """The sizes, each as (height, width)."""
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


def _fitted(size: Size, step: int) -> Size:
    """The nearest size whose sides are multiples of `step`."""
    height, width = (max(1, round(side / step)) * step for side in size)
    return height, width


def find_collapses(measured: dict[Size, dict[str, float]], reference: Size, flag_below: float) -> dict[str, list[str]]:
    """Size -> the measures that have less than `flag_below` times their value at the reference."""
    expected = measured[reference]
    found = {
        size_name(size): [measure for measure, value in one.items() if value < flag_below * expected[measure]]
        for size, one in measured.items()
    }
    return {size: what for size, what in found.items() if what}


def _prompts(config: ResolutionConfig, queries: LabeledFiles) -> Prompts:
    templates = load_templates(config.templates)
    try:
        names = load_class_names(config.classes, queries.class_names, config.data)
    except ValueError as error:
        if config.classes is not None:
            raise
        return Prompts(None, templates, str(error))
    if int(queries.labels.max()) >= len(names):
        raise ValueError(
            f"The data has the label {int(queries.labels.max())}, but there are {len(names)} class names: give one "
            "name per class."
        )
    return Prompts(names, templates)
