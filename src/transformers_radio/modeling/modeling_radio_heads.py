"""Task heads on a RADIO student: image classification, semantic segmentation, and a backbone for dense models."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_radio import RadioConfig
from .configuration_radio_backbone import RadioBackboneConfig
from .inputs_radio import can_read_values, check_classes, check_labels
from .modeling_radio import RadioModel
from .parts_radio import RadioInnerModel, RadioPart, weight_state
from .weights_radio import HEADS

_IGNORED_CLASS = -100  # by cross-entropy, in torch and transformers


class RadioHeadModel(RadioInnerModel):
    """A student below a task head, which a subclass adds.

    The student's adaptors stay and are saved with it, so that a fine-tuned folder still opens as a student with them;
    `from_pretrained(folder, adaptors={})` drops them. The head never computes them, and they are frozen: they keep
    the values that they were distilled with, while fine-tuning moves the features below them.
    """

    _keys_to_ignore_on_load_unexpected: Any = None  # adaptors are left out where `adaptors` says so, and only there
    accepts_loss_kwargs = False  # tells transformers.Trainer that losses are means over one batch
    output_class: type[ModelOutput]
    student_class: Any = RadioModel
    _labels_checked = False

    def __init__(self, config):
        super().__init__(copy.deepcopy(self.config_class.adopt(config)))
        self.model = self.student_class(self.config)
        self._freeze_adaptors()

    def _freeze_adaptors(self):
        # DistributedDataParallel refuses weights that could be trained and get no gradients
        self.model.adaptors.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, allow_missing: Sequence[str] = HEADS, **kwargs):
        """As [`RadioModel.from_pretrained`]; only the head may be missing, and transformers then reports it as new.

        `adaptors={}` leaves the student's adaptors out.
        """
        loaded = super().from_pretrained(*args, allow_missing=allow_missing, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_adaptors()  # loading makes weights trainable
        return loaded

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> ModelOutput:
        """
        Args:
            pixel_values (batch_size, 3, height, width): in [0, 1], sides multiples of `min_resolution_step`.
            labels: what the images show, as the class describes it.
            pixel_mask (batch_size, height, width): 1 on the image, 0 on padding; see the student.

        Returns:
            `logits` and, with labels, their mean `loss`, as the class describes them.

        Raises:
            ValueError: Images that the student does not take, or labels of another kind or shape or of no class.
        """
        if labels is not None:
            self.model.check_images(pixel_values)
            labels = self._checked_labels(labels, len(pixel_values))
        outputs = self.model(
            pixel_values,
            adaptors=[],
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            pixel_mask=pixel_mask,
        )
        logits = self._logits(outputs, *pixel_values.shape[-2:])
        return self.output_class(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _checked_labels(self, labels: torch.Tensor, num_images: int) -> torch.Tensor:
        raise NotImplementedError

    def _logits(self, outputs: Any, height: int, width: int) -> torch.Tensor:
        raise NotImplementedError

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _check_classes(self, labels: torch.Tensor, ignore_index: int):
        """Raises ValueError for a label that is neither a class nor ignored.

        Looking makes an accelerator wait. So on CUDA, whose own kernels stop (without a name) at such a label, only
        the first batch is looked at; elsewhere each one.
        """
        if can_read_values(labels) and not (labels.is_cuda and self._labels_checked):
            check_classes(labels, self.config.num_labels or 0, ignore_index)
            self._labels_checked = True


class RadioForImageClassification(RadioHeadModel):
    """LayerNorm and a linear layer on the summary; the norm because RADIO has none and its scale is arbitrary.

    Trains with `transformers.Trainer`. `logits` are `(batch_size, num_labels)`. The loss follows
    `config.problem_type`, or what `config.num_labels` and the type of the labels say, as in all of transformers:
    labels are class indices `(batch_size,)`, where -100 is ignored; float targets `(batch_size, num_labels)` for
    several labels per image; or float targets `(batch_size,)` or `(batch_size, num_labels)` for a regression.
    """

    output_class = ImageClassifierOutput

    def __init__(self, config):
        super().__init__(config)
        config = self.config
        self.summary_norm = nn.LayerNorm(self.model.summary_dim, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(self.model.summary_dim, config.num_labels)
        self.post_init()

    def _logits(self, outputs: Any, height: int, width: int) -> torch.Tensor:
        return self.classifier(self.summary_norm(outputs.summary))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # at least 1: a batch without any class has loss 0, not NaN
        count = (labels != _IGNORED_CLASS).sum().clamp(min=1)
        return self.loss_function(labels, logits, self.config, num_items_in_batch=count)

    def _checked_labels(self, labels: torch.Tensor, num_images: int) -> torch.Tensor:
        check_labels(labels, "one class index per image, or float targets", next(self.parameters()))
        if labels.ndim == 0 or len(labels) != num_images:
            count = 1 if labels.ndim == 0 else len(labels)
            raise ValueError(f"got {count} labels for {num_images} images; give one label per image")
        problem, num_labels = self.config.problem_type, self.config.num_labels or 0
        if labels.ndim == 1 and num_labels > 1 and not labels.is_floating_point():
            labels = labels.long()  # all that cross-entropy takes
        # what transformers takes as class indices
        if problem == "single_label_classification" or (
            problem is None and num_labels > 1 and labels.dtype in (torch.int64, torch.int32)
        ):
            if labels.numel() != num_images or labels.is_floating_point():
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected one class index per "
                    f"image, ({num_images},) int64. For several labels per image pass float targets ({num_images}, "
                    f"{num_labels})"
                )
            self._check_classes(labels, _IGNORED_CLASS)
        else:
            is_regression = problem == "regression" or (problem is None and num_labels == 1)
            shapes = [(num_images, num_labels)] + [(num_images,)] * (num_labels == 1)
            if tuple(labels.shape) not in shapes or not (labels.is_floating_point() or is_regression):
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected float targets "
                    f"({num_images}, {num_labels}), one for each of num_labels {num_labels}"
                )
        return labels


class RadioForSemanticSegmentation(RadioHeadModel):
    """The paper's linear probe: batch norm and a 1x1 convolution on the features (AM-RADIO, section 5.3).

    The paper freezes the student: `model.model.requires_grad_(False)`. `logits` are `(batch_size, num_labels, h, w)`
    on the grid of the features; where the input is padding they mean nothing, as features are zero there. Labels are
    integers `(batch_size, label_height, label_width)`, the class of each pixel, at any size; those of
    `config.semantic_loss_ignore_index` (255 unless set) do not count. The loss is the mean cross-entropy of the
    logits, resized bilinearly to the labels.
    """

    output_class = SemanticSegmenterOutput

    def __init__(self, config):
        super().__init__(config)
        self.batch_norm = nn.BatchNorm2d(self.model.feature_dim)
        self.classifier = nn.Conv2d(self.model.feature_dim, self.config.num_labels, kernel_size=1)
        self.post_init()

    @property
    def _ignored_class(self) -> int:
        return getattr(self.config, "semantic_loss_ignore_index", 255)

    def _logits(self, outputs: Any, height: int, width: int) -> torch.Tensor:
        features = self.model.features_to_grid(outputs.features, height, width)  # (B, hidden, h, w)
        return self.classifier(self.batch_norm(features))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(scores, labels, ignore_index=self._ignored_class, reduction="sum")
        return loss / (labels != self._ignored_class).sum().clamp(min=1)  # a batch without any label: 0, not NaN

    def _checked_labels(self, labels: torch.Tensor, num_images: int) -> torch.Tensor:
        check_labels(labels, "a map of class indices per image", next(self.parameters()))
        if labels.ndim != 3 or len(labels) != num_images or labels.is_floating_point() or not labels.numel():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected one map of integers "
                f"per image: ({num_images}, label_height, label_width)"
            )
        labels = labels.long()  # all that cross_entropy takes
        self._check_classes(labels, self._ignored_class)
        return labels


class RadioBackbone(BackboneMixin, RadioPart):
    """Feature maps for transformers' detectors and segmenters, by `backbone_config=RadioBackboneConfig(...)`.

    All maps have the stride of the patches. The input is in [0, 1], not normalized, with sides that are multiples of
    `min_resolution_step`: use [`RadioImageProcessor`]. Blocks after the last map are not built: their output would
    be unused, and their weights would get no gradients.

    Args:
        config: a [`RadioBackboneConfig`], or a student's configuration.
        out_features, out_indices: the maps, as in [`RadioBackboneConfig`]; those of `config` when missing.
    """

    config_class = RadioBackboneConfig

    def __init__(self, config, out_features: list[str] | None = None, out_indices: list[int] | None = None):
        config = copy.deepcopy(RadioBackboneConfig.adopt(config))
        config.adaptors = {}
        if out_features is not None or out_indices is not None:
            config.set_output_features_output_indices(out_features, out_indices)
        super().__init__(config)
        self.model = RadioModel(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        built = self.stage_names.index(self.out_features[-1])  # stage n is after block n
        del self.model.encoder.layer[built:]
        left_out = "|".join(map(str, range(built, config.num_hidden_layers)))
        self._keys_to_ignore_on_load_unexpected = [r"adaptors\.", rf"encoder\.layer\.({left_out})\."]
        self.post_init()
        self.built_with = weight_state(self.model)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """
        Args:
            pixel_values (batch_size, 3, height, width): in [0, 1], sides multiples of `min_resolution_step`.
            pixel_mask (batch_size, height, width): 1 on the image, 0 on padding; see [`RadioModel`].

        Returns:
            `feature_maps`, one (batch_size, hidden_size, height / patch_size, width / patch_size) per `out_features`,
            or (batch_size, 1 + patches, hidden_size) with `config.reshape_hidden_states=False`; `hidden_states` on
            request: the whole sequences (batch_size, prefix + patches, hidden_size) up to the last map.

        Raises:
            ValueError: `out_features` were changed to a stage after the last block that was built; hidden states that
                there are not.
        """
        stages = self.stage_names[: 1 + len(self.model.blocks)]
        if self.out_features[-1] not in stages:
            raise ValueError(
                f"out_features are {self.out_features}, but this backbone was built up to {stages[-1]!r}; build or "
                "load it with these out_features."
            )
        outputs, wanted = self.run_student(pixel_values, output_hidden_states, output_attentions, pixel_mask)
        height, width = pixel_values.shape[-2:]
        feature_maps = []
        last = self.config.num_hidden_layers
        for block, (stage, tokens) in enumerate(zip(stages, outputs.hidden_states, strict=True)):
            if stage in self.out_features:
                # the final norm of the variant that has one (an identity otherwise): the last map is `features`
                tokens = self.model.finish(tokens) if block == last else self.model.norm(tokens)
                if self.config.reshape_hidden_states:
                    patches = tokens[:, self.config.num_summary_tokens :]
                    feature_maps.append(self.model.features_to_grid(patches, height, width))
                else:
                    feature_maps.append(self.model.summary_and_patches(tokens))
        hidden_states = None
        if wanted:
            hidden_states = tuple(
                tokens if layer in wanted else None for layer, tokens in enumerate(outputs.hidden_states)
            )
        return BackboneOutput(
            feature_maps=tuple(feature_maps),  # type: ignore[arg-type]
            hidden_states=hidden_states,  # type: ignore[arg-type]
            attentions=outputs.attentions,
        )


class RadioStudentBackbone(RadioBackbone):
    """Lets `AutoBackbone` open a student's repository, for which it expects a class with the student's config."""

    config_class = RadioConfig  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return RadioBackbone.from_pretrained(*args, **kwargs)


RadioForImageClassification.register_for_auto_class("AutoModelForImageClassification")
RadioForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
RadioBackbone.register_for_auto_class("AutoBackbone")
AutoBackbone.register(RadioBackboneConfig, RadioBackbone, exist_ok=True)
# transformers' pipelines look classes up by name in these tables; the keys are not types of models, so nothing else
# changes
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["radio_image_classification"] = RadioForImageClassification.__name__
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["radio_semantic_segmentation"] = RadioForSemanticSegmentation.__name__
