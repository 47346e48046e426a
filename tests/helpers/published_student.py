"""A small student's folder as training leaves it, with teachers whose licenses are known."""

from pathlib import Path

from transformers_radio import RadioImageProcessor
from transformers_radio.training import load_recipe
from transformers_radio.training.run.card import write_card

from .tiny_radio import build_with_adaptors

RECIPE = """
output_dir: {output}/tiny
teachers:
  clip: {{type: transformers, checkpoint: {clip}}}
  sam: {{type: segment_anything, checkpoint: sam_vit_b_01ec64.pth, summary_weight: 0}}
data: {{path: {data}}}
stages:
  main: {{steps: 10, resolution: 64, batch_size: 4}}
"""


def make_student(folder: Path, clip: str = "openai/clip-vit-base-patch16", data: str = "pixparse/cc12m-wds", **saving):
    """Writes the folder and returns the model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build_with_adaptors()
    model.save_pretrained(folder, **saving)
    RadioImageProcessor(size={"height": 64, "width": 64}, size_divisor=16).save_pretrained(folder)
    path = folder.with_suffix(".yaml")
    path.write_text(RECIPE.format(output=folder.parent, clip=clip, data=data))
    recipe = load_recipe(path)
    teachers = {
        name: {"type": spec.type, "checkpoint": spec.checkpoint, "weights": "0", "dtype": "float32", "image_size": 64}
        for name, spec in recipe.teachers.items()
    }
    write_card(folder, recipe, teachers)
    return model
