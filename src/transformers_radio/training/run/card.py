"""The model card beside a student, and what else a stranger needs to know of its training: recipe and teachers.

The card is rendered once, when training ends. From then on it belongs to its author, who may change anything: what
`eval` and `publish` add goes between its marks (`replace_block`) and into its front matter.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from transformers_radio.disk import write_json, write_text
from transformers_radio.modeling import student_class
from transformers_radio.teachers import portable_checkpoint
from transformers_radio.teachers.licenses import License, hub_id, license_of, read_license, student_license
from transformers_radio.training.recipe import GroupRecipe, Recipe, StageRecipe, save_recipe

CARD, RECIPE, TEACHERS = "README.md", "recipe.yaml", "teacher_manifest.json"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
REPO_ID = "ORG/NAME"  # in a card until it is published
START = "student.checkpoint"  # the manifest's name for the student that training started from
CONVERTED = "converted_from"  # the name, among teachers, of the release that a student was converted from
NOT_MEASURED = "Nothing has been measured yet: `transformers-radio eval TASK --model FOLDER` adds its results here."
DATA_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(folder: Path, recipe: Recipe, teachers: dict[str, dict[str, Any]]) -> None:
    """Writes README.md, recipe.yaml and teacher_manifest.json into the folder of a trained student.

    Args:
        teachers: as `describe_teachers` gives them; licenses are added.
    """
    manifest = add_licenses(teachers, recipe)
    write_json(folder / TEACHERS, manifest)
    shared = portable_recipe(recipe)
    save_recipe(shared, folder / RECIPE)
    found = student_class(recipe.student.type)
    with torch.device("meta"):
        student = found(found.config_class.from_pretrained(folder))
    write_text(folder / CARD, str(student_card(student, shared, manifest)))


def add_licenses(teachers: dict[str, dict[str, Any]], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A teacher manifest with the license of each teacher, and of the student that training started from.

    Called where the checkpoints are, as a folder's own model card says its license.
    """
    manifest = {name: {**entry, "license": None} for name, entry in teachers.items()}
    for name, entry in manifest.items():
        entry["license"] = _as_dict(license_of(entry["type"], recipe.teachers[name].checkpoint))
    start = recipe.student.checkpoint
    if start is not None:
        license = _as_dict(license_of("transformers", start))
        manifest[START] = {"type": "transformers", "checkpoint": portable_checkpoint(start), "license": license}
    return manifest


def all_teachers(config: Any, manifest: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The manifest, and what else the student's configuration says that it learned from or was made of.

    These are the teachers of heads that the manifest does not have, or the release that it was converted from: its
    license is that of its heads too.
    """
    found = dict(manifest)
    origin = getattr(config, "converted_from", None)
    for name, adaptor in config.adaptors.items():
        type, _, checkpoint = str(adaptor.get("teacher") or "").partition(":")
        if name not in found and not isinstance(origin, dict):
            license = _as_dict(license_of(type, checkpoint)) if checkpoint else None
            found[name] = {"type": type, "checkpoint": checkpoint, "license": license}
    if isinstance(origin, dict):
        license_name, link = origin.get("license_name"), origin.get("license_url")
        license = _as_dict(License("other", license_name, link)) if license_name else None
        source = str(origin.get("source") or "an unknown source")
        found[CONVERTED] = {"type": "converted", "checkpoint": source, "license": license}
    return found


def student_card(
    student: Any,
    recipe: Recipe | None,
    manifest: dict[str, dict[str, Any]],
    title: str | None = None,
    untrained: str | None = None,
) -> ModelCard:
    """The card of a student.

    Args:
        student: the model; on the meta device it may be.
        recipe: as `portable_recipe` gives it; None where nobody recorded one.
        manifest: teachers with their licenses, see `add_licenses`.
        title: the heading; the name of the recipe's output_dir unless given.
        untrained: the path of the recipe, for the card of a student that does not exist yet.
    """
    teachers = all_teachers(student.config, manifest)
    converted = teachers[CONVERTED]["checkpoint"] if list(teachers) == [CONVERTED] else None
    if converted is None:
        license, reasons = student_license({name: read_license(one["license"]) for name, one in teachers.items()})
    else:
        license = read_license(teachers[CONVERTED]["license"])
        reasons = [f"These are the weights of {converted}; conversion does not change their license."]
    base_models = [hub_id(one["type"], one["checkpoint"]) for one in teachers.values()]
    datasets, data = ([], []) if recipe is None else describe_data(recipe)
    card_data = ModelCardData(
        license=None if license is None else license.id,
        license_name=None if license is None else license.name,
        license_link=None if license is None else license.link,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=list(dict.fromkeys(one for one in base_models if one)) or None,
        datasets=datasets or None,
        tags=["radio", "vision", "knowledge-distillation", "feature-extraction", "transformers_radio"],
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title or (Path(recipe.output_dir).name if recipe else student.config.model_type),
        repo_id=REPO_ID,
        trained=untrained is None,
        converted=converted,
        recipe_file=untrained,
        teacher_names=_listed(list(student.config.adaptors)),
        teachers=[
            {"name": name, "image_size": None, **one, "license": _license_cell(one)} for name, one in teachers.items()
        ],  # fmt: skip
        data=data,
        evaluation=NOT_MEASURED if untrained is None else "Not trained, so nothing was measured.",
        license_text=license_text(license, reasons),
        **_describe_model(student, recipe),
        **({} if recipe is None else _describe_training(recipe)),
    )


def license_text(license: License | None, reasons: list[str]) -> str:
    """What the card says under License."""
    link = f" ([text]({license.link}))" if license is not None and license.link else ""
    chosen = (
        f"**{license}**{link}."
        if license is not None
        else "**Not chosen yet**: set `license:` at the top of this file."
    )
    note = "What is said of the teachers' licenses was recorded by `transformers_radio`; the teachers' pages decide."
    return "\n".join([chosen, "", *(f"- {reason}" for reason in reasons), "", note])


def replace_block(text: str, name: str, content: str) -> str:
    """The card's text with `content` between the marks of a block, `evaluation` or `license`; as it was without."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{content}{match[2]}", text, flags=re.DOTALL)


def find_block(text: str, name: str) -> str:
    """What is between the marks of a block; empty without them."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, flags=re.DOTALL)
    return found[1] if found else ""


def describe_data(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Ids of the data sets that are on the Hub, and a line for each source of the recipe, which is portable."""
    sources = recipe.data.named_sources()
    total = sum(source.weight for source in sources.values())
    ids, lines = [], []
    for name, source in sources.items():
        share = f", {100 * source.weight / total:.3g} % of the images" if len(sources) > 1 else ""
        if DATA_ID.fullmatch(source.path):
            ids.append(source.path)
            where = f"[{source.path}](https://huggingface.co/datasets/{source.path}), split {source.split}"
        else:
            where = f"`{source.path}`"
        lines.append(f"{f'{name}: ' if name else ''}{where}{share}")
    if len(ids) < len(sources):
        lines.append("`local:` is a folder or file on the disk of whoever trains the model: say here what is in it.")
    return ids, lines


def portable_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the folders, addresses and keys of the machine that trained with it.

    A file or folder is `local:NAME`, an address is without query and password, output_dir is its last part alone.
    """
    data = recipe.data
    sources = {
        name: replace(source, path=_portable_data(source.path), image_root=_portable_root(source.image_root))
        for name, source in data.sources.items()
    }
    path = _portable_data(data.path) if data.path else data.path
    teachers = {
        name: replace(spec, checkpoint=portable_checkpoint(spec.checkpoint)) for name, spec in recipe.teachers.items()
    }
    start = recipe.student.checkpoint
    return replace(
        recipe,
        output_dir=Path(recipe.output_dir).name,
        teacher_cache=None,
        overwrite=False,
        teachers=teachers,
        student=replace(recipe.student, checkpoint=start and portable_checkpoint(start)),
        data=replace(data, path=path, sources=sources, image_root=_portable_root(data.image_root)),
    )


def _portable_data(path: str) -> str:
    if "://" in path:
        scheme, _, address = path.partition("://")
        host, slash, rest = address.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{rest.partition('?')[0]}"
    on_disk = path.startswith(("/", "~", ".")) or Path(path).exists() or not DATA_ID.fullmatch(path)
    return f"local:{Path(path).name}" if on_disk and not path.startswith("local:") else path


def _portable_root(folder: str | None) -> str | None:
    return None if folder is None else _portable_data(folder)


def _describe_model(student: Any, recipe: Recipe | None) -> dict[str, Any]:
    config = student.config
    heads = _count(student.adaptors)
    architecture = type(student).__name__
    if recipe is not None and recipe.student.checkpoint is None:
        changed = [f"{name}={value}" for name, value in recipe.student.config.items()]
        architecture += f", {recipe.student.size}" + (f" with {', '.join(changed)}" if changed else "")
    return {
        "architecture": architecture,
        "parameters": f"{(_count(student) - heads) / 1e6:.3g} M, and {heads / 1e6:.3g} M in the adaptors",
        "patch_size": student.patch_size,
        "step": student.min_resolution_step,
        "preferred_resolution": student.preferred_resolution,
        "summary_dim": student.summary_dim,
        "feature_dim": student.feature_dim,
        # transformers has a class of this type; it refuses what it would misread
        "has_native_class": config.model_type == "radio" and not isinstance(config.to_dict()["use_swiglu_ffn"], str),
        "adaptors": [{"name": name, "teacher": "", **one} for name, one in config.adaptors.items()],
    }


def _describe_training(recipe: Recipe) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, stage in recipe.stages.items():
        everyone = stage.teacher_names(recipe)
        groups: dict[str, GroupRecipe | StageRecipe] = {**stage.groups} or {"–": stage}
        for group_name, group in groups.items():
            rows.append(
                {
                    "stage": name,
                    "group": group_name,
                    "teachers": ", ".join(group.teachers or everyone),
                    "resolution": group.resolution,
                    "batch_size": group.batch_size,
                    "steps": f"{stage.steps:,}",
                }
            )
    loss, optimizer = recipe.loss, recipe.optimizer
    lines = [
        "summaries: cosine; features: "
        f"{loss.cosine_weight:g} cosine + {loss.smooth_l1_weight:g} smooth L1 (beta {loss.smooth_l1_beta:g})",
        f"balancing: {loss.balancing}; standardization of the targets: {loss.standardization}",
        f"AdamW, learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g}, betas "
        f"{optimizer.beta1:g} and {optimizer.beta2:g}, gradients clipped at {optimizer.max_grad_norm:g}",
        f"precision {'float32' if recipe.mixed_precision == 'no' else recipe.mixed_precision}, seed {recipe.seed}"
        + (f", averaged weights (decay {recipe.ema_decay:g})" if recipe.ema_decay else ""),
    ]
    weights = [
        {"name": name, "summary": f"{spec.summary_weight:g}", "features": f"{spec.feature_weight:g}"}
        for name, spec in recipe.teachers.items()
    ]
    return {"stages": rows, "losses": lines, "weights": weights}


def _license_cell(entry: dict[str, Any]) -> str:
    license = read_license(entry["license"])
    if license is None:
        return "not known"
    return f"[{license}]({license.link})" if license.link else str(license)


def _as_dict(license: License | None) -> dict[str, Any] | None:
    return None if license is None else asdict(license)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _listed(names: list[str]) -> str:
    *first, last = names or ["its teachers"]
    return f"{', '.join(first)} and {last}" if first else last
