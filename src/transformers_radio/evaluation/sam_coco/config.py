"""The settings of SAM-COCO."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from transformers_radio.precision import DTYPES


@dataclass
class SamCocoConfig:
    """Masks for box prompts on one split of COCO; recipes/evaluation/coco2017.yaml has the settings of the paper."""

    data: str = field(
        default=MISSING,
        metadata={"help": "Folder in COCO's layout: val2017/ and annotations/instances_val2017.json."},
    )
    split: str = field(default="val2017", metadata={"help": "Folder of images; its annotations are named after it."})
    name: str = field(default="COCO 2017", metadata={"help": "What results call the data."})
    license: str = field(default="", metadata={"help": "The data's, for people who read the recipe."})
    source: str = field(default="", metadata={"help": "Where to get the data."})
    detections: str | None = field(
        default=None,
        metadata={
            "help": "COCO results file of boxes and scores, to prompt with these instead of the true boxes; the "
            "result is then COCO's mask AP instead of the mean mask IoU."
        },
    )
    sam: str = field(
        default="sam_vit_h_4b8939.pth",
        metadata={"help": "segment_anything's own file, which decodes the masks; must be the adaptor's teacher."},
    )
    adaptor: str = field(default="sam", metadata={"help": "The student's adaptor to SAM."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the student's input in pixels. null: SAM's own (1024)."}
    )
    window_size: int | None = field(
        default=None,
        metadata={"help": "Of the student's attention. null: its default; 0: global; 16: windows of 16 x 16 patches."},
    )
    best_of_three: bool = field(
        default=False, metadata={"help": "The mask with the highest predicted IoU of SAM's three, not the single one."}
    )
    crowds: bool = field(
        default=False,
        metadata={"help": "Score crowd regions like objects, as the paper's harness does; not with detections."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the image encoder, by autocast; bfloat16 on GPUs. The decoder stays in float32.",
            "choices": tuple(DTYPES),
        },
    )
    prompts_per_chunk: int = field(
        default=64, metadata={"help": "Boxes that are decoded at once: memory grows with it, the result does not."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the result and the masks measured so far."})

    @property
    def images(self) -> str:
        """The folder that the annotations' file names are in."""
        return str(Path(self.data) / self.split)

    @property
    def annotations(self) -> str:
        """The split's instance annotations (JSON)."""
        return str(Path(self.data) / "annotations" / f"instances_{self.split}.json")
