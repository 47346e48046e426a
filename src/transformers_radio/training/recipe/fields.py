"""A recipe is one YAML file over these dataclasses; every field can be overridden as `key=value`.

`transformers-radio train --fields` prints them. "range" and "choices" are what `validate` checks (see settings.py);
relations between fields are in validate.py.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from transformers_radio.data import DataConfig
from transformers_radio.teachers import TEACHERS


@dataclass
class StudentRecipe:
    """The student. It is built from `type`, `size` and `config`, or starts from `checkpoint`."""

    type: str = field(
        default="radio", metadata={"help": "Its architecture: one of transformers_radio.modeling.STUDENTS."}
    )
    size: str = field(
        default="vit-b-16",
        metadata={"help": "A named size of the type; for radio one of RadioConfig.sizes(). Unused with a checkpoint."},
    )
    config: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Fields of the student's configuration that differ from those of its size or checkpoint."},
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "A student's folder or Hub id to start from, in place of a size."}
    )
    keep_adaptors: list[str] | None = field(
        default=None,
        metadata={
            "help": "Adaptors of the checkpoint, without a teacher in this recipe, that are kept, frozen. null: all."
        },
    )
    summary: str | None = field(
        default=None,
        metadata={
            "help": "What the summary is: a CLS token for each teacher, one for all of them, or the average of the "
            "features (paper Table 5). null: cls_per_teacher, or mean for students without tokens.",
            "choices": ("cls_per_teacher", "cls", "mean"),
        },
    )
    head_hidden_dim: int | None = field(
        default=None,
        metadata={
            "help": "Hidden width of the heads. null: the width of the widest teacher (paper section 3.2).",
            "range": "[1, 65536]",
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute each block again in the backward pass: less memory, a third more time."},
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "How attention is computed. eager is the fastest on a CPU with few tokens, where sdpa has a slow "
            "backward pass.",
            "choices": ("sdpa", "eager", "flash_attention_2"),
        },
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile the student's blocks, one by one."})
    spectral_reparam: bool = field(
        default=False,
        metadata={
            "help": "Spectral reparametrization of the blocks' Linears (paper section 4: it steadies training at high "
            "resolution)."
        },
    )


@dataclass
class TeacherRecipe:
    """One frozen teacher. Its name in the recipe is the name of the student's adaptor."""

    type: str = field(
        default=MISSING, metadata={"help": "The library that the teacher comes from.", "choices": tuple(TEACHERS)}
    )
    checkpoint: str = field(
        default=MISSING, metadata={"help": "A Hub id, a local path, or module:Class for the type python."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of its input in pixels. null: the teacher's own.", "range": "[1, 16384]"},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of its weights and activations. auto: bfloat16 where the device has units for it, else float32.",
            "choices": ("float32", "bfloat16", "float16", "auto"),
        },
    )
    placement: str = field(
        default="device",
        metadata={
            "help": "Where its weights are: whole on the device, in the CPU's memory with a block at a time on the "
            "device, or sharded over the processes that it serves.",
            "choices": ("device", "offloaded", "sharded"),
        },
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile its forward pass."})
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of its type, such as `features: neck` for SAM."}
    )
    summary_weight: float = field(
        default=1.0,
        metadata={
            "help": "lambda_i of equation 1. Without effect for a teacher without a summary, such as SAM.",
            "range": "[0, inf)",
        },
    )
    feature_weight: float = field(default=1.0, metadata={"help": "gamma_i of equation 3.", "range": "[0, inf)"})


@dataclass
class LossRecipe:
    """Equations 1 to 3, and how their terms are balanced (paper section 3.4.1, Table 4)."""

    cosine_weight: float = field(default=0.9, metadata={"help": "alpha of equation 2.", "range": "[0, inf)"})
    smooth_l1_weight: float = field(default=0.1, metadata={"help": "beta of equation 2.", "range": "[0, inf)"})
    smooth_l1_beta: float = field(
        default=2.0,
        metadata={
            "help": "Where smooth L1 turns from quadratic to linear. Not in the paper; this is the value of a later "
            "trainer by NVIDIA.",
            "range": "[0, inf)",
        },
    )
    grid: str = field(
        default="larger",
        metadata={
            "help": "On which of the two feature grids student and teacher are compared.",
            "choices": ("larger", "smaller"),
        },
    )
    balancing: str = field(
        default="naive",
        metadata={
            "help": "How the terms are weighted against each other (paper Table 4).",
            "choices": ("naive", "uncertainty", "adaloss", "amtml_kd"),
        },
    )
    standardization: str = field(
        default="none",
        metadata={
            "help": "phi_s: teachers' features have equal variance in every direction while training (PHI-S). The "
            "heads of saved students return features in the teacher's own space all the same.",
            "choices": ("none", "phi_s"),
        },
    )
    statistics_images: int = field(
        default=3000,
        metadata={
            "help": "Images that PHI-S looks at for each teacher, before a stage. Ours.",
            "range": "[1, 1000000000]",
        },
    )


@dataclass
class OptimizerRecipe:
    """AdamW, base learning rate 1e-3 (paper section 4). The paper gives no betas, eps or clipping: these are ours."""

    learning_rate: float = field(default=1e-3, metadata={"help": "After the warm-up.", "range": "(0, inf)"})
    weight_decay: float = field(
        default=0.02,
        metadata={"help": "Of matrices; norms, biases, tokens and position tables have none.", "range": "[0, inf)"},
    )
    beta1: float = field(default=0.9, metadata={"help": "Decay of AdamW's first moment.", "range": "[0, 1)"})
    beta2: float = field(default=0.95, metadata={"help": "Decay of AdamW's second moment.", "range": "[0, 1)"})
    eps: float = field(default=1e-8, metadata={"help": "AdamW's epsilon.", "range": "(0, inf)"})
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Gradients with a larger norm are scaled down to it. .inf: never.", "range": "(0, inf]"},
    )


@dataclass
class GroupRecipe:
    """Teachers that see the same images at one student resolution (paper section 4, partitioning)."""

    teachers: list[str] | None = field(default=None, metadata={"help": "Their names. null: all."})
    resolution: int = field(
        default=MISSING, metadata={"help": "Side of the student's input in pixels.", "range": "[1, 16384]"}
    )
    batch_size: int = field(
        default=MISSING,
        metadata={
            "help": "Images per optimizer step, over all processes of the group.",
            "range": "[1, 1000000]",
        },
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images per forward pass and process. null: batch_size / processes.",
            "range": "[1, 1000000]",
        },
    )
    share: float = field(
        default=1.0,
        metadata={"help": "Of the processes, relative to the shares of the other groups.", "range": "(0, inf)"},
    )
    rate: float = field(
        default=1.0,
        metadata={
            "help": "Share of the steps in which the group takes part; at least one group of a stage has 1.",
            "range": "(0, 1]",
        },
    )
    max_aspect_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Above 1, the student sees its crops in a shape that is drawn for each step: the longer side is "
            "the resolution, and divided by the other one at most this number. The teachers see squares. Not for "
            "groups of SAM.",
            "range": "[1, 16]",
        },
    )


@dataclass
class StageRecipe:
    """A part of training with its own warm-up and cosine schedule: one group of teachers, or several."""

    # of all stages together there are fewer than 10^8, too: checkpoints are numbered with eight digits
    steps: int = field(default=MISSING, metadata={"help": "Optimizer steps.", "range": "[1, 100000000)"})
    resolution: int = field(
        default=0,
        metadata={
            "help": "Side of the student's input in pixels. This field and the next three describe the only group of "
            "a stage without `groups`.",
            "range": "[0, 16384]",
        },
    )
    batch_size: int = field(
        default=1024,
        metadata={"help": "Images per optimizer step, over all processes.", "range": "[1, 1000000]"},
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images per forward pass and process. null: batch_size / processes.",
            "range": "[1, 1000000]",
        },
    )
    teachers: list[str] | None = field(default=None, metadata={"help": "Their names. null: all."})
    groups: dict[str, GroupRecipe] = field(default_factory=dict)
    weighting: str = field(
        default="per_image",
        metadata={
            "help": "per_image: all images of a step count the same. per_rank: a group counts by its share of the "
            "processes.",
            "choices": ("per_image", "per_rank"),
        },
    )
    warmup_steps: int = field(
        default=0,
        metadata={"help": "First steps, in which the learning rate rises from 0.", "range": "[0, 100000000)"},
    )
    learning_rate: float | None = field(default=None, metadata={"help": "null: the optimizer's.", "range": "(0, inf)"})
    weight_decay: float | None = field(default=None, metadata={"help": "null: the optimizer's.", "range": "[0, inf)"})
    batch_norm: str = field(
        default="sync",
        metadata={
            "help": "What batch norms of a student that has them (E-RADIO) normalize by. sync: the images of all "
            "processes of the group in a pass, so that a batch over many processes trains as on one. local: those of "
            "each process, without communication. frozen: the running statistics as they are, for stages whose "
            "resolution leaves a few images per pass, too few to normalize by.",
            "choices": ("sync", "local", "frozen"),
        },
    )

    def teacher_names(self, recipe: "Recipe") -> list[str]:
        """The teachers of all its groups, in the recipe's order."""
        lists = [group.teachers for group in self.groups.values()] or [self.teachers]
        return [name for name in recipe.teachers if any(not listed or name in listed for listed in lists)]

    def preferred_resolution(self, summarized: set[str]) -> int:
        """The resolution in pixels of the middle image when those of teachers with a summary are sorted by their size.

        A student that learned at several sizes is at its best in their middle. At the resolution of groups without a
        summary (SAM's, in the paper) the student's has never been trained; with no other groups it is the highest.

        Args:
            summarized: the teachers that have a summary.
        """
        if not self.groups:
            return self.resolution
        groups = list(self.groups.values())
        trained = [group for group in groups if summarized & set(group.teachers or summarized)]
        if not trained:
            return max(group.resolution for group in groups)
        half = sum(group.batch_size * group.rate for group in trained) / 2
        seen = 0.0
        for group in sorted(trained, key=lambda group: group.resolution):
            seen += group.batch_size * group.rate
            if seen > half:
                break
        return group.resolution


@dataclass
class CheckpointRecipe:
    """Checkpoints, from which the same command resumes the run."""

    every_steps: int = field(
        default=1000, metadata={"help": "Steps between two checkpoints.", "range": "[1, 100000000)"}
    )
    keep: int = field(default=2, metadata={"help": "The newest that are kept.", "range": "[1, 1000000]"})


@dataclass
class Recipe:
    """The whole run."""

    output_dir: str = field(
        default=MISSING,
        metadata={"help": "Folder of the run. An unfinished run of the same recipe in it is resumed."},
    )
    teachers: dict[str, TeacherRecipe] = MISSING
    stages: dict[str, StageRecipe] = MISSING  # run in the order written
    data: DataConfig = MISSING
    student: StudentRecipe = field(default_factory=StudentRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder for the teachers' outputs, which are then computed once per image; needs "
            "data.frozen_crops. null: none."
        },
    )
    mixed_precision: str = field(
        default="no",
        metadata={
            "help": "Precision of the student's forward pass. auto: bf16 where the device has units for it, else no.",
            "choices": ("no", "bf16", "fp16", "auto"),
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the weights, which checkpoints and the finished student then hold. "
            "null: none.",
            "range": "(0, 1)",
        },
    )
    # NumPy's generators take 32 bits; the number of the step, or of the process, is added
    seed: int = field(
        default=0,
        metadata={
            "help": "Of the initial weights, the order of the images and their crops.",
            "range": "[0, 2147483648)",
        },
    )
    log_every_steps: int = field(
        default=10, metadata={"help": "Steps between two lines of metrics.jsonl.", "range": "[1, 100000000)"}
    )
    tracker: str | None = field(
        default="tensorboard", metadata={"help": "Any tracker of Accelerate. null: metrics.jsonl alone."}
    )
    restart_data: bool = field(
        default=False,
        metadata={
            "help": "true: when the saved position does not fit this number of processes, or the data has changed, "
            "the pass over the data begins again. false: that is an error."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "true: a finished run, or one of another recipe, in output_dir is deleted."},
    )
