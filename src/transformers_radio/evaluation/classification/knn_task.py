"""`eval knn`: the class elected by the nearest training images of a validation image (paper, Section 3.1, Table 1)."""

from pathlib import Path
from typing import Any

from transformers_radio.evaluation.images.labeled import COUNTED
from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.evaluation.workspace import clear_work

from .config import KnnConfig
from .knn import knn_accuracy_of_stores
from .store import load_encoders, open_split, resolution, store_config, store_split
from .words import warn_of_other_classes


class Knn(Task):
    """k-NN accuracy in percent. Summaries are kept in the work folder, and encoded once.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before the first image.
        ValueError: labels that are not classes, classes that the bank does not have, nothing readable.
        OSError: too little room on the disk.
    """

    name = "knn"
    config_class = KnnConfig
    config: KnnConfig
    counted = (
        *ENCODER_COUNTED,
        *("output", "k", "temperature", "image_size", "store_dtype"),
        *(f"{split}.{name}" for split in ("bank", "queries") for name in COUNTED),
    )
    several_processes = True
    passed_over = ("classes", "templates")  # zero-shot's, in recipes/evaluation/imagenet1k.yaml
    columns = ("k-NN",)
    hub_task = ("image-classification", "k-NN classification")

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        for name in ("k", "temperature", "memory_gb"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{name} is {getattr(config, name)}; expected more than 0.")
        self.bank = open_split(config, config.train_split, config.train_limit)
        self.queries = open_split(config, config.split)
        self._check_bank()
        jobs = []
        for encoder in load_encoders(models, config):
            side = resolution(store_config(encoder, config))
            settings = {
                **encoder.settings(),
                "output": "summary",
                "k": config.k,
                "temperature": config.temperature,
                "image_size": side,
                "store_dtype": config.store_dtype,
                "bank": self.bank.fingerprint(),
                "queries": self.queries.fingerprint(),
            }
            jobs.append(Job.of(encoder, config.title, settings, side))
        return jobs

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        bank, queries = settings.get("bank"), settings.get("queries")
        return {**settings, "bank": self.bank.recognized(bank), "queries": self.queries.recognized(queries)}

    def measure(self, job: Job, folder: Path) -> Measured:
        config = self.config
        clear_work(folder, config.overwrite)
        # The queries first: they are fewer, so what is wrong with the data shows earlier.
        queries, bank = (store_split(job, split, folder / split.split, config) for split in (self.queries, self.bank))
        in_bank = set(bank.labels.unique().tolist())
        if self.bank.class_names is None and config.train_limit is None:
            warn_of_other_classes(config.title, None, config.data, len(in_bank))
        self._check_classes(in_bank, set(queries.labels.unique().tolist()))
        num_classes = max(in_bank) + 1 if self.bank.num_classes is None else self.bank.num_classes
        memory = config.memory_gb * 1e9
        accuracy = knn_accuracy_of_stores(bank, queries, config.k, config.temperature, num_classes, memory)
        protocol = store_config(job.encoder, config).protocol
        return Measured(
            {"k-NN": accuracy},
            f"k = {config.k}, votes exp(cosine similarity / {config.temperature}); {protocol}; bank of {len(bank)} "
            "images",
            {
                "bank_images": len(bank),
                "query_images": len(queries),
                "classes": num_classes,
                "bank_skipped": sum(bank.skipped.values()),
                "query_skipped": sum(queries.skipped.values()),
            },
        )

    def _check_bank(self) -> None:
        """ValueError for what can be told of the bank before an image is encoded."""
        config, bank = self.config, self.bank
        in_bank, asked = bank.labels_of_folders(), self.queries.labels_of_folders()
        if in_bank is not None and asked is not None:
            self._check_classes(in_bank, asked)
        if bank.class_names is not None:
            warn_of_other_classes(config.title, None, config.data, len(bank.class_names))
        images = bank.count()
        if images is not None and images < config.k:
            raise ValueError(
                f"k is {config.k}; expected 1 to {images}, as many as there are images in the bank "
                f"({config.train_split})."
            )

    def _check_classes(self, in_bank: set[int], asked: set[int]) -> None:
        """ValueError when images ask for a class that no neighbor can vote for."""
        config, names = self.config, self.bank.class_names
        missing = sorted(asked - in_bank)
        if missing:
            named = [names[label] if names else label for label in missing[:5]]
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            limited = " Raise train_limit or leave it out." if config.train_limit is not None else ""
            raise ValueError(
                f"{len(missing)} classes of {config.data} ({config.split}) have no image in the bank "
                f"({config.train_split}): {named}{more}.{limited}"
            )
