"""Which column of a table, or which extension in a tar, is the image."""

import base64
import binascii
import itertools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .config import SourceConfig
from .errors import ColumnError
from .images import EXTENSIONS
from .remote import is_url

if TYPE_CHECKING:
    import pyarrow

# Names that are preferred among several columns of images.
USUAL = ("image", "img", *(extension[1:] for extension in EXTENSIONS))
# How image files begin as base64 text: JPEG, PNG, GIF, WebP, TIFF.
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")


def choose(samples: list[list[str]], images: list[str], config: SourceConfig, where: str, hint: str = "") -> list[str]:
    """Chooses among the columns `images`. Several are accepted only if no sample has two of them (jpg or png).

    Args:
        samples: the columns of each sample; of a table, one list for all its rows.
        hint: what the error says if there is none.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(samples)))
    all_columns = ", ".join(columns) or "no columns at all"
    if config.image_column is not None:
        if config.image_column not in columns:
            raise ColumnError(
                f"{where}.image_column={config.image_column!r}: {config.path} has the columns {all_columns}."
            )
        return [config.image_column]
    if len(images) > 1:  # a tar with KEY.jpg and KEY.mask.png: the plain name is the image
        images = [name for name in images if name.lower() in USUAL] or images
    # with x.001.jpg and y.002.jpg there is no column for all samples, even if no sample has two of them
    stems = {stem(name) for name in images}
    if len(stems) != 1 or max(len(set(images) & set(sample)) for sample in samples) > 1:
        found = f"several ({', '.join(images)})" if images else "none"
        fix = hint or f"Set {where}.image_column."
        if stems - {""}:
            fix += (
                " A sample's key ends at the first dot of its file name; what follows names the column. If names in"
                " the tar have dots of their own, such as my.photo.001.jpg, rename the files and write the tar again."
            )
        raise ColumnError(
            f"{where}.path={config.path!r}: expected one column of images, found {found} among {all_columns}. {fix}"
        )
    return images


def stem(name: str) -> str:
    """What a name has before its extension: nothing for "jpg", "mask" for "mask.png"."""
    return name.rpartition(".")[0].lower()


def choose_from_table(
    schema: "pyarrow.Schema",
    declared: dict[str, str],
    first_values: Callable[[list[str]], dict[str, Any]],
    config: SourceConfig,
    where: str,
) -> str:
    """The column that holds the images of a table.

    Args:
        declared: column -> the type that `datasets` states for it, e.g. "Image"; may lack columns.
        first_values: columns -> their first values; columns without a value in the first rows are left out.
    """
    given = config.image_column
    if given is not None and given in schema.names:
        check_type(schema, given, config, where)
    images = [field.name for field in schema if _is_image(field.type, declared.get(field.name))]
    hints: list[str] = []
    if given is not None or not images:
        texts = [field.name for field in schema if _is_text(field.type) and given in (None, field.name)]
        for name, value in first_values(texts).items():
            hints += _hints_of_text(name, value, where)
            if given == name and is_base64(value):
                raise ColumnError(f"{where}.image_column={given!r}: {' '.join(hints)}")
        hints += [_hint_of_list(field.name) for field in schema if _is_list(field.type)]
        hints += [_hint_of_struct(field.name) for field in schema if _holds_image(field.type)]
    column = choose([schema.names], images, config, where, " ".join(hints))[0]
    check_type(schema, column, config, where)
    return column


def is_base64(value: str | bytes) -> bool:
    """Whether this is an image file encoded as text."""
    start = value[:200].decode("latin-1") if isinstance(value, bytes) else value[:200]
    if start.startswith("data:image/") or not start.startswith(BASE64_STARTS):
        return start.startswith("data:image/")
    try:
        return len(base64.b64decode(start[: len(start) // 4 * 4], validate=True)) >= 48
    except binascii.Error:
        return False


def check_type(schema: "pyarrow.Schema", column: str, config: SourceConfig, where: str) -> None:
    """Raises ColumnError if no image file can be in the column, or several have its name."""
    from pyarrow import types

    if schema.names.count(column) > 1:
        raise ColumnError(
            f"{where}.path={config.path!r}: {schema.names.count(column)} columns have the name {column!r}. Rename all"
            " but one of them."
        )
    field = schema.field(column)
    is_file = _is_bytes(field.type) or _is_text(field.type) or types.is_null(field.type)
    if is_file or (types.is_struct(field.type) and {"bytes", "path"} & {part.name for part in field.type}):
        return
    advice = f"Set {where}.image_column to another one."
    if _is_list(field.type):
        advice = _hint_of_list(field.name)
    elif _holds_image(field.type):
        advice = _hint_of_struct(field.name)
    raise ColumnError(
        f"{where}.path={config.path!r}: column {field.name!r} is of type {str(field.type)[:200]}; expected image"
        f" files: binary, or bytes with a path. {advice}"
    )


def declared_types(schema: "pyarrow.Schema") -> dict[str, str]:
    """The types that `datasets` has noted in a file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature["_type"] for name, feature in features.items() if "_type" in feature}
    except (KeyError, TypeError, ValueError):
        return {}


def _is_image(kind: "pyarrow.DataType", declared: str | None) -> bool:
    from pyarrow import types

    if declared not in (None, "Value"):  # sounds, too, are bytes with a path
        return declared == "Image"
    return _is_bytes(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_bytes(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: "pyarrow.DataType") -> bool:
    """Whether these are lists of what may be images."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and _is_image(kind.value_type, None)


def _holds_image(kind: "pyarrow.DataType") -> bool:
    """Whether a column of images is nested in this one."""
    from pyarrow import types

    return types.is_struct(kind) and not _is_image(kind, None) and any(_is_image(part.type, None) for part in kind)


def _hint_of_struct(name: str) -> str:
    return f"Column {name!r} holds images among other things: write the table anew with a column of images alone."


def _hint_of_list(name: str) -> str:
    return f"Column {name!r} holds lists of images: write the table anew with one image in each row."


def hint_of_base64(name: str) -> str:
    return f"Column {name!r} holds images as base64 text: write the table anew with base64.b64decode of each."


def _hints_of_text(name: str, value: str, where: str) -> list[str]:
    shown = value if len(value) < 80 else f"{value[:80]}..."
    if is_base64(value):
        return [hint_of_base64(name)]
    if is_url(value):
        return [
            f"Column {name!r} holds addresses such as {shown!r}: download the images first, for instance with"
            " img2dataset, and give the tars that it writes."
        ]
    if value.lower().endswith(EXTENSIONS):
        return [f"Column {name!r} names files such as {shown!r}: set {where}.path to the folder that holds them."]
    return []
