"""`eval knn`: the class that the nearest training images of a validation image elect (paper, Section 3.1, Table 1)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from transformers_radio.evaluation.images.labelled import COUNTED, LabelledSplit
from transformers_radio.evaluation.images.summaries import store_summaries
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder
from transformers_radio.evaluation.processes import process_state
from transformers_radio.evaluation.result import Result, done, result_path, work_folder

from .knn import knn_accuracy_of_stores
from .settings import (
    ClassificationConfig,
    clear_work,
    load_encoders,
    open_split,
    resolution,
    store_config,
)
from .words import warn_of_other_classes

# What a result is known by, of its settings.
RESULT_COUNTED = (
    *ENCODER_COUNTED,
    *("output", "k", "temperature", "image_size", "store_dtype"),
    *(f"{split}.{name}" for split in ("bank", "queries") for name in COUNTED),
)


@dataclass
class KnnConfig(ClassificationConfig):
    """Settings of the task; the defaults are the paper's."""

    train_limit: int | None = None  # only so many images of the bank, the first, for a trial
    k: int = 20
    temperature: float = 0.07
    memory_gb: float = 4.0  # for the search, in each process


def run(models: list[str], config: KnnConfig, output: Path) -> list[Result]:
    """One `Result` a model: k-NN accuracy in percent. Summaries are kept in the work folder, and encoded once.

    Alone or on every process of `accelerate launch`.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before the first image.
        ValueError: labels that are no classes, classes that the bank does not have, nothing readable.
        OSError: too little room on the disk.
    """
    for name in ("k", "temperature", "memory_gb"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; expected more than 0.")
    process_state()
    bank = open_split(config, config.train_split, config.train_limit)
    queries = open_split(config, config.split)
    in_bank, asked = bank.labels_of_folders(), queries.labels_of_folders()
    if in_bank is not None and asked is not None:
        _check_classes(in_bank, asked, bank, config)
    if bank.class_names is not None:
        warn_of_other_classes(config.title, config.classes, config.data, len(bank.class_names))
    images = bank.count()
    if images is not None and images < config.k:
        raise ValueError(
            f"k is {config.k}; expected 1 to {images}, as many as there are images in the bank ({config.train_split})."
        )
    encoders = load_encoders(models, config)
    for encoder in encoders:
        store_config(encoder, config).check()
    return [_measure(encoder, bank, queries, config, output) for encoder in encoders]


def _measure(
    encoder: VisionEncoder, bank: LabelledSplit, queries: LabelledSplit, config: KnnConfig, output: Path
) -> Result:
    path = result_path(output, encoder.name, "knn", config.title)
    folder = work_folder(path)
    stored = store_config(encoder, config)
    of_model = {**encoder.settings(), "output": "summary"}
    settings = {
        **of_model,
        "k": config.k,
        "temperature": config.temperature,
        "image_size": resolution(stored),
        "store_dtype": config.store_dtype,
        "bank": bank.fingerprint(),
        "queries": queries.fingerprint(),
    }

    def before(there: dict[str, Any]) -> dict[str, Any]:
        return {
            **there,
            "bank": bank.recognized(there.get("bank")),
            "queries": queries.recognized(there.get("queries")),
        }

    finished = done(path, settings, RESULT_COUNTED, config.overwrite, before)
    if finished is not None:
        return finished
    clear_work(folder, config.overwrite)
    # The queries first: they are fewer, so what is wrong with the data shows earlier.
    query_store, bank_store = (
        store_summaries(
            folder / split.split, encoder.summary, of_model, split, stored, f"{encoder.name} {split.split}"
        )
        for split in (queries, bank)
    )
    in_bank = set(bank_store.labels.unique().tolist())
    if bank.class_names is None and config.train_limit is None:
        warn_of_other_classes(config.title, config.classes, config.data, len(in_bank))
    _check_classes(in_bank, set(query_store.labels.unique().tolist()), bank, config)
    num_classes = max(in_bank) + 1 if bank.num_classes is None else bank.num_classes
    memory = config.memory_gb * 1e9
    accuracy = knn_accuracy_of_stores(bank_store, query_store, config.k, config.temperature, num_classes, memory)
    result = Result(
        "knn",
        encoder.name,
        config.title,
        {"k-NN": accuracy},
        f"k = {config.k}, votes exp(cosine similarity / {config.temperature}); {stored.protocol}; bank of "
        f"{len(bank_store)} images",
        settings,
        {
            "bank_images": len(bank_store),
            "query_images": len(query_store),
            "classes": num_classes,
            "bank_skipped": sum(bank_store.skipped.values()),
            "query_skipped": sum(query_store.skipped.values()),
        },
        encoder.params,
        resolution(stored),
    )
    if PartialState().is_main_process:
        result.write(path)
    return result


def _check_classes(in_bank: set[int], asked: set[int], bank: LabelledSplit, config: KnnConfig) -> None:
    """ValueError when images ask for a class that no neighbour can vote for."""
    missing = sorted(asked - in_bank)
    if missing:
        names = [bank.class_names[label] if bank.class_names else label for label in missing[:5]]
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        limited = " Raise train_limit or leave it out." if config.train_limit is not None else ""
        raise ValueError(
            f"{len(missing)} classes of {config.data} ({config.split}) have no image in the bank "
            f"({config.train_split}): {names}{more}.{limited}"
        )
