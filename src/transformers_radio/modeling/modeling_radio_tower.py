"""The vision tower that LLaVA builds: one summary token and the patches, at every layer."""

import torch
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_radio_tower import RadioVisionTowerConfig
from .modeling_radio import RadioModel, RadioPreTrainedModel


class RadioVisionTower(RadioPreTrainedModel):
    """A RADIO student as the vision tower of `transformers.LlavaForConditionalGeneration`.

    LLaVA picks `hidden_states[vision_feature_layer]` and, with the strategy "default", drops exactly one token in
    front. RADIO has several CLS and register tokens there, so each hidden state is rebuilt as one summary token and
    the patches: "default" is the patches alone (what the paper feeds, section 5.4), "full" the summary token as well.
    The summary token is the first selected CLS token, or the average of the patches with average pooling.

    `from_pretrained` also takes the folder of a student, `from_radio` a student in memory. Put either into a LLaVA
    that was built with `vision_config=tower.config`: `llava.model.vision_tower = tower`.

    The number of patches follows the input, height / patch_size * width / patch_size, square or not, and a text must
    hold as many image tokens. `LlavaProcessor` counts so with `patch_size=config.patch_size` and
    `num_additional_image_tokens=1`. Feed it with [`RadioImageProcessor`]: pixels are in [0, 1], and the student
    normalises them.
    """

    config_class = RadioVisionTowerConfig  # type: ignore[assignment]
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?adaptors\."]

    def __init__(self, config: RadioVisionTowerConfig):
        super().__init__(config)
        self.model = RadioModel(self.config.radio_config)
        self.post_init()

    @classmethod
    def from_radio(cls, model: RadioModel, image_size: int | None = None) -> "RadioVisionTower":
        """The tower of a student: a copy of its backbone, without the adaptors, on the same device."""
        tower = cls(RadioVisionTowerConfig(radio_config=model.config, image_size=image_size))
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith("adaptors.")}
        tower.model.load_state_dict(weights)
        tower.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
        return tower.train(model.training)

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    def train(self, mode: bool = True):
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            self.model.eval()  # frozen: its features must not vary with the random position crops of training
        return self

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

        Returns:
            `last_hidden_state` and each of `hidden_states` (the embeddings, then every block): (batch_size,
            1 + height / patch_size * width / patch_size, hidden_size). `pooler_output`: the student's summary.

        Raises:
            ValueError: with `image_sizes`, which stand for images packed to one sequence (as Pixtral does).
        """
        if image_sizes is not None:
            raise ValueError("image_sizes is not supported; batch images of one size and leave image_sizes out")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.model(pixel_values, adaptors=[], output_hidden_states=True, output_attentions=output_attentions)
        hidden_states = None
        if output_hidden_states is not None and output_hidden_states is not False:  # 0 is a layer
            count = len(outputs.hidden_states)
            layers = range(count) if output_hidden_states is True else output_hidden_states
            wanted = {layer % count for layer in ([layers] if isinstance(layers, int) else layers)}
            hidden_states = tuple(
                self._summary_and_patches(self.model.norm(tokens)) if layer in wanted else None
                for layer, tokens in enumerate(outputs.hidden_states)
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=self._summary_and_patches(outputs.last_hidden_state),
            pooler_output=outputs.summary,
            hidden_states=hidden_states,  # type: ignore[arg-type]
            attentions=outputs.attentions,
        )

    def _summary_and_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch_size, prefix + patches, hidden_size) -> (batch_size, 1 + patches, hidden_size)."""
        radio_config = self.config.radio_config
        patches = tokens[:, radio_config.num_summary_tokens :]
        if radio_config.summary_type == "mean":
            summary = patches.mean(dim=1, keepdim=True)
        else:
            index = radio_config.summary_idxs[0]
            summary = tokens[:, index : index + 1]
        return torch.cat([summary, patches], dim=1)


RadioVisionTower.register_for_auto_class("AutoModel")
AutoModel.register(RadioVisionTowerConfig, RadioVisionTower, exist_ok=True)
