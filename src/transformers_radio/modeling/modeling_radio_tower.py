"""The vision tower that LLaVA builds: one summary token and the patches, at every layer."""

from typing import Any

import torch
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_radio_tower import RadioVisionTowerConfig
from .errors_radio import shown
from .inputs_radio import check_layers
from .modeling_eradio import ERadioModel
from .modeling_radio import RadioModel
from .modeling_radio_timm import RadioTimmModel
from .padding_radio import top_left
from .parts_radio import RadioPart, weight_state

_STUDENTS: dict[str, Any] = {"radio": RadioModel, "eradio": ERadioModel, "radio_timm": RadioTimmModel}


class RadioVisionTower(RadioPart):
    """A RADIO student as the vision tower of `transformers.LlavaForConditionalGeneration`.

    LLaVA picks `hidden_states[vision_feature_layer]` and, with the strategy "default", drops exactly one token in
    front. RADIO has several CLS and register tokens there, so each hidden state is rebuilt as one summary token and
    the patches: "default" is the patches alone (what the paper feeds, section 5.4), "full" the summary token as well.
    The summary token is the first selected CLS token, or the average of the patches with average pooling.

    `from_pretrained` also takes the folder of a student, `from_radio` a student in memory. For a LLaVA that is built
    with `vision_config=RadioVisionTowerConfig.from_pretrained(folder)`, `load_student(llava, folder)` loads the
    student's weights.

    The number of patches follows each image, height / patch_size * width / patch_size, square or not.
    [`RadioLlavaProcessor`] puts as many image tokens into the text and returns the `image_sizes`, so that no image
    sees the padding of its batch. Pixels are in [0, 1], and the student normalizes them.

    A student whose blocks have maps of different sizes (E-RADIO, a network of timm) has one layer, its features:
    LLaVA then needs `vision_feature_layer=-1`. Images of different sizes run one by one.
    """

    config_class = RadioVisionTowerConfig  # type: ignore[assignment]

    def __init__(self, config: RadioVisionTowerConfig):
        super().__init__(config)
        self.model = _STUDENTS[self.config.radio_config.model_type](self.config.radio_config)
        self.post_init()
        self.built_with = weight_state(self.model)

    @classmethod
    def from_radio(cls, model: Any, image_size: int | None = None) -> "RadioVisionTower":
        """The tower of a student: a copy of its backbone, without the adaptors, on the same device."""
        tower = cls(RadioVisionTowerConfig(radio_config=model.config, image_size=image_size))
        tower.model.load_state_dict(model.with_adaptors([]).state_dict())
        tower.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
        return tower.train(model.training)

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (batch_size, 3, height, width): in [0, 1], sides multiples of `model.min_resolution_step`.
            output_hidden_states: True for all hidden states, or the layers that are wanted (as LLaVA passes); the
                others are then None.

            image_sizes (batch_size, 2): (height, width) in pixels of each image at the top left of `pixel_values`,
                multiples of `model.min_resolution_step`; all fill it when missing.

        Returns:
            `last_hidden_state` and each of `hidden_states` (the embeddings, then every block): (batch_size,
            1 + height / patch_size * width / patch_size, hidden_size). With `image_sizes` they are (1, 1 + number of
            patches of all images, hidden_size), as LLaVA expects: one summary token, which its strategy "default"
            drops, and the patches image by image. `pooler_output`: the student's summaries.

        Raises:
            ValueError: `image_sizes` that do not fit the images.
        """
        if not hasattr(self.config.radio_config, "num_hidden_layers"):
            return self._forward_pooled(pixel_values, output_hidden_states, image_sizes)
        inside, pixel_mask = None, None
        if image_sizes is not None:
            sizes = self._check_sizes(image_sizes, pixel_values)
            height, width = pixel_values.shape[-2:]
            grids = sizes // self.patch_size
            inside = top_left(grids, height // self.patch_size, width // self.patch_size)  # (batch, h, w)
            pixel_mask = top_left(sizes, height, width)  # (batch, H, W)
        outputs, wanted = self.run_student(pixel_values, output_hidden_states, output_attentions, pixel_mask)

        def summary_and_patches(tokens: torch.Tensor) -> torch.Tensor:
            return self.model.summary_and_patches(tokens) if inside is None else self._pack(tokens, inside)

        hidden_states = None
        if wanted:
            last = len(outputs.hidden_states) - 1
            hidden_states = tuple(
                summary_and_patches(self.model.finish(tokens) if layer == last else self.model.norm(tokens))
                if layer in wanted
                else None
                for layer, tokens in enumerate(outputs.hidden_states)
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=summary_and_patches(outputs.last_hidden_state),
            pooler_output=outputs.summary,
            hidden_states=hidden_states,  # type: ignore[arg-type]
            attentions=outputs.attentions,
        )

    def _forward_pooled(
        self, pixel_values: torch.Tensor, output_hidden_states: Any, image_sizes: Any
    ) -> BaseModelOutputWithPooling:
        """`forward` for a student with one layer of tokens, its features."""
        self._warn_if_random()
        layers = output_hidden_states if isinstance(output_hidden_states, (list, tuple)) else [output_hidden_states]
        if any(isinstance(layer, int) and layer not in (-1, 0, True) for layer in layers):
            raise ValueError(
                f"output_hidden_states is {shown(output_hidden_states)}, but a {type(self.model).__name__} has one "
                "layer, its features; build LLaVA with vision_feature_layer=-1."
            )
        wanted = check_layers(output_hidden_states, 1)
        if image_sizes is None:
            output = self.model(pixel_values, adaptors=[])
            tokens, summaries = self.model.summary_and_patches(output.features), output.summary
        else:
            sizes = self._check_sizes(image_sizes, pixel_values).tolist()
            images = zip(pixel_values, sizes, strict=True)
            outputs = [self.model(image[None, :, :rows, :cols], adaptors=[]) for image, (rows, cols) in images]
            features = [output.features for output in outputs[1:]]  # (1, patches, hidden) each
            tokens = torch.cat([self.model.summary_and_patches(outputs[0].features), *features], dim=1)
            summaries = torch.cat([output.summary for output in outputs])
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=summaries,
            hidden_states=(tokens,) if wanted else None,
        )

    def _check_sizes(self, image_sizes, pixel_values: torch.Tensor) -> torch.Tensor:
        """`image_sizes` as a tensor (batch, 2), on the device of the images."""
        self.model.check_images(pixel_values)
        step, (height, width) = self.model.min_resolution_step, pixel_values.shape[-2:]
        try:
            sizes = torch.as_tensor(image_sizes, device=pixel_values.device)
        except (TypeError, ValueError, RuntimeError):  # not convertible to a tensor
            sizes = torch.empty(0)
        wrong = sizes.shape != (len(pixel_values), 2) or sizes.is_floating_point() or sizes.is_complex()
        wrong = wrong or sizes.layout != torch.strided
        wrong = wrong or sizes.device.type == "meta" and pixel_values.device.type != "meta"
        limit = sizes.new_tensor([height, width])
        if wrong or ((sizes % step != 0) | (sizes < step) | (sizes > limit)).any():
            found = image_sizes if wrong else sizes.tolist()
            raise ValueError(
                f"image_sizes are {shown(found)}, expected (height, width) of each of {len(pixel_values)} images, "
                f"multiples of {step} up to {height}x{width}, as RadioLlavaProcessor returns them."
            )
        return sizes

    def _pack(self, tokens: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """(batch, prefix + h * w, hidden) -> (1, 1 + patches of all images, hidden)."""
        prefix, inside = self.config.radio_config.num_summary_tokens, inside.flatten(1)  # (batch, h * w)
        first = torch.cat([tokens[:1, :prefix], tokens[:1, prefix:][:, inside[0]]], dim=1)
        others = tokens[1:, prefix:][inside[1:]]  # (patches of the other images, hidden)
        return torch.cat([self.model.summary_and_patches(first), others[None]], dim=1)


RadioVisionTower.register_for_auto_class("AutoModel")
AutoModel.register(RadioVisionTowerConfig, RadioVisionTower, exist_ok=True)
