"""Checkpoints of transformers: configuration, strictly loaded weights, normalisation."""

import pickle
import re
from typing import Any

from transformers_radio.modeling.errors_radio import naming_checkpoint, shown

from .base import DTYPES
from .checkpoints import PREFIXES, unsafe_file_message

TRAINING_PREFIXES = rf"^({'|'.join(map(re.escape, PREFIXES))})+"


def config_dict(checkpoint: str, revision: str | None = None) -> dict[str, Any]:
    from transformers import PretrainedConfig

    with naming_checkpoint(checkpoint):
        written = PretrainedConfig.get_config_dict(checkpoint, revision=revision)[0]
    if not isinstance(written, dict):
        raise ValueError(f"the config.json of {checkpoint} holds {shown(written)}, expected fields by name")
    return written


def load_pretrained(
    checkpoint: str,
    model_class: Any,
    dtype: str,
    unused: tuple[str, ...] = (),
    config: Any = None,
    optional: tuple[str, ...] = (),
    renamed: dict[str, str] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load strictly: every parameter must come from the checkpoint, but for those that start with `optional` (whose
    output nobody reads then), and its other keys must start with `unused`.

    Args:
        renamed: pattern of names in the checkpoint -> what replaces it.
        trust_remote_code: of an AutoModel: whether the repository's own code may run; never asks.
    """
    import transformers

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    if isinstance(model_class, str):
        model_class = getattr(transformers, model_class)
    # Its own report would warn of the text tower, which is left out on purpose; what is wrong is raised below.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, info = model_class.from_pretrained(
            checkpoint,
            config=config,
            dtype=DTYPES[dtype],
            key_mapping={TRAINING_PREFIXES: "", **(renamed or {})},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
    except pickle.UnpicklingError as error:
        raise ValueError(unsafe_file_message(checkpoint)) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(optional))
    mismatched = sorted(str(entry) for entry in info["mismatched_keys"])
    unexpected = sorted(
        key for key in info["unexpected_keys"] if not key.startswith(unused) and not key.endswith("position_ids")
    )
    if missing or unexpected or mismatched:
        raise ValueError(
            f"{checkpoint} does not fit {type(model).__name__}: missing keys {missing}, unexpected keys {unexpected}, "
            f"keys of other shapes {mismatched}"
        )
    return model


def normalization(checkpoint: str, revision: str | None = None) -> dict[str, list[float]]:
    """mean and std for images in [0, 1], from the checkpoint's image processor."""
    from transformers import BaseImageProcessor

    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(checkpoint, revision=revision)
    except OSError as error:
        raise ValueError(
            f"{checkpoint} has no preprocessor_config.json, so its normalisation is unknown: save its image processor "
            "into the same folder (AutoImageProcessor ... .save_pretrained)"
        ) from error
    if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"{checkpoint} rescales pixels by {processor['rescale_factor']}, but only 1/255 is supported")
    if not isinstance(processor.get("do_normalize", True), bool):
        raise ValueError(
            f"{checkpoint} has do_normalize={processor['do_normalize']!r} in its preprocessor_config.json"
        )
    if not processor.get("do_normalize", True):
        return {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    if "image_mean" not in processor or "image_std" not in processor:
        raise ValueError(f"the preprocessor_config.json of {checkpoint} names no image_mean and image_std")
    return {"mean": processor["image_mean"], "std": processor["image_std"]}
