"""Image-text-to-text models of Qwen2-VL's interface (Wang et al., 2024), for uint8 images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.encoders.image import Normalize
from lightning_modules.encoders.transformers import configuration_values
from lightning_modules.encoders.weights import WeightsOrigin, copy_weights, local_directory, weights_origin
from lightning_modules.finetune import add_language_lora
from lightning_modules.generative.prompts import Prompts, pretrained_prompts, trained_prompts
from lightning_modules.generative.weights import (
    KEY,
    build_vision_language,
    checked_configuration,
    files_digest,
    image_statistics,
    load_vision_language,
)
from lightning_modules.options import LanguageLoraOptions, MemoryOptions
from vitrail.errors import UserError
from vitrail.types import InputOptions


class Images(NamedTuple):
    """Encoded images."""

    encoded: Any  # output of the model's vision tower
    features: torch.Tensor  # float `(B, D)`, the mean of each image's tokens


class Prefix(NamedTuple):
    """The state after B texts with images; continuing it returns another one."""

    cache: Any  # keys and values of every layer
    hidden: torch.Tensor  # float `(B, D)`, of the last token
    last: torch.Tensor  # int64 `(B,)`, the last token
    length: int  # number of tokens
    position: int  # of the next token; smaller than `length`, because an image takes few positions


class Generated(NamedTuple):
    """B generated texts."""

    tokens: list[list[int]]  # with the end token, if it was reached
    log_likelihood: torch.Tensor  # float32 `(B,)`, of each whole text, among what was allowed


def _copied(cache: Any) -> Any:
    """A cache that may grow: layers replace their tensors instead of changing them, so shallow copies are enough."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def patches_of(pixels: torch.Tensor, patch: int, merge: int, frames: int) -> torch.Tensor:
    """Patches of images in the order of Qwen2-VL: those that become one token are adjacent.

    Args:
        pixels: float ``(B, 3, S, S)``, normalised; S is a multiple of ``patch · merge``.
        patch: side of a patch.
        merge: ``merge · merge`` patches become one token.
        frames: number of video frames that an image is repeated to.

    Returns:
        float ``(B · patches, 3 · frames · patch²)``.
    """
    blocks = pixels.shape[-1] // (patch * merge)
    grid = pixels.reshape(len(pixels), 3, blocks, merge, patch, blocks, merge, patch)
    film = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return film.reshape(-1, 3 * frames * patch**2)


Architectures = dict[str, dict[str, Any]]


class VisionLanguageModel(nn.Module):
    """An image-text-to-text model of ``transformers`` with its tokenizer and image preprocessing.

    With pretrained weights there is no network until ``load`` or ``build`` is called, because weights of this size
    should not be initialised only to be replaced.

    Attributes:
        model: the network.
        prompts: the tokenizer, None until it is loaded.
        digest: digest of the pretrained weights, once loaded; only with adapters.
        origin: origin of the pretrained weights, once loaded.
    """

    model: Any

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        texts: Sequence[str],
        pretrained: bool = True,
        memory: MemoryOptions = MemoryOptions(),
        lora: LanguageLoraOptions | None = None,
        architectures: Architectures | None = None,
    ) -> None:
        super().__init__()
        saved = architectures or {}
        self.name, self.pretrained, self.lora = name, pretrained, lora
        self.memory = memory
        self.configuration = checked_configuration(name, pretrained, saved.get("model"))
        vision = self.configuration.vision_config
        self.patch, self.merge = int(vision.patch_size), int(vision.spatial_merge_size)
        self.frames = int(vision.temporal_patch_size)
        unit = self.patch * self.merge
        self.side = max(1, round(image_size / unit)) * unit
        self.image_tokens = (self.side // unit) ** 2
        self.input_options: InputOptions = {"size": image_size, "crop_fraction": 1.0, "interpolation": "bicubic"}
        mean, std = saved["statistics"].values() if "statistics" in saved else image_statistics("")
        self.normalize = Normalize(tuple(mean), tuple(std))
        self.digest = ""
        self.prompts: Prompts | None = None
        self.model = None
        self.origin: WeightsOrigin | None = None
        self._loaded = False
        if not pretrained and not saved:
            self.prompts = trained_prompts(texts, int(self.configuration.text_config.vocab_size))
        if not pretrained:
            self.build()

    @property
    def architectures(self) -> Architectures:
        """Configuration for checkpoints, from which the network can be built without its folder."""
        mean, std = (values.flatten().tolist() for values in (self.normalize.mean, self.normalize.std))
        return {"model": configuration_values(self.configuration), "statistics": {"mean": mean, "std": std}}

    def build(self) -> None:
        """Build the network once, with random weights, or with uninitialised ones if a file will replace them."""
        if self.model is None:
            self._set_model(build_vision_language(self.configuration, self.memory, empty=self.pretrained))

    def load(self, device: torch.device | None = None, place: str = "") -> None:
        """Load the pretrained weights, tokenizer and pixel statistics once, into an existing network in place.

        Args:
            device: on which to quantise them.
            place: folder that has them, by default that of the name.
        """
        if self._loaded or not self.pretrained:
            return
        directory = place or local_directory(self.name, KEY)
        self.prompts = pretrained_prompts(directory, int(self.configuration.image_token_id), KEY)
        self.normalize.load_state_dict(Normalize(*image_statistics(directory)).state_dict())
        if self.lora is not None:
            self.digest = files_digest(directory)
        source = load_vision_language(directory, self.configuration, self.memory, device or torch.device("cpu"))
        if self.model is None:
            self._set_model(source)
        else:
            copy_weights(source, self.model, f"{KEY}: {directory}")
        self.origin = weights_origin(KEY, self.name, Path(directory), {})
        self._loaded = True

    def _set_model(self, model: nn.Module) -> None:
        self.model = model.train(self.training)
        if self.lora is not None:
            add_language_lora(self.model, self.lora)
        if self.memory.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    def patches(self, image: torch.Tensor) -> torch.Tensor:
        """Normalised patches, float ``(B · patches, 3 · frames · patch²)``, of uint8 RGB images ``(B, 3, H, W)``."""
        pixels = self.normalize(image)
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True)
        return patches_of(pixels, self.patch, self.merge, self.frames)

    def encode_images(self, image: torch.Tensor) -> Images:
        """Encode uint8 RGB images ``(B, 3, H, W)`` by the vision tower."""
        counting = image.device.type == "meta"
        grid = self._grid(len(image), torch.device("cpu") if counting else image.device)
        places = {}
        if counting:
            # FLOPs are counted on the meta device; positions need values.
            from transformers.vision_utils import get_vision_position_ids

            places["position_ids"] = get_vision_position_ids(grid, self.merge).to(image.device)
        encoded = self.model.model.get_image_features(self.patches(image), grid, return_dict=True, **places)
        return Images(encoded, torch.stack([tokens.mean(dim=0) for tokens in encoded.pooler_output]))

    def read(self, images: Images, ids: Sequence[int]) -> Prefix:
        """Encode a prompt, the same for all images."""
        from transformers import DynamicCache

        batch, device = len(images.features), images.features.device
        positions = self._positions(ids)
        outputs = self.model.model(
            input_ids=torch.tensor(ids, device=device).expand(batch, -1),
            position_ids=positions.expand(-1, batch, -1).to(device),
            mm_encoder_outputs={"image": images.encoded},
            past_key_values=DynamicCache(config=self.configuration),
            use_cache=True,
        )
        position = int(positions.max()) + 1
        last = torch.full((batch,), ids[-1], device=device)
        return Prefix(outputs.past_key_values, outputs.last_hidden_state[:, -1], last, len(ids), position)

    def extend(self, prefix: Prefix, tokens: torch.Tensor) -> Prefix:
        """Continue B texts by tokens, int64 ``(B, n)``, or ``(n,)`` for the same continuation."""
        if not tokens.shape[-1]:
            return prefix
        tokens = tokens.expand(len(prefix.hidden), -1)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        hidden, cache = self._continue(prefix, tokens, prefix.position + steps, None)
        length = tokens.shape[1]
        return Prefix(cache, hidden[:, -1], tokens[:, -1], prefix.length + length, prefix.position + length)

    def extend_tree(
        self, prefix: Prefix, tokens: torch.Tensor, depths: torch.Tensor, attends: torch.Tensor
    ) -> torch.Tensor:
        """Encode several independent continuations of the same texts at once.

        Args:
            prefix: B texts, shared by all continuations.
            tokens: tokens of all continuations, int64 ``(n,)``.
            depths: offset of each token from the end of the text, int64 ``(n,)``.
            attends: tokens that each token attends to, itself included, bool ``(n, n)``.

        Returns:
            Hidden states of the tokens, float ``(B, n, D)``.
        """
        mask = torch.zeros(1, 1, len(tokens), prefix.length + len(tokens), device=tokens.device)
        mask[0, 0, :, prefix.length :].masked_fill_(~attends, torch.finfo(prefix.hidden.dtype).min)
        rows = tokens.expand(len(prefix.hidden), -1)
        hidden, _ = self._continue(prefix, rows, prefix.position + depths, mask.to(prefix.hidden.dtype))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, float32 ``(..., V)``, from hidden states, float ``(..., D)``."""
        return cast("torch.Tensor", self.model.lm_head(hidden).float())

    def answer_losses(self, images: Images, ids: Sequence[int], answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """Negative log-likelihood of each image's answer, the mean over its tokens, float32 ``(B,)``."""
        device = images.features.device
        longest = max(map(len, answers))
        targets = torch.tensor([[*one, *[-100] * (longest - len(one))] for one in answers], device=device)
        prompt = torch.tensor(ids, device=device).expand(len(answers), -1)
        positions = self._positions(ids)
        behind = (int(positions.max()) + 1 + torch.arange(longest - 1)).expand(3, 1, -1)
        hidden = self.model.model(
            # Tokens attend to earlier ones only, so the padding after an answer's end has no effect.
            input_ids=torch.cat([prompt, targets[:, :-1].clamp(min=0)], dim=1),
            position_ids=torch.cat([positions, behind], dim=2).expand(-1, len(answers), -1).to(device),
            mm_encoder_outputs={"image": images.encoded},
            use_cache=False,
        ).last_hidden_state[:, len(ids) - 1 :]
        losses = F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets).sum(dim=1) / (targets >= 0).sum(dim=1)

    def _continue(
        self, prefix: Prefix, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        cache = _copied(prefix.cache)
        outputs = self.model.model(
            input_ids=tokens,
            position_ids=positions.expand(3, len(tokens), -1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.last_hidden_state, outputs.past_key_values

    def generate(
        self,
        prefix: Prefix,
        end_id: int,
        longest: int,
        allowed: Callable[[list[int]], list[int]] | None = None,
    ) -> Generated:
        """Continue B texts greedily, by ``transformers``, up to the end token.

        Args:
            prefix: the texts; their cache is shared and stays as it is.
            end_id: id of the end token.
            longest: maximum number of tokens.
            allowed: the tokens that may follow those generated so far; by default all.
        """
        batch, start = len(prefix.hidden), prefix.length
        cache = _copied(prefix.cache)
        cache.crop(-1)  # the last token is read again for its logits
        self.model.model.rope_deltas = torch.full((batch, 1), prefix.position - start, device=prefix.last.device)
        ids = torch.zeros(batch, start, dtype=torch.int64, device=prefix.last.device)
        ids[:, -1] = prefix.last
        follows = None if allowed is None else lambda _, tokens: allowed(tokens[start:].tolist())
        found = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            prefix_allowed_tokens_fn=follows,
            max_new_tokens=longest,
            **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0},
            **{"eos_token_id": end_id, "pad_token_id": end_id, "return_dict_in_generate": True, "output_scores": True},
        )
        scores = self.model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        tokens = found.sequences[:, start:]
        ended = (tokens == end_id).int()
        going = (ended.cumsum(dim=1) - ended) == 0
        texts = [row[mask].tolist() for row, mask in zip(tokens, going, strict=True)]
        return Generated(texts, scores.masked_fill(~going, 0.0).sum(dim=1).float())

    def _grid(self, batch: int, device: torch.device | None = None) -> torch.Tensor:
        rows = self.side // self.patch
        return torch.tensor([[1, rows, rows]], device=device).expand(batch, -1)

    def _positions(self, ids: Sequence[int]) -> torch.Tensor:
        """Rotary positions of a prompt, int64 ``(3, 1, n)``: time, row and column."""
        tokens = torch.tensor([list(ids)], device="cpu")
        kinds = (tokens == self.configuration.image_token_id).int()
        if int(kinds.sum()) != self.image_tokens:
            raise UserError(
                f"{KEY}: the prompt has {int(kinds.sum())} tokens of the image instead of {self.image_tokens}; a "
                "question cannot name them"
            )
        positions, _ = self.model.model.get_rope_index(tokens, kinds, image_grid_thw=self._grid(1, torch.device("cpu")))
        return cast("torch.Tensor", positions)
