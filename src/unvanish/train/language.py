"""A character-level language model: the next character from all before it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from unvanish.train.data.table import DataError
from unvanish.train.data.vocabulary import Vocabulary
from unvanish.train.fit import answers
from unvanish.train.models import SequenceModel, Shape
from unvanish.train.problems import DataProblem, Example, Judgement, Listed, evenly, to_json
from unvanish.train.settings import Settings
from unvanish.train.tasks.task import IGNORED, Split

PIECE = 64
"""characters per update and stream, unless `tbptt` says otherwise"""
JUDGED = 1000
"""characters that are judged in one go"""


class LanguageModel(DataProblem):
    """The next character: cross-entropy in nats.

    The first 70 % of the text train, the next 15 % validate, the last 15 % test. The training part is cut into as many
    parallel streams as a batch has samples; each update takes the next `tbptt` characters of every stream, starting
    from the final state of the previous update (a round starts from zero). The rest of a stream after its last whole
    piece is not used for training. Validation and test are judged in pieces of 1,000 characters.

    Args:
        text: all of it, in order.

    Raises:
        DataError: a part would be empty.
    """

    kind = "language"
    applied_to = str
    metric = "cross-entropy (nats per character)"
    shuffle = False
    carry = True

    def __init__(self, text: str) -> None:
        n = len(text)
        first, second = round(0.7 * n), round(0.85 * n)
        texts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
        for name, part in texts.items():
            if len(part) < 2:
                raise DataError(f"data: {n} characters leave {len(part)} to the {name} split; expected 2 or more")
        self.vocabulary = Vocabulary.of([texts["train"]], "character")
        self.parts = {name: self.vocabulary(part) for name, part in texts.items()}
        self.length = self._batch = PIECE

    def begin(self, settings: Settings) -> Shape:
        if settings.read not in (None, "all") or settings.bidirectional:
            raise ValueError(
                "read, bidirectional: a language model reads all states of a network that runs forward, got "
                f"read={settings.read!r} and bidirectional={settings.bidirectional}"
            )
        self.length, self._batch = settings.tbptt or PIECE, settings.batch
        if not self.dataset("train"):
            raise DataError(
                f"data: {len(self.parts['train'])} characters train; too few for {self._batch} streams (--batch) of "
                f"{self.length} characters (--tbptt)"
            )
        shape = settings.shape()
        # The pieces are cut here, so the model need not truncate.
        shape["tbptt"] = None
        return Shape(
            **shape,
            inputs=settings.hidden,
            outputs=len(self.vocabulary),
            read="all",
            symbols=len(self.vocabulary),
        )

    def dataset(self, split: Split) -> Dataset:
        if split == "train":
            return _Streams(self.parts["train"], self._batch, self.length)
        ids = self.parts[split]
        return Listed(_pieces(ids, JUDGED))

    def examples(self, split: Split, most: int) -> list[Example]:
        return evenly(_whole_pieces(self.parts[split], self.length), most)

    @staticmethod
    def encoded(config: dict[str, Any], data: str, most: int) -> list[Example]:
        """Up to `most` pieces of a text, as long as in training, spread evenly over it.

        Raises:
            DataError: the text is too short.
        """
        ids = Vocabulary.from_json(config["input"]["vocabulary"])(data)
        if len(ids) < 2:
            raise DataError(f"data: expected a text of at least 2 characters, got {len(ids)}")
        return evenly(_whole_pieces(ids, config["settings"]["tbptt"] or PIECE), most)

    @staticmethod
    def minimised(answer: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over all characters."""
        return cross_entropy(answer.flatten(0, 1), y.flatten(), ignore_index=IGNORED)

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        return self.minimised(answer, y)

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        return self.loss(answer, y)

    def judge(self, model: SequenceModel) -> Judgement:
        nats = count = right = 0.0
        for answer, y in answers(model, self, "test"):
            judged = int((y != IGNORED).sum())
            nats += float(self.loss(answer, y)) * judged
            right += float((answer.argmax(-1) == y).sum())
            count += judged
        # Laplace's rule, so that a character absent from training has a finite cost.
        seen = torch.bincount(self.parts["train"], minlength=len(self.vocabulary)).double() + 1
        said, truth = (seen / seen.sum()).log(), self.parts["test"][1:]
        return {
            "model": {"nats": nats / count, "bits": nats / count / math.log(2), "accuracy": right / count},
            "frequencies of characters": {
                "nats": -float(said[truth].mean()),
                "bits": -float(said[truth].mean()) / math.log(2),
                "accuracy": float((truth == seen.argmax()).double().mean()),
            },
        }

    def tensors(self) -> Iterable[Tensor]:
        return self.parts.values()

    def keep(self) -> dict[str, Any]:
        return {
            "input": to_json(self.vocabulary),
            "split_rule": "in order: the first 70 % of the characters train, the next 15 % validate, the rest test",
            "split": {name: len(ids) for name, ids in self.parts.items()},
        }

    @staticmethod
    def apply(
        model: SequenceModel,
        config: dict[str, Any],
        data: str,
        length: int = 200,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> str:
        """A continuation of a text, drawn character by character from softmax(answer / temperature).

        Raises:
            ValueError: an empty text, one with a character that training did not hold, or a number out of range.
        """
        if not data or length < 1 or not temperature > 0:
            raise ValueError(
                f"prompt, length, temperature: expected a text and positive numbers, got {data!r}, {length} and "
                f"{temperature}"
            )
        vocabulary = Vocabulary.from_json(config["input"]["vocabulary"])
        read = vocabulary(data)
        for place in (read == 0).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"prompt: character {place + 1} is {data[place]!r}, which the training text does not hold; leave it out"
            )
        generator, found = torch.Generator().manual_seed(seed), []
        model.eval()
        with torch.no_grad():
            answer, state = model.step(read[None])
            for _ in range(length):
                share = (answer[0, -1].double() / temperature).softmax(-1)
                # Nothing is written by the sign for what training did not hold.
                share[0] = 0
                found.append(int(torch.multinomial(share, 1, generator=generator)))
                answer, state = model.step(torch.tensor([found[-1:]]), None, state)
        return vocabulary.write(found)


def _pieces(ids: Tensor, length: int) -> list[Example]:
    """(characters, those that follow them), one piece after the other; the last may be shorter."""
    starts = range(0, len(ids) - 1, length)
    return [(ids[s : min(s + length, len(ids) - 1)], ids[s + 1 : s + 1 + length]) for s in starts]


def _whole_pieces(ids: Tensor, length: int) -> list[Example]:
    """Those of this length; of a text that is shorter, all of it."""
    pieces = _pieces(ids, length)
    return [piece for piece in pieces if len(piece[0]) == length] or pieces


class _Streams(Dataset):
    """Sample b + B·p is piece p of stream b: an update's samples are neighbours, and the next update's follow them."""

    def __init__(self, ids: Tensor, streams: int, piece: int) -> None:
        self.ids, self.streams, self.piece = ids, streams, piece
        self.stride = (len(ids) - 1) // streams
        self.pieces = self.stride // piece

    def __len__(self) -> int:
        return self.pieces * self.streams

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        turn, stream = divmod(index, self.streams)
        start = stream * self.stride + turn * self.piece
        return self.ids[start : start + self.piece], self.ids[start + 1 : start + 1 + self.piece]
