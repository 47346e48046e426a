"""The text towers that zero-shot tasks ask: TYPE:CHECKPOINT of a teacher."""

from transformers_radio.teachers import TextEncoder, has_text, load_text_encoder


def load_text_tower(name: str) -> TextEncoder:
    """The text tower "TYPE:CHECKPOINT" of a teacher, on the CPU: a list of N texts -> (N, D) float32.

    Args:
        name: "open_clip:..." with a checkpoint as for `OpenClipTeacher`, or "transformers:..." with a CLIP, SigLIP or
            SigLIP2.

    Raises:
        ValueError: another type, or a checkpoint that does not fit.
        OSError: a checkpoint that is not there. All name the setting `text`, by which another one is chosen.
    """
    if has_text(name) is False:
        raise ValueError(
            f"{name!r} is not a text tower; expected TYPE:CHECKPOINT with a type of open_clip, transformers, such as "
            "open_clip:ViT-H-14-378-quickgelu:dfn5b."
        )
    try:
        return load_text_encoder(*name.split(":", 1))
    except (OSError, ValueError, RuntimeError) as error:
        kind_of_error = OSError if isinstance(error, OSError) else ValueError
        raise kind_of_error(
            f"The text tower {name} cannot be loaded ({' '.join(str(error).split())}). If it is the teacher that an "
            "adaptor names and it has moved, say where it is with text=TYPE:CHECKPOINT."
        ) from error
