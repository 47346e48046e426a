"""Loading that fails unless the weights of a checkpoint are those that its configuration describes."""

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedModel

from .errors_radio import check_layout, check_source, convert_command, naming_checkpoint

# weights of task heads, which a checkpoint may have or lack
HEADS = ("summary_norm.", "batch_norm.", "classifier.")
# prefixes of weights that the checkpoint may lack, while `from_pretrained` runs
_may_be_new: ContextVar[tuple[str, ...]] = ContextVar("_may_be_new", default=())


class CheckedLoadingMixin:
    """First base of a model: a checkpoint and a configuration that do not belong together are an error."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, but a checkpoint and a configuration that do not belong together are an error.

        Args:
            allow_missing (`Sequence[str]`): Prefixes of weights that may start from their initialization, e.g.
                `["classifier"]` to put a new head on a backbone. Only these may have another shape, with
                `ignore_mismatched_sizes=True`.
            allow_unexpected (`Sequence[str]`): Prefixes of weights of the checkpoint that may be left out. Weights of
                a task head always may be, and weights of adaptors where `adaptors` are passed.

        Raises:
            OSError: There is no checkpoint, or a part of it is missing.
            ValueError: The checkpoint is damaged, lacks other weights of this model, has them in other shapes, has
                weights that the model lacks, or contradicts `config.summary_idxs`.
        """
        if pretrained_model_name_or_path is not None or "state_dict" not in kwargs:
            check_source(cls.__name__, pretrained_model_name_or_path)
            check_layout(cls.__name__, pretrained_model_name_or_path)
        left_out = (*allow_unexpected, *HEADS, *(["adaptors."] if "adaptors" in kwargs else []))
        token = _may_be_new.set(tuple(allow_missing))
        try:
            with naming_checkpoint(pretrained_model_name_or_path):
                loaded: Any = super().from_pretrained(  # type: ignore[misc]
                    pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
                )
                model, info = loaded
                _check_found(
                    cls.__name__, info["missing_keys"], info["mismatched_keys"], info["unexpected_keys"], True
                )
                _check_used(cls.__name__, info["unexpected_keys"], left_out)
                _check_summary_idxs(model.base_model)
        finally:
            _may_be_new.reset(token)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: A student in it is fused, and its weights are not those that its configuration describes.
        """
        if _is_fused(self):
            raise ValueError("This model is fused; save it before model.fuse(), and fuse it again once it is loaded.")
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True):
        if mode and _is_fused(self):  # before any part has switched
            raise ValueError("The model is fused, for inference; load it again to train it.")
        return super().train(mode)  # type: ignore[misc]

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # before memory is allocated for missing weights: a mistyped width could need more than there is
        _check_found(
            type(model).__name__,
            loading_info.missing_keys,
            loading_info.mismatched_keys,
            loading_info.unexpected_keys,
            load_config.ignore_mismatched_sizes,
            model.name_or_path or "SOURCE",
        )
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


def _is_fused(model: Any) -> bool:
    return any(getattr(part, "is_fused", False) for part in model.modules())


def _check_found(
    owner: str,
    missing: Iterable[str],
    mismatched: Iterable[tuple],
    unexpected: Iterable[str],
    new: bool,
    source: Any = "SOURCE",
):
    """Raises unless every weight of the model is in the checkpoint, in its shape; those in `_may_be_new` need not be.

    Args:
        mismatched: (name, shape in the checkpoint, shape in the model) of weights.
        source: the checkpoint, for messages.
        new: whether the weights in `_may_be_new` may have another shape in the checkpoint.
    """
    allowed = _may_be_new.get()
    misfits = [entry for entry in mismatched if not (new and entry[0].startswith(allowed))]
    if misfits:
        key, stored, expected = min(misfits)
        if key.startswith(allowed):
            fix = (
                "Pass ignore_mismatched_sizes=True to initialize them afresh, or load with the checkpoint's own config"
            )
        else:
            fix = (
                "Load with the checkpoint's own config; ignore_mismatched_sizes is for weights named in "
                f"allow_missing, here {list(allowed)}"
            )
        raise ValueError(
            f"{owner}: {len(misfits)} weights have other shapes in the checkpoint and would be random: "
            f"{key} is {tuple(stored)} there and {tuple(expected)} here. {fix}."
        )
    absent = sorted(key for key in missing if not key.startswith(allowed))
    if absent:
        if any(key.startswith("radio_model.") for key in unexpected):
            fix = f"It has the layout of NVIDIA's releases. {convert_command(source)}"
        else:
            heads = sorted({key.split(".")[0] for key in absent})
            fix = f"Check the checkpoint and its config, or pass allow_missing={heads} to train these from scratch"
        raise ValueError(
            f"{owner}: {len(absent)} weights are not in the checkpoint and would be random: {_first(absent)}. {fix}."
        )


def _check_used(owner: str, unexpected: Iterable[str], allowed: tuple[str, ...]):
    """Raises unless the model has every weight of the checkpoint; those with an allowed prefix it may lack."""
    unused = sorted(key for key in unexpected if not key.removeprefix("model.").startswith(allowed))
    if unused:
        parts = sorted({key.removeprefix("model.").split(".")[0] for key in unused})
        raise ValueError(
            f"{owner}: {len(unused)} weights of the checkpoint have no place in this model: {_first(unused)}. Its "
            f"configuration contradicts them (num_hidden_layers, adaptors, final_norm, ...): correct it, or pass "
            f"allow_unexpected={parts} to leave these out."
        )


def _check_summary_idxs(model: Any):
    """Raises unless the checkpoint selects the same CLS tokens as the configuration, in a model that selects any."""
    stored = getattr(model, "summary_idxs", None)
    if stored is None or stored.is_meta:
        return
    if stored.tolist() != model.config.summary_idxs:
        raise ValueError(
            f"config.summary_idxs is {model.config.summary_idxs}, but the checkpoint's summary_idxs are "
            f"{stored.tolist()}. Load without summary_idxs, then select from last_hidden_state."
        )


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
