"""The RADIO vision transformer: one backbone, one summary, dense features, and a pair of heads per teacher."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

from .adaptors_radio import AdaptorOutput, RadioAdaptor, RadioAdaptorLayerScale
from .configuration_radio import RadioConfig
from .embeddings_radio import RadioInputConditioner, RadioPatchEmbeddings
from .errors_radio import check_source, naming_checkpoint
from .inputs_radio import (
    check_adaptors,
    check_images,
    check_outputs,
    check_packed,
    check_window,
    returns_tensors_only,
)
from .padding_radio import forward_padded, padded_grids
from .student_radio import RadioModelOutput
from .training_radio import RadioTrainingMixin
from .weights_radio import HEADS, check_found, check_used, may_be_new
from .windows_radio import RadioWindows

logger = logging.get_logger(__name__)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.dropout(weights.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class RadioAttention(nn.Module):
    def __init__(self, config: RadioConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, lengths: list[int] | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`lengths`: of the images packed into one sequence; tokens attend within their image."""
        # (B, L, D) -> (B, L, heads, D/heads) -> (B, heads, L, D/heads)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        options = {"attention_mask": None, "scaling": self.scaling, "dropout": dropout}
        if lengths is None:
            output, weights = attend(self, query, key, value, **options)
        elif "flash" in implementation:
            ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
            options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
            output, weights = attend(self, query, key, value, **options)
        else:
            parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
            outputs, blocks = zip(*(attend(self, *part, **options) for part in parts), strict=True)
            output, weights = torch.cat(outputs, dim=1), None
            if blocks[0] is not None:
                weights = torch.stack(
                    [torch.block_diag(*heads) for heads in zip(*(b[0] for b in blocks), strict=True)]
                )
                weights = weights.unsqueeze(0)
        # (B, L, heads, D/heads) -> (B, L, D)
        return self.o_proj(output.flatten(2).contiguous()), weights


class RadioMLP(nn.Module):
    def __init__(self, config: RadioConfig):
        super().__init__()
        width = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.activation_fn(self.fc1(hidden_states))))


class RadioLayerScale(nn.Module):
    def __init__(self, config: RadioConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(config.layerscale_value * torch.ones(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class RadioDropPath(nn.Module):
    """Leaves a residual branch out, per sample, with probability `config.drop_path_rate` while training."""

    def __init__(self, config: RadioConfig):
        super().__init__()
        self.rate = config.drop_path_rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0 or not self.training:
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * keep / (1 - self.rate)


class RadioLayer(GradientCheckpointingLayer):
    def __init__(self, config: RadioConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = RadioAttention(config)
        self.layer_scale1 = RadioLayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = RadioMLP(config)
        self.layer_scale2 = RadioLayerScale(config)
        self.drop_path = RadioDropPath(config)

    def forward(
        self, hidden_states: torch.Tensor, lengths: list[int] | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention, weights = self.attention(self.norm1(hidden_states), lengths, output_attentions)
        hidden_states = self.drop_path(self.layer_scale1(attention)) + hidden_states
        hidden_states = self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states
        return hidden_states, weights


def is_checkpointed_reentrantly(layer: Any) -> bool:
    options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return layer.gradient_checkpointing and options.get("use_reentrant", False) and torch.is_grad_enabled()


class RadioEncoder(nn.Module):
    def __init__(self, config: RadioConfig):
        super().__init__()
        self.global_blocks = config.global_blocks
        self.layer = nn.ModuleList([RadioLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        windows: RadioWindows | None,
        lengths: list[int] | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, tuple | None, tuple | None]:
        all_hidden_states, all_attentions = [hidden_states], []
        if windows is not None:
            hidden_states = windows.sort(hidden_states)
        for index, layer in enumerate(self.layer):
            if windows is not None:
                hidden_states = windows.arrange(hidden_states, windowed=index not in self.global_blocks)
            if self.training and is_checkpointed_reentrantly(layer) and not hidden_states.requires_grad:
                # such a layer gets no gradients unless its input needs them: below frozen embeddings none would train
                hidden_states.requires_grad_(any(weight.requires_grad for weight in self.parameters()))
            hidden_states, weights = layer(hidden_states, lengths, output_attentions)
            if output_hidden_states:
                all_hidden_states.append(hidden_states if windows is None else windows.to_image(hidden_states))
            if output_attentions:
                all_attentions.append(weights if windows is None else windows.unsort_attention(weights))
        return (
            hidden_states if windows is None else windows.to_image(hidden_states),
            tuple(all_hidden_states) if output_hidden_states else None,
            tuple(all_attentions) if output_attentions else None,
        )


def check_summary_idxs(model: nn.Module):
    """The selection of CLS tokens in the checkpoint is that of the configuration."""
    if not isinstance(model, RadioModel) or model.summary_idxs.is_meta:
        return
    if model.summary_idxs.tolist() != model.config.summary_idxs:
        raise ValueError(
            f"config.summary_idxs is {model.config.summary_idxs}, but the checkpoint's summary_idxs are "
            f"{model.summary_idxs.tolist()}. Load without summary_idxs, then select from last_hidden_state."
        )


class RadioPreTrainedModel(PreTrainedModel):
    config_class = RadioConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RadioLayer"]
    _input_embed_layer = "patch_projection"
    _keep_in_fp32_modules_strict = ["input_conditioner"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config, *args, **kwargs):
        super().__init__(self.config_class.adopt(config), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # functions of `transformers.initialization` leave parameters that were loaded alone
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RadioPatchEmbeddings):
            init.normal_(module.position_embedding, std=self.config.hidden_size**-0.5)
            init.normal_(module.cls_register_token, std=self.config.hidden_size**-0.5)
        elif isinstance(module, RadioLayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)
        elif isinstance(module, RadioAdaptorLayerScale):
            init.constant_(module.gamma, 1e-5)
        elif isinstance(module, RadioInputConditioner):
            for statistic, values in (
                (module.norm_mean, self.config.norm_mean),
                (module.norm_std, self.config.norm_std),
            ):
                init.copy_(statistic, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        elif isinstance(module, RadioModel):
            init.copy_(module.summary_idxs, torch.tensor(self.config.summary_idxs, dtype=torch.long))
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, but a checkpoint and a configuration that do not belong together are an error.

        Args:
            allow_missing (`Sequence[str]`): Prefixes of weights that may start from their initialization, e.g.
                `["classifier"]` to put a new head on a backbone. Of these alone may the shape differ with
                `ignore_mismatched_sizes=True`.
            allow_unexpected (`Sequence[str]`): Prefixes of weights of the checkpoint that may be left out. Those of a
                task head always may, and those of adaptors where `adaptors` are passed.

        Raises:
            OSError: There is no checkpoint, or part of it is not there.
            ValueError: The checkpoint is damaged, lacks other weights of this model, has them in other shapes, has
                weights that the model lacks, or contradicts `config.summary_idxs`.
        """
        if pretrained_model_name_or_path is not None or "state_dict" not in kwargs:
            check_source(cls.__name__, pretrained_model_name_or_path)
        left_out = (*allow_unexpected, *HEADS, *(["adaptors."] if "adaptors" in kwargs else []))
        token = may_be_new.set(tuple(allow_missing))
        try:
            with naming_checkpoint(pretrained_model_name_or_path):
                loaded: Any = super().from_pretrained(
                    pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
                )
                model, info = loaded
                check_found(cls.__name__, info["missing_keys"], info["mismatched_keys"], info["unexpected_keys"], True)
                check_used(cls.__name__, info["unexpected_keys"], left_out)
                check_summary_idxs(model.base_model)
        finally:
            may_be_new.reset(token)
        return (model, info) if output_loading_info else model

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # before memory is taken for what the checkpoint lacks: a mistyped width could need more than there is
        check_found(
            type(model).__name__,
            loading_info.missing_keys,
            loading_info.mismatched_keys,
            loading_info.unexpected_keys,
            load_config.ignore_mismatched_sizes,
        )
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the folder carries this code, and one with a head opens as a bare student too."""
        if self.config.model_type == RadioConfig.model_type:
            from .modeling_radio_heads import RadioStudentBackbone  # here, as that file imports this one

            self.config.auto_map = {
                "AutoModel": f"modeling_radio.{RadioModel.__name__}",
                "AutoBackbone": f"modeling_radio_heads.{RadioStudentBackbone.__name__}",
            }
        super().save_pretrained(*args, **kwargs)


class RadioModel(RadioTrainingMixin, RadioPreTrainedModel):
    """The RADIO vision transformer (paper Sec. 3) with the adaptors of `config.adaptors`.

    Backbone weights have the names and shapes of `transformers.RadioModel`. `eval()` reuses the resized position
    table per resolution; it notices optimizer steps, loading, moves and casts, but after writing weights through
    `.data` call `eval()` again.
    """

    def __init__(self, config: RadioConfig):
        super().__init__(config)
        config = self.config
        config.validate()  # fields may have been set after construction
        self.input_conditioner: nn.Module = RadioInputConditioner(config)
        self.embeddings = RadioPatchEmbeddings(config)
        self.encoder = RadioEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        self.summary_idxs = nn.Buffer(torch.tensor(config.summary_idxs, dtype=torch.long))
        self.adaptors = nn.ModuleDict(
            {name: RadioAdaptor(config.hidden_size, adaptor) for name, adaptor in config.adaptors.items()}
        )
        self.post_init()

    @property
    def min_resolution_step(self) -> int:
        """Image sides must be multiples of this many pixels (patch size, times the default window if there is one)."""
        return self.patch_size * (self.config.window_size or 1)

    @property
    def summary_dim(self) -> int:
        """Width of `RadioModelOutput.summary`: of all the CLS tokens `config.summary_idxs`, or of the average."""
        return self.config.summary_dim

    def check_images(self, pixel_values: torch.Tensor):
        """Raises ValueError unless these are images that `forward` takes (packed ones aside)."""
        config, weight = self.config, self.embeddings.cls_register_token
        check_images(pixel_values, config.num_channels, config.patch_size, weight)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        adaptors: list[str] | None = None,
        window_size: int | None = None,
        image_grid_hw: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> RadioModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Floats in [0, 1]; sides are
                multiples of `min_resolution_step`. With `image_grid_hw`: the flattened patches of images of
                different sizes, `(total patches, channels * patch_size**2)`, each patch channel by channel.
            adaptors (`list[str]`, *optional*): Adaptors to run; all when missing, none with `[]`.
            window_size (`int`, *optional*): ViTDet window side in patches; 0 is global attention throughout. Missing:
                `config.window_size`, or while training a draw from `config.train_window_sizes` if there are any.
            image_grid_hw (`torch.Tensor` of shape `(images, 2)`, *optional*): Patch grid of each packed image.
            output_hidden_states (`bool`, *optional*): Return the embeddings and the output of every block.
            output_attentions (`bool`, *optional*): Return every block's probabilities; this call then attends eagerly.
            pixel_mask (`torch.Tensor` of shape `(batch, height, width)`, *optional*): 1 on the image and 0 on the
                padding at the bottom and right, as [`RadioImageProcessor`] returns it. Each image is computed as if
                it were alone; tokens of patches in the padding are zero. Draws no window while training.

        Raises:
            ValueError: Not floats, a wrong number of channels or dimensions, a side that is no multiple of the patch
                (times the window), an unknown adaptor, packed patches that do not fit their grids, a mask that does
                not fit the images.
        """
        config = self.config
        check_outputs(output_hidden_states, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        # not `bool(...)`: callers that select one layer may pass its index, 0 included
        output_hidden_states = output_hidden_states is not None and output_hidden_states is not False
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and config._attn_implementation != "eager" and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{config._attn_implementation} attention has no probabilities to return, so calls with "
                "output_attentions attend eagerly, which takes more memory."
            )
        names = check_adaptors(adaptors, list(self.adaptors))
        weight = self.embeddings.cls_register_token
        if pixel_mask is not None:
            if image_grid_hw is not None:
                raise ValueError("Packed images (image_grid_hw) have no padding; leave pixel_mask out.")
            self.check_images(pixel_values)
            sides = padded_grids(pixel_mask, pixel_values, self.patch_size, self.min_resolution_step)  # (B, 2)
            window_size = (config.window_size or 0) if window_size is None else window_size
            if (sides * self.patch_size < sides.new_tensor(pixel_values.shape[-2:])).any():
                options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
                return forward_padded(self, pixel_values, sides, window_size, adaptors=names, **options)
        dtype = weight.dtype  # quantization leaves it alone, unlike the weights of Linears
        num_prefix = config.num_summary_tokens
        windows, lengths = None, None

        if image_grid_hw is None:
            self.check_images(pixel_values)
            rows, cols = self.grid(*pixel_values.shape[-2:])
            grids = [(rows, cols)]
            if window_size is None and self.training and config.train_window_sizes:
                window_size = self.sample_window_size(*pixel_values.shape[-2:])
            elif window_size is None:
                window_size = config.window_size or 0
            check_window(window_size, rows, cols, self.patch_size)
            if window_size:
                windows = RadioWindows((rows, cols), window_size, num_prefix, config.window_prefix == "average")
            hidden_states = self.embeddings(self.input_conditioner(pixel_values).to(dtype))
        else:
            grids = check_packed(pixel_values, image_grid_hw, config.num_channels * self.patch_size**2, weight)
            window_size = (config.window_size or 0) if window_size is None else window_size
            check_window(window_size, 0, 0, self.patch_size)
            if window_size:
                raise ValueError("Packed images have no windows; pass window_size=0 for global attention.")
            lengths = [num_prefix + rows * cols for rows, cols in grids]
            # (total, C*p*p) -> (total, C, p, p) -> (total, C*p*p)
            pixels = pixel_values.unflatten(1, (config.num_channels, self.patch_size, self.patch_size))
            pixels = self.input_conditioner(pixels).to(dtype).flatten(1)
            hidden_states = self.embeddings.forward_packed(pixels, grids)
        self._warn_about_range(pixel_values)

        hidden_states, all_hidden_states, attentions = self.encoder(
            hidden_states, windows, lengths, output_hidden_states, output_attentions
        )
        hidden_states = self.norm(hidden_states)

        if lengths is None:
            # (B, prefix + h*w, D) -> (B, prefix, D) and (B, h*w, D)
            prefix, features = hidden_states[:, :num_prefix], hidden_states[:, num_prefix:]
        else:
            # (1, total length, D) -> per image (1, prefix + h*w, D) -> (N, prefix, D) and (1, total patches, D)
            images = hidden_states.split(lengths, dim=1)
            prefix = torch.cat([image[:, :num_prefix] for image in images])
            features = torch.cat([image[:, num_prefix:] for image in images], dim=1)
        if config.summary_type == "cls":
            summary_tokens = prefix[:, : config.num_cls_tokens]
            # (B, n, D) -> (B, n*D)
            summary = summary_tokens[:, self.summary_idxs].flatten(1)
        else:
            sizes = [features.shape[1]] if lengths is None else [rows * cols for rows, cols in grids]
            summary = torch.cat([image.mean(1) for image in features.split(sizes, dim=1)])
            summary_tokens = summary.unsqueeze(1)
        # one copy without gaps for all heads: else each Linear makes one, unless the batch is a single image, and that
        # branch would be fixed in an exported model
        patches = features.clone(memory_format=torch.contiguous_format) if names else features
        heads = {name: self.adaptors[name](summary_tokens, patches, grids) for name in names}

        if lengths is not None:  # packed outputs have no batch axis
            hidden_states, features = hidden_states[0], features[0]
            for name, head in heads.items():
                dense = None if head.features is None else head.features[0]
                heads[name] = AdaptorOutput(summary=head.summary, features=dense)
        return RadioModelOutput(
            summary=summary,
            features=features,
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states,
            attentions=attentions,
            adaptors=heads,
            pooler_output=summary,
            grid=None if lengths is not None or returns_tensors_only() else grids[0],
        )


RadioModel.register_for_auto_class("AutoModel")

__all__ = ["RadioModel", "RadioModelOutput", "RadioPreTrainedModel"]
