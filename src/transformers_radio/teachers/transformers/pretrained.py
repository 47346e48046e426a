"""Checkpoints of transformers: configuration, strictly loaded weights, tokenizer, normalization."""

import pickle
import re
from typing import Any

import transformers

from transformers_radio.modeling.errors_radio import (
    OF_DAMAGED_FILES,
    check_kernels,
    naming_checkpoint,
    one_line,
    shown,
)
from transformers_radio.teachers.base import Normalization, torch_dtype
from transformers_radio.teachers.checkpoints import PREFIXES, unsafe_file_message

TRAINING_PREFIXES = rf"^({'|'.join(map(re.escape, PREFIXES))})+"


def config_dict(checkpoint: str, revision: str | None = None) -> dict[str, Any]:
    """The fields in config.json.

    Raises:
        OSError: when there is no such checkpoint.
        ValueError: when its config.json is damaged.
    """
    with naming_checkpoint(checkpoint):
        written = transformers.PretrainedConfig.get_config_dict(checkpoint, revision=revision)[0]
    if not isinstance(written, dict):
        raise ValueError(f"the config.json of {checkpoint} holds {shown(written)}, expected fields by name")
    check_kernels(checkpoint, written)
    return written


def load_pretrained(
    checkpoint: str,
    model_class: Any,
    dtype: str,
    unused: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Loads strictly, on the CPU: nothing is left random, and nothing in the checkpoint is ignored by accident.

    Args:
        model_class: a class, or its name in transformers.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        unused: what keys of the checkpoint start with that the model does not have and does not need.
        optional: what parameters start with that may be missing in the checkpoint, as nobody reads their output.
        options: of the class's `from_pretrained`, such as `config` and `revision`. A repository's code runs only with
            `trust_remote_code=True`; nobody is asked at a prompt.

    Raises:
        ValueError: for other missing or unexpected weights, weights of other shapes, or pickled code.
    """
    if isinstance(model_class, str):
        model_class = getattr(transformers, model_class)
    options = {"trust_remote_code": False, **options}
    options["key_mapping"] = {TRAINING_PREFIXES: "", **options.get("key_mapping", {})}
    # The library's own report would warn of the towers left out on purpose. What is wrong is raised below.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, info = model_class.from_pretrained(
            checkpoint,
            dtype=torch_dtype(dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
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


def load_tokenizer(checkpoint: str) -> Any:
    """The checkpoint's own tokenizer.

    Raises:
        ValueError: when there is none that can be loaded without running code.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, ImportError, *OF_DAMAGED_FILES) as error:
        raise ValueError(
            f"{checkpoint} has no tokenizer that can be loaded ({one_line(error)}): save the checkpoint's own into "
            "the same folder (AutoTokenizer ... .save_pretrained)"
        ) from error


def normalization_of(checkpoint: str, revision: str | None = None) -> Normalization:
    """mean and std for images in [0, 1], from the checkpoint's image processor.

    Raises:
        ValueError: when the checkpoint has no image processor, or one that does something else than to normalize.
    """
    try:
        processor, _ = transformers.BaseImageProcessor.get_image_processor_dict(checkpoint, revision=revision)
    except OSError as error:
        raise ValueError(
            f"{checkpoint} has no preprocessor_config.json, so its normalization is unknown: save its image processor "
            "into the same folder (AutoImageProcessor ... .save_pretrained)"
        ) from error
    if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"{checkpoint} rescales pixels by {processor['rescale_factor']}, but only 1/255 is supported")
    if not isinstance(processor.get("do_normalize", True), bool):
        raise ValueError(
            f"{checkpoint} has do_normalize={processor['do_normalize']!r} in its preprocessor_config.json"
        )
    if not processor.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if "image_mean" not in processor or "image_std" not in processor:
        raise ValueError(f"the preprocessor_config.json of {checkpoint} names no image_mean and image_std")
    return processor["image_mean"], processor["image_std"]
