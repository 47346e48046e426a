"""The RADIO vision transformer: one backbone, one summary, dense features, and a pair of heads per teacher."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

from .adaptors_radio import AdaptorOutput, RadioAdaptor
from .attention_radio import chunked_attention_forward, eager_attention_forward, gains_from_chunks
from .caching_radio import WeightCache
from .configuration_radio import RadioConfig
from .inputs_radio import (
    check_adaptors,
    check_images,
    check_outputs,
    check_packed,
    check_window,
    returns_tensors_only,
)
from .normalizers_radio import RadioFeatureNormalizer, RadioIntermediateNormalizer, init_as_identity
from .padding_radio import forward_padded, padded_grids
from .student_radio import RadioInputConditioner, RadioModelOutput, init_shared_part
from .training_radio import RadioTrainingMixin, cpe_training_grid, is_checkpointed_reentrantly
from .weights_radio import CheckedLoadingMixin

logger = logging.get_logger(__name__)


class RadioPatchEmbeddings(nn.Module):
    """Patches with their positions, behind the CLS and register tokens, which have no position.

    Cropped position embedding (paper Sec. 4): while training, each image sees a random crop of the learned table,
    resampled to its grid; otherwise the table is resized to a square of the longer side and the top left is used.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table_side = config.max_img_size // config.patch_size
        self.patch_projection = nn.Linear(
            config.num_channels * config.patch_size**2, config.hidden_size, bias=config.patch_bias
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, self.table_side**2, config.hidden_size))
        self.cls_register_token = nn.Parameter(
            torch.zeros(config.num_cls_tokens + config.num_registers, config.hidden_size)
        )
        self._cache = WeightCache()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, prefix + h * w, hidden)`."""
        p = self.config.patch_size
        batch, channels, height, width = pixel_values.shape
        rows, cols = height // p, width // p
        # (B, C, h*p, w*p) -> (B, C, h, p, w, p) -> (B, h, w, C, p, p) -> (B, h*w, C*p*p)
        patches = pixel_values.reshape(batch, channels, rows, p, cols, p).permute(0, 2, 4, 1, 3, 5)
        patches = self.patch_projection(patches.reshape(batch, rows * cols, channels * p * p))
        patches = patches + self.positions(batch, rows, cols, patches.dtype)
        # (prefix, D) -> (B, prefix, D)
        prefix = self.cls_register_token.expand(batch, -1, -1)
        return torch.cat([prefix, patches], dim=1)

    def forward_packed(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """`(total patches, C*p*p)` -> `(1, total length, hidden)`: prefix and patches of the images one by one."""
        patches = self.patch_projection(pixel_values)
        tokens = []
        images = patches.split([rows * cols for rows, cols in grids])
        for (rows, cols), image in zip(grids, images, strict=True):
            tokens += [self.cls_register_token, image + self.positions(1, rows, cols, image.dtype)[0]]
        return torch.cat(tokens).unsqueeze(0)

    def positions(self, batch: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Position embedding of a patch grid: `(1 or batch, rows * cols, hidden)`."""
        table = self.position_embedding
        if self.training:
            if self.config.cpe_sampling and (rows, cols) != (self.table_side, self.table_side):
                positions = self._sample_positions(batch, rows, cols)
            else:
                positions = self._resize_positions(rows, cols)
            if self.config.pos_dropout > 0:
                keep = torch.rand(batch, 1, 1, device=table.device) >= self.config.pos_dropout
                positions = positions * keep
            return positions.to(dtype)
        return self._cache.get((rows, cols, dtype), [table], lambda: self._resize_positions(rows, cols).to(dtype))

    def train(self, mode: bool = True):
        # writes through `.data` do not change the version, so a change of mode clears the cache
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._cache.clear()  # a move or cast; the old table must not stay in memory
        return super()._apply(fn, recurse)

    def _table(self) -> torch.Tensor:
        # (1, side*side, D) -> (1, D, side, side)
        return self.position_embedding.float().unflatten(1, (self.table_side, self.table_side)).permute(0, 3, 1, 2)

    def _resize_positions(self, rows: int, cols: int) -> torch.Tensor:
        side = max(rows, cols)
        table = F.interpolate(self._table(), size=(side, side), mode="bilinear", align_corners=False)
        # by indices: slices branch on whether they cover the side, which would fix the aspect of an exported model
        top, left = (torch.arange(length, device=table.device) for length in (rows, cols))
        # (1, D, side, side) -> (1, side, side, D) -> (1, rows, cols, D) -> (1, rows*cols, D)
        return table.permute(0, 2, 3, 1).index_select(1, top).index_select(2, left).flatten(1, 2)

    def _sample_positions(self, batch: int, rows: int, cols: int) -> torch.Tensor:
        device = self.position_embedding.device
        grid = cpe_training_grid(batch, rows, cols, self.config.cpe_scale, device)
        # one table serves all images, so their grids are stacked along the height: a batch of tables would need
        # batch times the memory in the backward pass. (B, rows, cols, 2) -> (1, B*rows, cols, 2)
        grid = grid.reshape(1, batch * rows, cols, 2)
        positions = F.grid_sample(self._table(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        # (1, D, B*rows, cols) -> (D, B, rows*cols) -> (B, rows*cols, D)
        return positions.reshape(-1, batch, rows * cols).permute(1, 2, 0)


class RadioWindows:
    """Windows of `size` x `size` patches (paper, appendix on ViTDet), for one forward pass.

    Patches are sorted window by window ONCE, so that going in and out of windows is a reshape; to blocks with global
    attention the order does not matter. CLS and register tokens bypass windowed blocks unchanged, or (`average`)
    are copied into every window and averaged when the windows are joined.

    Args:
        grid (`tuple[int, int]`): Rows and columns of the patch grid, multiples of `size`.
        num_prefix (`int`): CLS and register tokens in front of the patches.
    """

    def __init__(self, grid: tuple[int, int], size: int, num_prefix: int, average: bool):
        self.rows, self.cols, self.size = grid[0] // size, grid[1] // size, size
        self.num_prefix, self.average = num_prefix, average
        self.is_split = False
        self.bypassing = torch.empty(0)

    def sort(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, prefix + h*w, D)`, patches row by row -> the same, patches window by window."""
        place = self._patch_numbers(tokens.device)
        # by arithmetic: reshapes branch on the shape, which an exported model would then be fixed to
        window, inside = place // self.size**2, place % self.size**2
        above = window // self.cols  # rows of windows; no remainder, which ONNX lacks for sizes that are free
        row = above * self.size + inside // self.size
        col = (window - above * self.cols) * self.size + inside % self.size
        return tokens.index_select(1, self._behind_prefix(row * self.cols * self.size + col))

    def unsort(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`."""
        return tokens.index_select(1, self._places_when_sorted(tokens.device))

    def unsort_attention(self, weights: torch.Tensor) -> torch.Tensor:
        """A global block's weights, `(B, heads, L, L)`, in the order of the image; a windowed block's as they are."""
        if self.is_split:
            return weights
        places = self._places_when_sorted(weights.device)
        return weights.index_select(2, places).index_select(3, places)

    def _places_when_sorted(self, device: torch.device) -> torch.Tensor:
        """`(prefix + h*w,)`: where each token of the image sits among the sorted ones."""
        patch = self._patch_numbers(device)
        row = patch // (self.cols * self.size)
        col = patch - row * (self.cols * self.size)
        window = row // self.size * self.cols + col // self.size
        inside = row % self.size * self.size + col % self.size
        return self._behind_prefix(window * self.size**2 + inside)

    def _patch_numbers(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.rows * self.size * self.cols * self.size, device=device)

    def _behind_prefix(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.arange(self.num_prefix, device=patches.device), patches + self.num_prefix])

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, prefix + h*w, D)`, sorted -> `(B * windows, [prefix +] W*W, D)`."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        # (B, h*w, D) -> (B, windows, W*W, D)
        windows = patches.clone(memory_format=torch.contiguous_format).unflatten(1, (self.rows * self.cols, -1))
        if self.average:
            # (B, prefix, D) -> (B, windows, prefix, D)
            prefix = prefix.unsqueeze(1).expand(-1, windows.shape[1], -1, -1)
            windows = torch.cat([prefix, windows], dim=2)
        else:
            self.bypassing = prefix
        # (B, windows, L, D) -> (B*windows, L, D)
        return windows.flatten(0, 1)

    def join(self, windows: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        # (B*windows, L, D) -> (B, windows, L, D)
        windows = windows.unflatten(0, (-1, self.rows * self.cols))
        if self.average:
            prefix, windows = windows[:, :, : self.num_prefix].mean(1), windows[:, :, self.num_prefix :]
        else:
            prefix = self.bypassing
        # (B, windows, W*W, D) -> (B, h*w, D)
        return torch.cat([prefix, windows.flatten(1, 2)], dim=1)

    def arrange(self, tokens: torch.Tensor, windowed: bool) -> torch.Tensor:
        """Sorted tokens as the next block needs them, split or joined."""
        if windowed != self.is_split:
            tokens = self.split(tokens) if windowed else self.join(tokens)
            self.is_split = windowed
        return tokens

    def to_image(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens between two blocks, split or joined -> `(B, prefix + h*w, D)`, row by row."""
        return self.unsort(self.join(tokens) if self.is_split else tokens)


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
        self.qkv_proj: nn.Linear | None = None  # the three in one, once fused

    def _fuse(self):
        parts = [self.q_proj, self.k_proj, self.v_proj]
        weight = torch.cat([part.weight for part in parts])
        self.qkv_proj = nn.Linear(weight.shape[1], weight.shape[0], self.q_proj.bias is not None, device="meta")
        self.qkv_proj.weight = nn.Parameter(weight, requires_grad=False)
        if self.q_proj.bias is not None:
            self.qkv_proj.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, hidden_states: torch.Tensor, lengths: list[int] | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`lengths`: tokens of each image in a packed sequence; tokens attend within their image."""
        if self.qkv_proj is not None:
            # (B, L, 3D) -> (B, L, 3, heads, D/heads) -> 3 x (B, heads, L, D/heads)
            query, key, value = (
                self.qkv_proj(hidden_states).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
            )
        else:
            # (B, L, D) -> (B, L, heads, D/heads) -> (B, heads, L, D/heads)
            query, key, value = (
                projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for projection in (self.q_proj, self.k_proj, self.v_proj)
            )
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        longest = max(lengths or [query.shape[2]])
        if implementation == "sdpa" and gains_from_chunks(self, query, key, value, longest):
            attend = chunked_attention_forward
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
        width = config.mlp_width
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.activation_fn(self.fc1(hidden_states))))


class RadioSwiGLUFFN(nn.Module):
    """The gated MLP of DINOv2's largest size, `down(silu(gate(x)) * up(x))`, two thirds as wide as a plain one."""

    def __init__(self, config: RadioConfig):
        super().__init__()
        width = config.mlp_width
        self.gate_proj = nn.Linear(config.hidden_size, width)
        self.up_proj = nn.Linear(config.hidden_size, width)
        self.down_proj = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


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
        self.layer_scale1: nn.Module = RadioLayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp: nn.Module = RadioSwiGLUFFN(config) if config.use_swiglu_ffn else RadioMLP(config)
        self.layer_scale2: nn.Module = RadioLayerScale(config)
        self.drop_path = RadioDropPath(config)

    def _fuse(self):
        if isinstance(self.layer_scale1, nn.Identity):
            return
        last = self.mlp.down_proj if isinstance(self.mlp, RadioSwiGLUFFN) else self.mlp.fc2
        for scale, linear in ((self.layer_scale1, self.attention.o_proj), (self.layer_scale2, last)):
            # new weights, as other models may share the old ones; a row per output
            linear.weight = nn.Parameter(linear.weight * scale.lambda1[:, None], linear.weight.requires_grad)
            linear.bias = nn.Parameter(linear.bias * scale.lambda1, linear.bias.requires_grad)
        self.layer_scale1 = self.layer_scale2 = nn.Identity()

    def forward(
        self, hidden_states: torch.Tensor, lengths: list[int] | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention, weights = self.attention(self.norm1(hidden_states), lengths, output_attentions)
        hidden_states = self.drop_path(self.layer_scale1(attention)) + hidden_states
        hidden_states = self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states
        return hidden_states, weights


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
        wanted: list[int] | None = None,
        stop: int | None = None,
    ) -> tuple[torch.Tensor, tuple | None, tuple | None]:
        """`wanted`: hidden states of these blocks alone, without the embeddings. `stop`: run so many blocks."""
        all_hidden_states, all_attentions = [hidden_states] if wanted is None else [], []
        if windows is not None:
            hidden_states = windows.sort(hidden_states)
        for index, layer in enumerate(self.layer):
            if index == stop:
                break
            if windows is not None:
                hidden_states = windows.arrange(hidden_states, windowed=index not in self.global_blocks)
            if self.training and is_checkpointed_reentrantly(layer) and not hidden_states.requires_grad:
                # such a layer gets no gradients unless its input needs them: above frozen embeddings none would train
                hidden_states.requires_grad_(any(weight.requires_grad for weight in self.parameters()))
            hidden_states, weights = layer(hidden_states, lengths, output_attentions)
            if output_hidden_states and (wanted is None or index in wanted):
                all_hidden_states.append(hidden_states if windows is None else windows.to_image(hidden_states))
            if output_attentions:
                all_attentions.append(weights if windows is None else windows.unsort_attention(weights))
        return (
            hidden_states if windows is None else windows.to_image(hidden_states),
            tuple(all_hidden_states) if output_hidden_states else None,
            tuple(all_attentions) if output_attentions else None,
        )


class RadioPreTrainedModel(CheckedLoadingMixin, PreTrainedModel):
    config_class: Any = RadioConfig
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
        elif isinstance(module, RadioModel):
            init.copy_(module.summary_idxs, torch.tensor(self.config.summary_idxs, dtype=torch.long))
        elif isinstance(module, (RadioFeatureNormalizer, RadioIntermediateNormalizer)):
            init_as_identity(module)
        elif not init_shared_part(module, self.config):
            super()._init_weights(module)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the folder carries this code, and opens as a bare student and with any head."""
        if self.config.model_type == RadioConfig.model_type:
            from .modeling_radio_heads import RadioStudentBackbone  # here, as that file imports this one

            self.config.auto_map = {
                "AutoModel": f"modeling_radio.{RadioModel.__name__}",
                "AutoBackbone": f"modeling_radio_heads.{RadioStudentBackbone.__name__}",
                "AutoModelForImageClassification": "modeling_radio_heads.RadioForImageClassification",
                "AutoModelForSemanticSegmentation": "modeling_radio_heads.RadioForSemanticSegmentation",
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
        self.feature_normalizer = RadioFeatureNormalizer(config.hidden_size) if config.feature_normalizer else None
        self.intermediate_normalizer = None
        if config.intermediate_normalizer is not None:
            self.intermediate_normalizer = RadioIntermediateNormalizer(
                config.num_hidden_layers, config.hidden_size, config.intermediate_normalizer
            )
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
        """Width of `RadioModelOutput.summary`: the CLS tokens of `config.summary_idxs` together, or the average."""
        return self.config.summary_dim

    def check_images(self, pixel_values: torch.Tensor):
        """Raises ValueError unless these are images that `forward` takes (packed ones aside)."""
        config, weight = self.config, self.embeddings.cls_register_token
        check_images(pixel_values, config.num_channels, config.patch_size, weight)

    def summary_and_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, prefix + h*w, hidden)` -> `(B, 1 + h*w, hidden)`: one summary token instead of the whole prefix.

        Models that know one class token expect this. The summary token is the first selected CLS token, or the
        average of the patches with average pooling.
        """
        patches = tokens[:, self.config.num_summary_tokens :]
        if self.config.summary_type == "mean":
            summary = patches.mean(dim=1, keepdim=True)
        else:
            index = self.config.summary_idxs[0]
            summary = tokens[:, index : index + 1]
        return torch.cat([summary, patches], dim=1)

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
            ValueError: Not floats, a wrong number of channels or dimensions, a side that is not a multiple of the
                patch (times the window), an unknown adaptor, a mask or grids that do not fit the images.
        """
        returned = self._which_outputs(output_hidden_states, output_attentions)
        names = check_adaptors(adaptors, list(self.adaptors))
        if image_grid_hw is not None:
            if pixel_mask is not None:
                raise ValueError("Packed images (image_grid_hw) have no padding; leave pixel_mask out.")
            return self._forward_packed(pixel_values, image_grid_hw, names, window_size, **returned)
        self.check_images(pixel_values)
        grid, num_prefix = self.grid(*pixel_values.shape[-2:]), self.config.num_summary_tokens
        if pixel_mask is not None:
            window_size = (self.config.window_size or 0) if window_size is None else window_size
            grids = padded_grids(pixel_mask, pixel_values, self.patch_size, self.min_resolution_step)  # (B, 2)
            if (grids < grids.new_tensor(grid)).any():
                return forward_padded(self, pixel_values, grids, window_size, adaptors=names, **returned)
        windows = self._windows(window_size, *pixel_values.shape[-2:])
        self._warn_about_range(pixel_values)
        hidden_states = self.embeddings(self.input_conditioner(pixel_values).to(self._embedding_dtype))
        hidden_states, all_hidden_states, attentions = self.encoder(hidden_states, windows, None, **returned)
        hidden_states = self.finish(hidden_states)
        # (B, prefix + h*w, D) -> (B, prefix, D) and (B, h*w, D)
        prefix, features = hidden_states[:, :num_prefix], hidden_states[:, num_prefix:]
        summary, heads = self._summary_and_heads(prefix, features, [grid], names)
        return RadioModelOutput(
            summary=summary,
            features=features,
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states,
            attentions=attentions,
            adaptors=heads,
            pooler_output=summary,
            grid=None if returns_tensors_only() else grid,
        )

    @property
    def num_intermediates(self) -> int:
        """Number of blocks, the maps that `forward_intermediates` chooses among."""
        return len(self.encoder.layer)

    def _intermediates(self, pixel_values, wanted, stop, norm):
        (height, width), num_prefix = pixel_values.shape[-2:], self.config.num_summary_tokens
        windows = self._windows(None, height, width)
        tokens = self.embeddings(self.input_conditioner(pixel_values).to(self._embedding_dtype))
        tokens, states, _ = self.encoder(tokens, windows, None, True, False, wanted, stop)
        states = [self.norm(state) if norm else state for state in states]
        # (B, prefix + h*w, D) -> (B, D, h, w) and (B, prefix, D)
        maps = [self.features_to_grid(state[:, num_prefix:], height, width) for state in states]
        prefixes = [state[:, :num_prefix] if num_prefix else None for state in states]
        return self.finish(tokens), list(zip(maps, prefixes, strict=True))

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last block's output `(B, prefix + h*w, D)` -> `last_hidden_state`: final norm and feature normalizer.

        Both are identities but for the variants that have them; the normalizer is for patches alone.
        """
        tokens = self.norm(tokens)
        if self.feature_normalizer is None:
            return tokens
        num_prefix = self.config.num_summary_tokens
        return torch.cat([tokens[:, :num_prefix], self.feature_normalizer(tokens[:, num_prefix:])], dim=1)

    def _windows(self, window_size: int | None, height: int, width: int) -> RadioWindows | None:
        """The windows of one forward for images of this size in pixels; None for global attention."""
        if window_size is None and self.training and self.config.train_window_sizes:
            window_size = self.sample_window_size(height, width)
        elif window_size is None:
            window_size = self.config.window_size or 0
        grid = self.grid(height, width)
        check_window(window_size, *grid, self.patch_size)
        if not window_size:
            return None
        return RadioWindows(grid, window_size, self.config.num_summary_tokens, self.config.window_prefix == "average")

    def _forward_packed(
        self,
        pixel_values: torch.Tensor,
        image_grid_hw: torch.Tensor,
        names: list[str],
        window_size: int | None,
        **returned: bool,
    ) -> RadioModelOutput:
        """`forward` for images of different sizes as one sequence, `(total patches, channels * patch_size**2)`."""
        config, num_prefix = self.config, self.config.num_summary_tokens
        patch_shape = (config.num_channels, self.patch_size, self.patch_size)
        grids = check_packed(pixel_values, image_grid_hw, math.prod(patch_shape), self.embeddings.cls_register_token)
        window_size = (config.window_size or 0) if window_size is None else window_size
        check_window(window_size, 0, 0, self.patch_size)
        if window_size:
            raise ValueError("Packed images have no windows; pass window_size=0 for global attention.")
        self._warn_about_range(pixel_values)
        # (total, C*p*p) -> (total, C, p, p) -> (total, C*p*p)
        pixels = self.input_conditioner(pixel_values.unflatten(1, patch_shape)).to(self._embedding_dtype).flatten(1)
        hidden_states = self.embeddings.forward_packed(pixels, grids)
        lengths = [num_prefix + rows * cols for rows, cols in grids]
        hidden_states, all_hidden_states, attentions = self.encoder(hidden_states, None, lengths, **returned)
        # (1, total length, D) -> per image (1, prefix + h*w, D) -> (N, prefix, D) and (1, total patches, D)
        images = [self.finish(image) for image in hidden_states.split(lengths, dim=1)]
        hidden_states = torch.cat(images, dim=1)
        prefix = torch.cat([image[:, :num_prefix] for image in images])
        features = torch.cat([image[:, num_prefix:] for image in images], dim=1)
        summary, heads = self._summary_and_heads(prefix, features, grids, names)
        for name, head in heads.items():  # packed outputs have no batch axis, and no grid
            dense = None if head.features is None else head.features[0]
            heads[name] = AdaptorOutput(summary=head.summary, features=dense)
        return RadioModelOutput(
            summary=summary,
            features=features[0],
            last_hidden_state=hidden_states[0],
            hidden_states=all_hidden_states,
            attentions=attentions,
            adaptors=heads,
            pooler_output=summary,
        )

    def _summary_and_heads(
        self, prefix: torch.Tensor, features: torch.Tensor, grids: list[tuple[int, int]], names: list[str]
    ) -> tuple[torch.Tensor, dict[str, AdaptorOutput]]:
        """The summaries `(images, summary_dim)`, and what the heads of `names` make of them and of the features.

        Args:
            prefix: CLS and register tokens `(images, prefix, hidden)`.
            features, grids: As [`RadioAdaptor`] takes them.
        """
        if self.config.summary_type == "cls":
            tokens = prefix[:, : self.config.num_cls_tokens]
            # (N, n, D) -> (N, n*D)
            summary = tokens[:, self.summary_idxs].flatten(1)
        else:
            images = features.split([rows * cols for rows, cols in grids], dim=1)
            summary = torch.cat([image.mean(1) for image in images])
            tokens = summary.unsqueeze(1)
        # one copy without gaps for all heads: otherwise each Linear makes one, unless the batch is a single image, and
        # an exported model would be fixed to one of these two cases
        features = features.clone(memory_format=torch.contiguous_format) if names else features
        return summary, {name: self.adaptors[name](tokens, features, grids) for name in names}

    @property
    def _embedding_dtype(self) -> torch.dtype:
        return self.embeddings.cls_register_token.dtype  # quantization leaves it alone, unlike the weights of Linears

    def _which_outputs(self, output_hidden_states: Any, output_attentions: Any) -> dict[str, bool]:
        """Both flags as booleans; where a call leaves one out, the configuration decides."""
        check_outputs(output_hidden_states, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # not `bool(...)`: callers that select one layer may pass its index, 0 included
        output_hidden_states = output_hidden_states is not None and output_hidden_states is not False
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        attention = self.config._attn_implementation
        if output_attentions and attention != "eager" and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{attention} attention has no probabilities to return, so calls with output_attentions attend "
                "eagerly, which takes more memory."
            )
        return {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}


RadioModel.register_for_auto_class("AutoModel")

__all__ = ["RadioModel", "RadioModelOutput", "RadioPreTrainedModel"]
