"""The settings of LLaVA: its two phases, the questions, and how it is run."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from .scorers import SCORERS


@dataclass
class LlavaPhase:
    """One phase; the defaults are those that the two stock phases share (AdamW, cosine, no weight decay)."""

    conversations: str = field(default=MISSING, metadata={"help": "JSON in LLaVA's format, below data."})
    images: str = field(default=MISSING, metadata={"help": "Folder that its images are named from, below data."})
    learning_rate: float = field(default=MISSING, metadata={"help": "The highest, after the warm-up."})
    batch_size: int = field(
        default=MISSING, metadata={"help": "Examples per step, over all processes and accumulated steps."}
    )
    epochs: float = field(default=1.0, metadata={"help": "Times that every conversation is seen."})
    warmup: float = field(default=0.03, metadata={"help": "Share of the steps."})
    max_length: int = field(default=2048, metadata={"help": "Tokens per example, image tokens included."})
    save_steps: int = field(default=1000, metadata={"help": "Steps from one checkpoint to the next."})


@dataclass
class LlavaHardware:
    """How a phase is run. Only `bf16` changes the numbers."""

    per_device_batch_size: int = field(default=16, metadata={"help": "Examples at once, on each device."})
    num_workers: int = field(default=4, metadata={"help": "Processes that read images, for each training process."})
    bf16: bool = field(default=True, metadata={"help": "Autocast; the weights that are trained stay float32."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Less memory, more time."})
    log_steps: int = field(default=10, metadata={"help": "Steps from one line of the log to the next."})


@dataclass
class LlavaQuestions:
    """A set of questions that is scored here."""

    questions: str = field(
        default=MISSING,
        metadata={
            "help": 'File below data, JSON lines of {"question_id", "image": path below `images` or left out, "text", '
            '"answer": one text, or "answers": several people\'s}.'
        },
    )
    images: str = field(default=MISSING, metadata={"help": "Folder that its images are named from, below data."})
    scorer: str = field(
        default="exact_match",
        metadata={"help": "yes_no is POPE's, vqa compares with several people's answers.", "choices": SCORERS},
    )
    prompt: str = field(
        default="\nAnswer the question using a single word or phrase.",
        metadata={"help": "What follows each question; LLaVA-1.5's own."},
    )
    max_new_tokens: int = field(default=16, metadata={"help": "Tokens of an answer at most."})


@dataclass
class LlavaConfig:
    """Settings of the task; recipes/evaluation/llava.yaml has those of LLaVA-1.5 and the paper."""

    data: str = field(default=MISSING, metadata={"help": "Folder that the paths below start from."})
    name: str = field(default="LLaVA-1.5", metadata={"help": "What results call the data."})
    language_model: str = field(default=MISSING, metadata={"help": "Folder or Hub id of a causal language model."})
    image_size: int = field(
        default=432, metadata={"help": "Longest side in pixels; the aspect ratio stays (paper, section 5.4)."}
    )
    pretrain: LlavaPhase = field(default_factory=LlavaPhase, metadata={"help": "Trains the projector alone."})
    finetune: LlavaPhase = field(
        default_factory=LlavaPhase, metadata={"help": "Trains the projector and the language model."}
    )
    questions: dict[str, LlavaQuestions] = field(
        default_factory=dict, metadata={"help": "Sets of questions that are scored here, by name."}
    )
    lmms_eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Scored by lmms-eval, such as textvqa_val and gqa."}
    )
    textvqa_ocr: bool = field(
        default=True,
        metadata={
            "help": "TextVQA's prompt holds the text that OCR found, as in LLaVA-1.5 and the paper; false is "
            "lmms-eval's default."
        },
    )
    lmms_eval_limit: int | None = field(
        default=None, metadata={"help": "Only so many questions of each task, for a first try. null: all."}
    )
    answer_batch_size: int = field(default=16, metadata={"help": "Questions that are answered at once."})
    max_skipped_share: float = field(
        default=0.01, metadata={"help": "Share of images that may be missing or unreadable."}
    )
    seed: int = field(default=0, metadata={"help": "For the projector's first weights and the order of the examples."})
    hardware: LlavaHardware = field(
        default_factory=LlavaHardware, metadata={"help": "Batches, workers and memory of the two phases."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the result, and the work that other settings left."}
    )
