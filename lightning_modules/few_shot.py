"""Classifiers from a few images of each class, on the unit-length features of frozen encoders.

They are solved in one go on all features, without an optimizer's epochs, in seconds:

- ``prototypes``: softmax over the squared distances to the classes' means (Snell et al., Prototypical Networks, NeurIPS
  2017); the baseline of encoders without texts.
- ``linear_probe``: logistic regression (as in Radford et al., ICML 2021), its penalty C chosen.
- ``lp_plus_plus``: linear weights plus a multiple of each class's text embedding (Huang et al., LP++, CVPR 2024,
  arXiv 2404.02285), by block-coordinate steps whose sizes follow from the features. It has nothing to choose.
- ``tip_adapter``: a cache of the images added to the zero-shot logits (Zhang et al., Tip-Adapter, ECCV 2022, arXiv
  2111.03930), its weight and sharpness chosen; ``tip_adapter_f`` fine-tunes the cache.
- ``clip_adapter``: a bottleneck on the image embeddings (Gao et al., CLIP-Adapter, IJCV 2024, arXiv 2110.04544), its
  share chosen.
- ``coop``: context vectors in place of a template's words (Zhou et al., CoOp, IJCV 2022, arXiv 2109.01134).
- ``cocoop``: the same, shifted by a small network of the image (Zhou et al., CoCoOp, CVPR 2022, arXiv 2203.05557).

What has to be chosen is chosen on held-out parts of the shots, whole groups at a time, or on the validation split;
never on the test split. With one shot of each class nothing can be held out: then it is the papers' default.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_modules.options import FewShotOptions
from lightning_modules.precision import KeepsFloat32
from vitrail.errors import UserError
from vitrail.seeding import seeded_rng
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    from lightning_modules.encoders.dual import Towers
    from lightning_modules.encoders.tokenizer import TextTokenizer

TEXT_METHODS = ("lp_plus_plus", "tip_adapter", "tip_adapter_f", "clip_adapter", "coop", "cocoop")
"""Methods that need embeddings of the classes' texts."""

MAX_FOLDS = 3
ABSENT = -1e4
"""Bias of classes without any shot, where a method knows nothing else of them."""

PENALTIES = (1.0, 10.0, 100.0, 1_000.0)
DEFAULT_PENALTY = 10.0
WEIGHTS = tuple(float(value) for value in np.logspace(-1, 2, 10))
SHARPNESS = (0.5, 1.0, 2.0, 5.5, 10.0, 20.0, 50.0)
DEFAULT_CACHE = (1.0, 5.5)
"""Weight and sharpness of Tip-Adapter's cache."""
RATIOS = (0.2, 0.4, 0.6, 0.8)
DEFAULT_RATIO = 0.2
LP_STEPS = 300
LP_ALPHA = 250.0
_MAX_TEXTS = 2_048

Candidate = TypeVar("Candidate")


class Shots(NamedTuple):
    """N images with a known class.

    Attributes:
        image: float32 ``(N, D)``, of unit length.
        label: int64 ``(N,)``.
        group: int64 ``(N,)``, the physical object or product of each.
    """

    image: torch.Tensor
    label: torch.Tensor
    group: torch.Tensor

    def take(self, rows: torch.Tensor) -> Shots:
        """Return some of them."""
        return Shots(self.image[rows], self.label[rows], self.group[rows])


@dataclass(frozen=True)
class ClassTexts:
    """What a text tower knows of the C classes.

    Attributes:
        embedding: float32 ``(C, D)``, of unit length: the mean of each class's prompts.
        scale: factor of the cosine similarities.
        context: encodes the class names behind context vectors; None where the tower takes none.
    """

    embedding: torch.Tensor
    scale: float
    context: ContextTexts | None = None


def held_out(shots: Shots, validation: Shots | None = None) -> tuple[list[tuple[Shots, Shots]], str]:
    """Divide shots into what is fitted and what is held out, several times, and say by what is chosen.

    Args:
        shots: of all classes; groups stay whole, and a class of one group is never held out.
        validation: what is held out instead.

    Returns:
        Pairs, none where nothing can be held out; and a description of them.
    """
    if validation is not None:
        return [(shots, validation)], "the validation split"
    label, group = shots.label.cpu().numpy(), shots.group.cpu().numpy()
    fold, most = np.full(len(label), -1), 1
    for number in np.unique(label):
        rows = np.flatnonzero(label == number)
        place = np.unique(group[rows], return_inverse=True)[1]
        if place.max() > 0:
            fold[rows] = place % MAX_FOLDS
            most = max(most, min(int(place.max()) + 1, MAX_FOLDS))
    if most == 1:
        return [], "defaults, as one shot of each class leaves none to hold out"
    pairs = []
    for number in range(most):
        is_held = torch.from_numpy(fold == number).to(shots.label.device)
        pairs.append((shots.take(~is_held), shots.take(is_held)))
    return pairs, f"{most} folds of the shots"


def choose(
    candidates: Sequence[Candidate], logits: Callable[[Candidate, int], torch.Tensor], held: Sequence[torch.Tensor]
) -> Candidate:
    """Return the candidate with the most right predictions of held-out samples; of equals that of the lowest loss.

    Args:
        candidates: at least one.
        logits: float ``(n, C)`` of a candidate for the held-out samples of a fold.
        held: int64 ``(n,)``, the classes of each fold's held-out samples.
    """
    best, top = candidates[0], (-1, -math.inf)
    for one in candidates:
        right, loss = 0, 0.0
        for fold, label in enumerate(held):
            outputs = logits(one, fold)
            right += int((outputs.argmax(dim=1) == label).sum())
            loss += float(F.cross_entropy(outputs, label, reduction="sum"))
        if (right, -loss) > top:
            best, top = one, (right, -loss)
    return best


class FewShotHead(KeepsFloat32, ABC):
    """Base class of classifiers on unit-length features, float ``(B, D)``, with logits ``(B, C)``.

    Args:
        options: of the method.
        num_classes: C.
        dim: D.
    """

    def __init__(self, options: FewShotOptions, num_classes: int, dim: int) -> None:
        super().__init__()
        self.options, self.num_classes, self.dim = options, num_classes, dim

    @abstractmethod
    def forward(self, image: torch.Tensor, context: ContextTexts | None = None) -> torch.Tensor:
        """Logits, float ``(B, C)``, of unit-length features, float ``(B, D)``."""

    @abstractmethod
    def solve(self, shots: Shots, validation: Shots | None, texts: ClassTexts | None) -> dict[str, float]:
        """Fit to shots; return what was chosen, by its name."""

    def resize(self, state: Mapping[str, Any], prefix: str) -> None:
        """Take the sizes of a checkpoint's weights, where they depend on the number of shots."""


class LinearHead(FewShotHead):
    """A linear classifier, by ``prototypes``, ``linear_probe``, ``lp_plus_plus`` or ``coop``."""

    def __init__(self, options: FewShotOptions, num_classes: int, dim: int) -> None:
        super().__init__(options, num_classes, dim)
        self.weight = nn.Parameter(torch.zeros(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, image: torch.Tensor, context: ContextTexts | None = None) -> torch.Tensor:
        """See ``FewShotHead``."""
        return F.linear(image.float(), self.weight, self.bias)

    @torch.no_grad()
    def set(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copy weights, float ``(C, D)``, and biases, ``(C,)``, by default 0."""
        self.weight.copy_(weight)
        self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)

    def solve(self, shots: Shots, validation: Shots | None, texts: ClassTexts | None) -> dict[str, float]:
        """See ``FewShotHead``."""
        match self.options.method:
            case "prototypes":
                mean, is_there = class_means(shots, self.num_classes)
                self.set(2 * mean, torch.where(is_there, -mean.square().sum(dim=1), ABSENT))
                return {}
            case "linear_probe":
                return self._solve_probe(shots, validation)
            case "lp_plus_plus":
                assert texts is not None
                weight, alpha = lp_plus_plus(shots, texts.embedding)
                self.set(weight + alpha[:, None] * texts.embedding)
                return {"alpha": float(alpha.mean())}
            case _:
                assert texts is not None
                return self._solve_coop(shots, validation, texts)

    def _solve_probe(self, shots: Shots, validation: Shots | None) -> dict[str, float]:
        pairs, _ = held_out(shots, validation)
        penalty = DEFAULT_PENALTY
        if pairs:
            held = [test.image for _, test in pairs]

            def logits(candidate: float, fold: int) -> torch.Tensor:
                weight, bias = logistic_regression(pairs[fold][0], self.num_classes, candidate)
                return held[fold] @ weight.T + bias

            penalty = choose(PENALTIES, logits, [test.label for _, test in pairs])
        weight, bias = logistic_regression(shots, self.num_classes, penalty)
        self.set(weight, bias)
        return {"C": penalty}

    def _solve_coop(self, shots: Shots, validation: Shots | None, texts: ClassTexts) -> dict[str, float]:
        trainee = _Context(self.options, texts, shots.image.device)
        steps = train(trainee, shots, validation, self.options.steps, lr=2e-3)
        with torch.no_grad():
            self.set(texts.scale * trainee.embedding())
        return {"steps": steps}


class TipAdapter(FewShotHead):
    """Zero-shot logits, and a cache of the shots that votes by similarity (Tip-Adapter and Tip-Adapter-F)."""

    text: torch.Tensor
    values: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor

    def __init__(self, options: FewShotOptions, num_classes: int, dim: int) -> None:
        super().__init__(options, num_classes, dim)
        self.keys = nn.Parameter(torch.zeros(1, dim))
        self.register_buffer("values", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("text", torch.zeros(num_classes, dim))
        self.register_buffer("alpha", torch.tensor(DEFAULT_CACHE[0]))
        self.register_buffer("beta", torch.tensor(DEFAULT_CACHE[1]))

    def forward(self, image: torch.Tensor, context: ContextTexts | None = None) -> torch.Tensor:
        """See ``FewShotHead``."""
        image = image.float()
        votes = torch.exp(-self.beta * (1 - image @ self.keys.T)) @ self._one_hot(self.values)
        return image @ self.text.T + self.alpha * votes

    def solve(self, shots: Shots, validation: Shots | None, texts: ClassTexts | None) -> dict[str, float]:
        """See ``FewShotHead``; of the fine-tuned cache the number of steps is chosen as well."""
        assert texts is not None
        self.text = texts.scale * texts.embedding
        pairs, _ = held_out(shots, validation)
        alpha, beta = DEFAULT_CACHE
        if pairs:
            parts = [(test.image @ self.text.T, test.image @ own.image.T, own.label) for own, test in pairs]

            def logits(candidate: tuple[float, float], fold: int) -> torch.Tensor:
                zero_shot, similarity, label = parts[fold]
                votes = torch.exp(-candidate[1] * (1 - similarity)) @ self._one_hot(label)
                return zero_shot + candidate[0] * votes

            grid = [(weight, sharpness) for weight in WEIGHTS for sharpness in SHARPNESS]
            alpha, beta = choose(grid, logits, [test.label for _, test in pairs])
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)
        self.start(shots)
        chosen = {"alpha": alpha, "beta": beta}
        if self.options.method == "tip_adapter_f":
            chosen["steps"] = train(self, shots, validation, self.options.steps, lr=1e-3)
        return chosen

    def start(self, shots: Shots) -> None:
        """Fill the cache."""
        self.keys = nn.Parameter(shots.image.clone())
        self.values = shots.label.clone()

    def resize(self, state: Mapping[str, Any], prefix: str) -> None:
        """See ``FewShotHead``."""
        size = len(state.get(f"{prefix}values", self.values))
        self.keys = nn.Parameter(self.keys.new_zeros(size, self.dim))
        self.values = self.values.new_zeros(size)

    def _one_hot(self, label: torch.Tensor) -> torch.Tensor:
        return F.one_hot(label, self.num_classes).float()


class ClipAdapter(FewShotHead):
    """Zero-shot logits of embeddings that a bottleneck has changed in part (CLIP-Adapter, its visual branch)."""

    text: torch.Tensor
    ratio: torch.Tensor

    def __init__(self, options: FewShotOptions, num_classes: int, dim: int) -> None:
        super().__init__(options, num_classes, dim)
        hidden = max(dim // 4, 1)
        self.adapter = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.ReLU()
        )
        self.register_buffer("text", torch.zeros(num_classes, dim))
        self.register_buffer("ratio", torch.tensor(DEFAULT_RATIO))

    def forward(self, image: torch.Tensor, context: ContextTexts | None = None) -> torch.Tensor:
        """See ``FewShotHead``."""
        image = image.float()
        mixed = self.ratio * self.adapter(image) + (1 - self.ratio) * image
        return F.normalize(mixed, dim=-1) @ self.text.T

    def start(self, shots: Shots) -> None:
        """Reset the weights, by the options' seed."""
        with seeded_rng("clip_adapter", self.options.seed):
            for layer in self.adapter:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    def solve(self, shots: Shots, validation: Shots | None, texts: ClassTexts | None) -> dict[str, float]:
        """See ``FewShotHead``."""
        assert texts is not None
        self.text = texts.scale * texts.embedding
        ratio, steps, pairs = DEFAULT_RATIO, self.options.steps, held_out(shots, validation)[0]
        if pairs:
            found = {}
            for one in RATIOS:
                self.ratio.fill_(one)
                found[one] = trajectories(self, pairs, steps, lr=1e-3)
            marks = _marks(steps)
            grid = [(one, mark) for one in RATIOS for mark in marks]
            ratio, steps = choose(
                grid, lambda one, fold: found[one[0]][fold][marks.index(one[1])], [test.label for _, test in pairs]
            )
        self.ratio.fill_(ratio)
        self.start(shots)
        descend(self, shots, self.options.steps, steps, lr=1e-3)
        return {"ratio": ratio, "steps": steps}


class CoCoOp(FewShotHead):
    """Context vectors before the class names, shifted by a small network of the image; texts are encoded per image."""

    scale: torch.Tensor

    def __init__(self, options: FewShotOptions, num_classes: int, dim: int, width: int) -> None:
        super().__init__(options, num_classes, dim)
        self.context = nn.Parameter(torch.zeros(options.context, width))
        self.shift = nn.Sequential(nn.Linear(dim, max(dim // 16, 1)), nn.ReLU(), nn.Linear(max(dim // 16, 1), width))
        self.register_buffer("scale", torch.ones(()))
        self._texts: ContextTexts | None = None

    def forward(self, image: torch.Tensor, context: ContextTexts | None = None) -> torch.Tensor:
        """See ``FewShotHead``."""
        texts = context or self._texts
        if texts is None:
            raise UserError("few_shot.method: cocoop encodes texts for each image, and needs the text tower; use coop")
        rows = max(_MAX_TEXTS // self.num_classes, 1)
        found = []
        for part in torch.split(image.float(), rows):
            embedding = texts(self.context + self.shift(part)[:, None])
            found.append(torch.einsum("bd,bcd->bc", part, embedding))
        return self.scale * torch.cat(found)

    def start(self, shots: Shots) -> None:
        """Reset the weights, by the options' seed."""
        with seeded_rng("cocoop", self.options.seed):
            nn.init.normal_(self.context, std=0.02)
            for layer in self.shift:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    def solve(self, shots: Shots, validation: Shots | None, texts: ClassTexts | None) -> dict[str, float]:
        """See ``FewShotHead``."""
        assert texts is not None
        self.scale.fill_(texts.scale)
        self._texts = texts.context
        self.start(shots)
        steps = train(self, shots, validation, self.options.steps, lr=2e-3, batch_size=16)
        self._texts = None
        return {"steps": steps}


class _Context(nn.Module):
    """Trains the context vectors of CoOp: random at first, one for all classes."""

    def __init__(self, options: FewShotOptions, texts: ClassTexts, device: torch.device) -> None:
        super().__init__()
        assert texts.context is not None
        self.texts, self.scale, self.options = texts.context, texts.scale, options
        self.context = nn.Parameter(torch.zeros(options.context, texts.context.width, device=device))
        self.start(None)

    def start(self, shots: Shots | None) -> None:
        with seeded_rng("coop", self.options.seed):
            self.context.data = 0.02 * torch.randn(self.context.shape).to(self.context.device)

    def embedding(self) -> torch.Tensor:
        return self.texts(self.context[None])[0]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.scale * image @ self.embedding().T


class ContextTexts:
    """The C class names behind context vectors, as a frozen text tower encodes them.

    The vectors take the place of the embeddings of placeholder tokens, so that any tower with token embeddings will do.

    Args:
        towers: whose text tower is used.
        tokenizer: of it.
        names: of the classes.
        length: number of context vectors.
        device: of the tower.
    """

    def __init__(
        self, towers: Towers, tokenizer: TextTokenizer, names: Sequence[str], length: int, device: torch.device
    ) -> None:
        texts, most = [f"{name.replace('_', ' ')}." for name in names], tokenizer.state["max_length"]
        longest = int(tokenizer(texts)["attention_mask"].sum(dim=1).max())
        if longest + length > most:
            raise UserError(
                f"few_shot.context: {length} vectors and a class name of {longest} tokens are more than the text "
                f"tower's {most}; lower it, or raise towers.max_length"
            )
        self._start, self._length, self._towers = int(tokenizer.starts_specially), length, towers
        tokens = tokenizer([f"{_placeholder(tokenizer, length)} {text}" for text in texts], device)
        self._ids, self._mask = tokens["input_ids"], tokens["attention_mask"]
        self.width = token_width(towers)

    def __call__(self, context: torch.Tensor) -> torch.Tensor:
        """Return unit-length embeddings, float32 ``(B, C, D)``, for context vectors ``(B, M, width)``."""
        batch, classes = len(context), len(self._ids)
        ids, mask = self._ids.repeat(batch, 1), self._mask.repeat(batch, 1)
        own = context.repeat_interleave(classes, dim=0)
        begin, end = self._start, self._start + self._length

        def replaced(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            given = inputs[0] if inputs else None
            if given is None or given.shape != ids.shape or not torch.equal(given, ids):
                return None
            return torch.cat([output[:, :begin], own.to(output.dtype), output[:, end:]], dim=1)

        layers = [one for one in self._towers.backbone("text").modules() if isinstance(one, nn.Embedding)]
        hooks = [layer.register_forward_hook(replaced) for layer in layers]
        try:
            features = self._towers.encode_text({"input_ids": ids, "attention_mask": mask})
        finally:
            for hook in hooks:
                hook.remove()
        return F.normalize(features.float(), dim=-1).view(batch, classes, -1)


def _placeholder(tokenizer: TextTokenizer, length: int) -> str:
    """Words that are one token each, as many as there are context vectors."""
    for word in ("x", "a", "the", "X"):
        texts = [" ".join([word] * number) for number in (1, length + 1)]
        short, long = (int(tokenizer([text])["attention_mask"].sum()) for text in texts)
        if long - short == length:
            return " ".join([word] * length)
    raise UserError("few_shot.method: the text tower's tokenizer has no word of one token; use lp_plus_plus")


def token_width(towers: Towers) -> int:
    """Length of a text tower's token embeddings.

    Raises:
        UserError: it has none.
    """
    layers = [one for one in towers.backbone("text").modules() if isinstance(one, nn.Embedding)]
    if not layers:
        raise UserError(
            "few_shot.method: the text tower has no token embeddings to put a context before; use lp_plus_plus"
        )
    return max(layers, key=lambda layer: layer.num_embeddings).embedding_dim


def class_means(shots: Shots, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean features of each class, float ``(C, D)``, 0 for a class without any, and whether there are any, ``(C,)``."""
    one_hot = F.one_hot(shots.label, num_classes).to(shots.image.dtype)
    counts = one_hot.sum(dim=0)
    return one_hot.T @ shots.image / counts.clamp(min=1)[:, None], counts > 0


def logistic_regression(shots: Shots, num_classes: int, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, float32 ``(C, D)``, and biases of logistic regression; absent classes are never predicted.

    Raises:
        UserError: there are fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression

    label = shots.label.cpu().numpy()
    if len(np.unique(label)) < 2:
        raise UserError("few_shot.method: linear_probe needs shots of at least two classes")
    fitted = LogisticRegression(C=penalty, max_iter=2_000).fit(shots.image.float().cpu().numpy(), label)
    weight, bias = torch.zeros(num_classes, shots.image.shape[1]), torch.full((num_classes,), ABSENT)
    coefficients, intercepts = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:  # the difference only
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight[fitted.classes_], bias[fitted.classes_] = (
        torch.from_numpy(coefficients).float(),
        torch.from_numpy(intercepts).float(),
    )
    return weight.to(shots.image.device), bias.to(shots.image.device)


def lp_plus_plus(shots: Shots, text: torch.Tensor, steps: int = LP_STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual weights, float ``(C, D)``, and multipliers of the text embeddings, ``(C,)``, of LP++.

    Both begin near a minimum of an approximated loss: the class means, and a multiple of their mean similarity to their
    texts. Steps alternate between the two; each minimises a quadratic upper bound of the loss, whose curvature follows
    from the features (the Hessian of softmax cross-entropy is at most one half), so the loss never rises. A class
    without shots has no visual weights, and the mean multiplier of the others.
    """
    image, similarity, number = shots.image, shots.image @ text.T, len(shots.label)
    weight, is_there = class_means(shots, len(text))
    own = (weight * text).sum(dim=1)[is_there].mean()
    alpha = (LP_ALPHA * own).clamp(min=1).expand(len(text)).clone()
    target = F.one_hot(shots.label, len(text)).to(image.dtype)
    step_weight = 2 * number / torch.linalg.eigvalsh(image.T @ image)[-1]
    step_alpha = 2 * number / similarity.square().sum(dim=0).max()
    there = is_there.to(image.dtype)
    absent = torch.where(is_there, 0.0, ABSENT)
    for step in range(2 * steps):
        error = (image @ weight.T + alpha * similarity + absent).softmax(dim=1) - target
        if step % 2:
            alpha = alpha - step_alpha * (error * similarity).sum(dim=0) / number * there
        else:
            weight = weight - step_weight * (error.T @ image) / number * there[:, None]
    return weight, torch.where(is_there, alpha, alpha[is_there].mean())


def train(head: Any, shots: Shots, validation: Shots | None, steps: int, *, lr: float, batch_size: int = 0) -> int:
    """Train a head from its start, for the number of steps that is best on what is held out; return that number."""
    pairs, _ = held_out(shots, validation)
    marks = _marks(steps)
    chosen = steps
    if pairs:
        folds = trajectories(head, pairs, steps, lr=lr, batch_size=batch_size)
        chosen = choose(marks, lambda mark, fold: folds[fold][marks.index(mark)], [test.label for _, test in pairs])
    head.start(shots)
    descend(head, shots, steps, chosen, lr=lr, batch_size=batch_size)
    return chosen


def descend(head: nn.Module, shots: Shots, planned: int, steps: int, *, lr: float, batch_size: int = 0) -> None:
    """Take the first steps of a training that is planned to be longer, as when the number was chosen."""
    for step in _descent(head, shots, planned, lr, batch_size):
        if step == steps:
            break


def _marks(steps: int) -> list[int]:
    return sorted({max(steps // 8, 1), max(steps // 4, 1), max(steps // 2, 1), steps})


def trajectories(
    head: Any, pairs: Sequence[tuple[Shots, Shots]], steps: int, *, lr: float, batch_size: int = 0
) -> list[list[torch.Tensor]]:
    """Logits of each fold's held-out samples after some numbers of steps, each training from the head's start."""
    found, marks = [], _marks(steps)
    for own, test in pairs:
        trainee = _copied(head)
        trainee.start(own)
        logits = []
        for step in _descent(trainee, own, steps, lr, batch_size):
            if step in marks:
                with torch.no_grad():
                    logits.append(trainee(test.image))
        found.append(logits)
    return found


def _copied(head: nn.Module) -> Any:
    """A head with weights of its own and the same text tower."""
    shared = {id(value): value for value in vars(head).values() if isinstance(value, ContextTexts)}
    return copy.deepcopy(head, shared)


def _descent(head: nn.Module, shots: Shots, steps: int, lr: float, batch_size: int) -> Iterable[int]:
    """Take steps by AdamW with a cosine schedule, on all shots or on batches in a fixed order; yield their numbers.

    Only classes that have shots compete: what a text says of the others is left as it is.
    """
    seen = torch.unique(shots.label)
    target = torch.searchsorted(seen, shots.label)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, eps=1e-4, weight_decay=0.01, fused=True)
    order = torch.Generator().manual_seed(0)
    rows: torch.Tensor | slice = slice(None)
    waiting = torch.zeros(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        if batch_size:
            if not len(waiting):
                waiting = torch.randperm(len(target), generator=order)
            rows, waiting = waiting[:batch_size].to(target.device), waiting[batch_size:]
        with torch.enable_grad():
            loss = F.cross_entropy(head(shots.image[rows])[:, seen], target[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
        yield step


def build_head(options: FewShotOptions, num_classes: int, dim: int, width: int = 0) -> FewShotHead:
    """Build the classifier of a method, with weights of 0.

    Args:
        options: of the method.
        num_classes: C.
        dim: length of the features.
        width: of the text tower's token embeddings, for ``cocoop``.
    """
    if options.method in ("tip_adapter", "tip_adapter_f"):
        return TipAdapter(options, num_classes, dim)
    if options.method == "clip_adapter":
        return ClipAdapter(options, num_classes, dim)
    if options.method == "cocoop":
        return CoCoOp(options, num_classes, dim, width)
    return LinearHead(options, num_classes, dim)


def refuse_without_texts(options: FewShotOptions) -> None:
    """Refuse methods that need texts, for encoders of images alone."""
    if options.method in TEXT_METHODS:
        raise UserError(
            f"few_shot.method: {options.method} needs a text tower, which this model does not have; use linear_probe "
            "or prototypes, or a dual encoder"
        )


def solve_head(
    head: FewShotHead, shots: Shots, validation: Shots | None = None, texts: ClassTexts | None = None
) -> dict[str, float]:
    """Fit a head to shots, choosing what has to be chosen, and report it.

    Args:
        head: of ``build_head``.
        shots: at least one.
        validation: to choose on, with ``select: val``; by default on folds of the shots.
        texts: of the classes, where the encoder has a text tower.

    Returns:
        What was chosen, by its name.

    Raises:
        UserError: the method needs texts and there are none, or there are no shots.
    """
    if texts is None:
        refuse_without_texts(head.options)
    if not len(shots.label):
        raise UserError("few_shot: the train split has no image with a known class; give it some")
    with torch.no_grad():
        return head.solve(shots, validation, texts)


def fit_task(
    task: Any, head: FewShotHead, encode: Callable[[torch.Tensor], torch.Tensor], texts: ClassTexts | None
) -> None:
    """Fit a task's head to the train split of its trainer's data, and report what was chosen by what.

    Raises:
        UserError: as ``solve_head``; and for several processes.
    """
    if task.trainer.world_size > 1:
        raise UserError("few_shot: is solved in one go by one process; set trainer.devices: 1")
    shots = _encoded(task, encode, "train", head.dim)
    validation = _encoded(task, encode, "val", head.dim) if head.options.select == "val" else None
    if validation is not None and not len(validation.label):
        raise UserError(
            "few_shot.select: val, but the validation split has no image with a known class; give it some, or leave "
            "select out"
        )
    chosen = solve_head(head, shots, validation, texts)
    what = ", ".join(f"{name} {value:.4g}" for name, value in chosen.items())
    by = held_out(shots, validation)[1]
    rank_zero_info(
        f"few_shot: {head.options.method} on {len(shots.label)} images of {len(torch.unique(shots.label))} classes"
        + (f"; {what} (by {by})." if what else ".")
    )
    task.log_dict({f"few_shot/{name}": value for name, value in chosen.items()})


def _encoded(task: Any, encode: Callable[[torch.Tensor], torch.Tensor], split: str, dim: int) -> Shots:
    """Features, of length ``dim``, of the images of a split whose class is known."""
    nothing = torch.zeros(0, dtype=torch.int64, device=task.device)
    parts = [Shots(torch.zeros(0, dim, device=task.device), nothing, nothing)]
    with torch.no_grad():
        for loaded in task.trainer.datamodule.view_dataloader(split, None):
            batch = task.trainer.strategy.batch_to_device(loaded)
            rows = batch["label"] != UNKNOWN
            image = F.normalize(encode(batch["image"]).float(), dim=-1)
            parts.append(Shots(image[rows], batch["label"][rows], batch["group_id"][rows]))
    return Shots(*(torch.cat(cast("Any", part)) for part in zip(*parts, strict=True)))
