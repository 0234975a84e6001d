"""ViLT as a LAVIS retrieval model (Kim et al., ICML 2021): one transformer over words and patches, and a rank head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import ViltModel
from typing_extensions import override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import asset_path
from lavis_dcd.matching.attention import Shortcuts, additive_mask
from lavis_dcd.matching.contract import pair_chunks
from lavis_dcd.matching.features import ImageFeatures, TextFeatures, last_used
from lavis_dcd.models.batch import Batch, encode_batch
from lavis_dcd.models.hub import load_tokenizer
from lavis_dcd.models.retrieval_loss import RetrievalLoss
from lavis_dcd.models.retriever import LayeredRetriever, Succession, model_types
from lavis_dcd.models.vilt.config import ViltConfig, transformers_config
from lavis_dcd.models.vilt.stack import BlockStack, PairSide
from lavis_dcd.models.vilt.weights import VILT_FILES

MATCH_CHUNK = 256  # pairs matched together where memory would allow more: larger chunks pad more tokens
_TEXT, _IMAGE = 0, 1  # rows of the modality embedding


@registry.register_model("vilt_retrieval")
class ViltRetrieval(LayeredRetriever):
    """Scores a pair by the whole of ``transformers``' ViLT over the text's and the picture's tokens.

    Features are the embeddings that enter the first block, modality included: image ``[B, 1 + patches, width]``,
    text ``[B, L, width]``, both with mask; a picture has its own patches only, so batches differ in N.

    Pictures of a batch ``[B, 3, H, W]`` may be padded with zeros on the right and below, and padding changes no
    score. A picture's real size is found from its pixels that are not zero, as the authors' code does: with mean =
    std = 0.5 an 8-bit pixel is never 0 (it would be 127.5). Sides must be multiples of the patch size.

    The official arithmetic: ViLT's ``vilt_module.py`` (infer), ``vision_transformer.py`` (visual_embed) and
    ``objectives.py`` (compute_irtr).
    """

    config_class = ViltConfig
    files = VILT_FILES
    succession = Succession(stacks=r"vilt\.encoder\.layer", sizes="image, text and fusion sizes")
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = model_types(
        "vilt_retrieval", "coco", "flickr", "student_coco", "student_flickr", "tiny"
    )
    scores_pairs: ClassVar[bool] = True

    def _build(self, config: ViltConfig) -> None:
        self.config = config
        self.vilt = ViltModel(transformers_config(config))
        # the one norm that is BERT's, with BERT's epsilon
        self.vilt.embeddings.text_embeddings.LayerNorm.eps = 1e-12
        self.rank_output = nn.Linear(config.fusion.width, 1)
        nn.init.normal_(self.rank_output.weight, std=0.02)
        nn.init.zeros_(self.rank_output.bias)
        if config.freeze_embeddings:
            self.vilt.embeddings.requires_grad_(False)
        self.retrieval_loss = RetrievalLoss(config.loss)
        self._tokenizer = None
        self.shortcuts = Shortcuts() if config.fusion.shortcuts else Shortcuts.none()

    @override
    def _share_encoders(self, teacher: ViltRetrieval) -> None:
        self.vilt.embeddings = teacher.vilt.embeddings

    # -- the matching contract -----------------------------------------------------------------------------------

    @override
    def encoder_modules(self) -> list[nn.Module]:
        return [self.vilt.embeddings]

    @property
    def tokenizer(self):
        """The ``transformers`` tokenizer of ``text.name``, read at the first text.

        Raises:
            UserError: when it is neither on disk nor can be fetched, or has more ids than there are embeddings.
        """
        if self._tokenizer is None:
            tokenizer = load_tokenizer(asset_path(self.config.text.name))
            if len(tokenizer) > self.config.text.vocab_size:
                raise UserError(
                    f"model.text.name: the tokenizer {self.config.text.name} has {len(tokenizer)} entries, "
                    f"model.text.vocab_size is {self.config.text.vocab_size}: name the tokenizer that the weights "
                    "were trained with"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @override
    def encode_images(self, images: Tensor) -> ImageFeatures:
        patch = self.config.image.patch_size
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise UserError(
                f"pictures of {tuple(images.shape[-2:])} pixels, but model.image.patch_size is {patch}: sides must be "
                "multiples of it, as the processors vilt_image_train and vilt_image_eval make them"
            )
        embeddings = self.vilt.embeddings
        grids = _real_grids(images, patch)
        patches = embeddings.patch_embeddings(images)
        length = 1 + int(grids.prod(dim=1).max())
        rows, parts = [], []
        # positions are fitted to each picture's own grid, so pictures of one grid go together
        for height, width in grids.unique(dim=0).tolist():
            chosen = (grids == grids.new_tensor([height, width])).all(dim=1).nonzero()[:, 0]
            tokens = self._place(patches[chosen, :, :height, :width])
            rows.append(chosen)
            parts.append(nnf.pad(tokens, (0, 0, 0, length - tokens.shape[1])))
        tokens = torch.cat(parts)[torch.cat(rows).argsort()]
        mask = torch.arange(length, device=images.device) <= grids.prod(dim=1)[:, None]
        return ImageFeatures(tokens, mask)

    def _place(self, patches: Tensor) -> Tensor:
        """Patch embeddings ``[B, D, h, w]`` -> tokens ``[B, 1 + h w, D]`` with class token, positions, modality."""
        embeddings = self.vilt.embeddings
        positions = embeddings.position_embeddings
        side = round((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        grid = nnf.interpolate(grid, size=patches.shape[-2:], mode="bilinear", align_corners=True)
        cls = (embeddings.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        tokens = torch.cat([cls, (patches + grid).flatten(2).transpose(1, 2)], dim=1)
        return embeddings.dropout(tokens) + embeddings.token_type_embeddings.weight[_IMAGE]

    @override
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        batch = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.config.text.max_length, return_tensors="pt"
        )
        return self.encode_token_ids(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))

    def encode_token_ids(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Features of tokenised texts: int64 ids ``[B, L]``, bool mask ``[B, L]``."""
        embeddings = self.vilt.embeddings
        words = embeddings.text_embeddings(input_ids=ids)
        return TextFeatures(words + embeddings.token_type_embeddings.weight[_TEXT], mask.bool())

    @override
    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        return self.fusion_scores(images, texts, pairs)

    def fusion_scores(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        """The rank head's logit of each pair, ``[P]``, in chunks of at most ``match_memory_mb`` of activations."""
        image_mask, text_mask = images.full_mask(), texts.full_mask()
        # pairs in the order of their pictures' and then captions' lengths: a chunk pays for its own longest only
        lengths = image_mask.sum(dim=1)[pairs[:, 0]] * (1 + text_mask.shape[1]) + text_mask.sum(dim=1)[pairs[:, 1]]
        order = lengths.argsort(stable=True)
        stack = None
        if self.shortcuts.any:
            stack = BlockStack(self.vilt.encoder.layer, self.shortcuts, self.config.fusion.grad_checkpoint)
        scores = [
            self._score(images, texts, part, stack)
            for part in self._chunks(pairs[order], last_used(image_mask) + last_used(text_mask))
        ]
        return torch.cat(scores)[order.argsort()] if scores else self.rank_output.weight.new_zeros(0)

    def _chunks(self, pairs: Tensor, tokens: int) -> Iterator[Tensor]:
        size = min(MATCH_CHUNK, max(32, len(pairs) // 4 + 1))
        for chunk in pair_chunks(pairs, self.bytes_per_pair(tokens), self.config.match_memory_mb):
            yield from (part for part in chunk.split(size) if len(part))

    def bytes_per_pair(self, tokens: int) -> int:
        """Activations of one pair without gradients, by the tensors that live together in a block."""
        fusion = self.config.fusion
        # per token: the hidden states in flight (about 8 widths) and the feed-forward's two copies; per head: scores
        numbers = tokens * fusion.width * (8 + 2 * fusion.mlp_ratio) + 3 * fusion.heads * tokens**2
        return self.rank_output.weight.element_size() * numbers

    def _score(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor, stack: BlockStack | None) -> Tensor:
        """Logits ``[p]`` of one chunk of pairs ``[p, 2]``; without a stack by ``transformers``' own forward."""
        dtype = self.rank_output.weight.dtype
        sides = PairSide.of(texts, pairs[:, 1], dtype), PairSide.of(images, pairs[:, 0], dtype)
        hidden = self._encode_plainly(*sides) if stack is None else stack.run(*sides)
        # the pooler reads the first token only, so the norm need not run on the others
        pooled = self.vilt.pooler(self.vilt.layernorm(hidden[:, :1]))
        return self.rank_output(pooled)[:, 0].float()

    def _encode_plainly(self, *sides: PairSide) -> Tensor:
        """``transformers``' own forward for every pair, ``[P, N, D]``: what the shortcuts must agree with."""
        hidden = torch.cat([side.tokens.index_select(0, side.rows) for side in sides], dim=1)
        mask = torch.cat([side.mask[side.rows] for side in sides], dim=1)
        return self.vilt.encoder(hidden, attention_mask=additive_mask(mask, hidden.dtype)).last_hidden_state

    # -- training ------------------------------------------------------------------------------------------------

    def joint_logits(self, images: ImageFeatures, texts: TextFeatures) -> None:
        """Return None: there is no joint space."""

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's own retrieval loss on a training batch (LAVIS's ``RetrievalDataset`` samples).

        Returns:
            ``loss`` and ``fusion_loss``: 0-dim tensors.
        """
        batch = Batch.of(samples)
        return self.retrieval_loss(self, encode_batch(self, batch), batch.progress)


def _real_grids(images: Tensor, patch: int) -> Tensor:
    """Patch rows and columns of the real part of each padded picture: int64 ``[B, 2]``, at least 1 each."""
    real = (images != 0).any(dim=1)
    sizes = []
    for used in (real.any(dim=2), real.any(dim=1)):  # [B, H] and [B, W]
        ends = used * torch.arange(1, used.shape[1] + 1, device=images.device)
        sizes.append((ends.amax(dim=1) + patch - 1) // patch)
    return torch.stack(sizes, dim=1).clamp(min=1)
