"""`dcd_caption`: a caption, as far as possible as its author wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor

from lavis_dcd.common.schema import parse
from lavis_dcd.common.texts import visible


@dataclass(frozen=True)
class CaptionConfig:
    """Keys of `dcd_caption`.

    Args:
        name: LAVIS's processor name.
        max_words: keep at most so many words; null keeps all.
        lower: lower the case (RoBERTa's vocabulary has both cases; BERT's tokenizers lower by themselves).
        prompt: put before every caption.
    """

    name: str = ""
    max_words: int | None = None
    lower: bool = False
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(f"max_words: {self.max_words} is not positive")


@registry.register_processor("dcd_caption")
class DcdCaptionProcessor(BaseProcessor):
    """Joins white space and drops what nobody sees (control characters, marks of writing direction); punctuation stays.

    Keys: `CaptionConfig`.
    """

    def __init__(self, config: CaptionConfig | None = None) -> None:
        super().__init__()
        self.config = config or CaptionConfig()
        # an unused function of the base class, which loader processes could not be sent
        del self.transform

    def __call__(self, item: str) -> str:
        """The caption with single spaces, shortened, lowered and prompted as configured."""
        words = visible(item).split()[: self.config.max_words]
        caption = " ".join(words)
        return self.config.prompt + (caption.lower() if self.config.lower else caption)

    @classmethod
    def config_schema(cls) -> type:
        """Return the dataclass that a section must fit."""
        return CaptionConfig

    @classmethod
    def from_config(cls, cfg: Any = None) -> DcdCaptionProcessor:
        """Build from a `text_processor` section.

        Raises:
            UserError: one line per unknown key or wrong value.
        """
        return cls(parse(CaptionConfig, cfg, "text_processor"))
