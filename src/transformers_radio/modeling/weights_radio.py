"""Whether the weights of a checkpoint are those of the model that its configuration describes."""

from collections.abc import Iterable
from contextvars import ContextVar

# task heads, which a student's checkpoint may have or lack
HEADS = ("summary_norm.", "batch_norm.", "classifier.")
# prefixes of weights that the checkpoint may lack, while `from_pretrained` runs
may_be_new: ContextVar[tuple[str, ...]] = ContextVar("may_be_new", default=())


def check_found(owner: str, missing: Iterable[str], mismatched: Iterable[tuple], unexpected: Iterable[str], new: bool):
    """Every weight of the model is in the checkpoint, in its shape, but for those that `may_be_new`.

    Args:
        mismatched: (name, shape in the checkpoint, shape in the model) of weights.
        new: whether those that may be new may have another shape in the checkpoint.
    """
    allowed = may_be_new.get()
    misfits = [entry for entry in mismatched if not (new and entry[0].startswith(allowed))]
    if misfits:
        key, stored, expected = min(misfits)
        if key.startswith(allowed):
            fix = "Pass ignore_mismatched_sizes=True to start them anew, or load with the checkpoint's own config"
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
            fix = (
                "It has the layout of NVIDIA's releases: open it with transformers.RadioModel.from_pretrained and "
                "write it with save_pretrained(folder, save_original_format=False), then load that folder"
            )
        else:
            heads = sorted({key.split(".")[0] for key in absent})
            fix = f"Check the checkpoint and its config, or pass allow_missing={heads} to train these from scratch"
        raise ValueError(
            f"{owner}: {len(absent)} weights are not in the checkpoint and would be random: {_first(absent)}. {fix}."
        )


def check_used(owner: str, unexpected: Iterable[str], allowed: tuple[str, ...]):
    """Every weight of the checkpoint has a place in the model, but for those with an allowed prefix."""
    unused = sorted(key for key in unexpected if not key.removeprefix("model.").startswith(allowed))
    if unused:
        parts = sorted({key.removeprefix("model.").split(".")[0] for key in unused})
        raise ValueError(
            f"{owner}: {len(unused)} weights of the checkpoint have no place in this model: {_first(unused)}. Its "
            f"configuration contradicts them (num_hidden_layers, adaptors, final_norm, ...): correct it, or pass "
            f"allow_unexpected={parts} to leave these out."
        )


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
