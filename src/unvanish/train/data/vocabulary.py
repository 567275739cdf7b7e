"""Text as numbers: words for classification, characters for a language model (Hugging Face's tokenizers)."""

import json
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from unvanish.extras import extra

with extra("lab"):
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.trainers import WordLevelTrainer

UNKNOWN = "[UNK]"
MOST_WORDS = 30_000
Unit = Literal["word", "character"]


class Vocabulary:
    """Words (lower case, punctuation apart), or characters → their numbers; those not seen in training are 0."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, texts: Iterable[str], unit: Unit) -> "Vocabulary":
        """Built from the training texts: every character, or the words that occur at least twice, at most 30,000."""
        tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
        if unit == "word":
            tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # type: ignore[assignment]
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
        trainer = WordLevelTrainer(
            vocab_size=MOST_WORDS,
            min_frequency=2 if unit == "word" else 1,
            special_tokens=[UNKNOWN],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __call__(self, text: str) -> Tensor:
        """`[T]` int64; a text without a single word is one unknown word."""
        ids = self._tokenizer.encode(text).ids
        return torch.tensor(ids or [0])

    def write(self, ids: Iterable[int]) -> str:
        """The text of these characters."""
        return "".join(self._tokenizer.id_to_token(i) or "" for i in ids)

    def to_json(self) -> dict:
        """The tokenizer as the library writes it."""
        return json.loads(self._tokenizer.to_str())

    @classmethod
    def from_json(cls, data: dict) -> "Vocabulary":
        """What `to_json` wrote.

        Raises:
            ValueError: it is not a tokenizer.
        """
        try:
            return cls(Tokenizer.from_str(json.dumps(data)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"vocabulary: no tokenizer: {error}") from error
