"""Streams that live on from one training step to the next, each with a key and an age of its own.

A step takes all streams some blocks further with gradients, through FAM and memory, and asks for the key after blocks
of that step. The question is put to a copy of the state, so that a stream never hears its key again. A stream lives
until it answers wrongly or reaches its age; then another key is said in it, with its old state left in place four times
of five (the paper's random state passing). So streams grow old by themselves as the memory gets better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from famexport.model import FamModel, State
from samples.passkey import lora
from samples.passkey.replay import Replayed
from samples.passkey.task import DIGITS, FILLERS, Task

PASSED_ON = 0.8  # how often a new key meets the state of the stream before
MIXTURE = (0.2, 0.4, 0.4)  # of FILLERS; a stream keeps to one
CORPUS = 2_000_000  # tokens of each
ACROSS = 0.06  # of questions whose answer crosses the end of a block
IN_BLOCK = 0.1  # of streams whose question comes in the same block as a statement
SAMPLED = 64  # tokens of a block that a pretrained model predicts in training
SHORT, SHORT_LIFE = 1 / 4, 16  # share of streams that live so few blocks at most, so that writing is practised, too


@dataclass(frozen=True)
class Options:
    rows: int
    oldest: int  # blocks that a stream may live
    noise: float  # on FAM at the start of a step, relative to its root mean square
    pretrained: bool = False  # a large model that is adapted: see ``Streams``
    seed: int = 0


class Text:
    """Filler, statements and questions as tensors on the device."""

    def __init__(self, task: Task, seed: int, device: str) -> None:
        def there(ids: object) -> Tensor:
            return torch.from_numpy(np.array(ids)).to(device)

        self.device, self.mentions = device, task.mentions
        self._corpora = there(np.concatenate([task.filler(kind, "train", CORPUS, seed) for kind in FILLERS]))
        self._mixture = torch.tensor(MIXTURE, device=device)
        self._statement, self._question = there(task.statement(np.zeros(DIGITS, np.int64))), there(task.question)
        self.digits = there(task.digits)

    def kinds(self, rows: int) -> Tensor:
        return torch.multinomial(self._mixture, rows, replacement=True)

    def filler(self, kinds: Tensor, length: int) -> Tensor:
        """int64 [rows, length]."""
        start = torch.randint(0, CORPUS - length, kinds.shape, device=self.device) + kinds * CORPUS
        return self._corpora[start[:, None] + torch.arange(length, device=self.device)]

    def said(self, key: Tensor) -> Tensor:
        """The statement of each key [rows, DIGITS]."""
        text = self._statement.repeat(len(key), 1)
        for at in self.mentions:
            text[:, at : at + DIGITS] = self.digits[key]
        return text

    def asked(self, key: Tensor) -> Tensor:
        """The question and its answer."""
        return torch.cat([self._question.repeat(len(key), 1), self.digits[key]], 1)


class Streams:
    """A pretrained model is treated otherwise: FAM's norm and growth count relative to the first block's in each layer;
    of the filler some tokens are modelled, as its vocabulary is large; its layers are compiled one by one, which is one
    compilation for all; and steps are replayed (``replay.py``)."""

    def __init__(self, model: FamModel, task: Task, options: Options, device: str) -> None:
        self.options, self.device, self.block, self.rows = options, device, model.config.block_size, options.rows
        self.text = Text(task, options.seed, device)
        self._step: Callable[..., tuple[Tensor, State]] = model.step
        if device == "cuda":
            torch._dynamo.config.recompile_limit = 32
            if not options.pretrained:
                self._step = torch.compile(model.step, dynamic=False)
        self.state = fresh(model, self.rows, device)
        self.key = torch.zeros(self.rows, DIGITS, dtype=torch.int64, device=device)
        self.age, self.life = torch.zeros(self.rows, device=device), torch.zeros(self.rows, device=device)
        self.forgot = torch.ones(self.rows, dtype=torch.bool, device=device)
        self.right = ~self.forgot  # what was answered last
        self.kinds = self.text.kinds(self.rows)
        self._short = torch.arange(self.rows, device=device) < self.rows * SHORT
        self._usual = dict.fromkeys((n for n in self.state if "fam" in n), 1.0)
        if options.pretrained:
            with torch.no_grad():
                _, first = model.step(self.text.filler(self.kinds, self.block), self.state, "last")
            self._usual = {n: float(rms(first[n], (0, 1, 2)).clamp(min=1.0)) for n in self._usual}
            if device == "cuda":
                lora.copy_grouped_heads()
                for layer in model.model.layers:
                    layer.compile(dynamic=False)
            self._step = Replayed(model.step, [p for p in model.parameters() if p.requires_grad], device)

    def losses(self, blocks: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Go on by some blocks. Of the result, ``answer`` and ``copy`` are cross-entropies of digits, ``language`` that
        of filler; ``norm``, ``growth`` and ``moved`` are what FAM does that a fixed point would not."""
        text, new, start = self._begin(blocks)
        begun = state = {name: leaf(past) for name, past in self.state.items()}
        fams = [name for name in state if "fam" in name]
        none = torch.zeros_like(self.age)
        said_in = torch.where(new, (start + self.text.said(self.key[:1]).shape[1] - 1) // self.block, 0)
        asked = {blocks - 1} | ({int(rng.integers(0, blocks))} if rng.random() < 0.5 else set())
        found: dict[str, list[Tensor]] = {"answer": [], "language": [], "norm": [], "moved": []}
        every, ordinary = [], False
        for k, part in enumerate(text.split(self.block, 1)):
            at = self._modelled()
            before, (logits, state) = state, self._go(part, state, at)
            if at is None:
                every.append(logits)
                logits, target = logits[:, :-1], part[:, 1:]
            else:
                target = part.gather(1, at + 1)
            found["language"].append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
            moved = sum((((state[n] - before[n]) / self._usual[n]).pow(2).mean((1, 2)) for n in fams), none)
            over = {n: (rms(state[n], -1) / self._usual[n] - 2).relu() for n in fams}
            above = sum(((bent(x) if self.options.pretrained else x * x).mean(1) for x in over.values()), none)
            found["moved"].append(mean(moved, ~new))
            found["norm"].append(above.mean())
            if k in asked:
                ordinary = rng.random() >= ACROSS
                loss, right = self._ask(state, said_in <= k, not ordinary)
                found["answer"].append(loss)
        size = {n: (rms(state[n], (1, 2)) / self._usual[n], rms(begun[n], (1, 2)) / self._usual[n]) for n in fams}
        grown = ((after - before.clamp(min=1.5)).relu() for after, before in size.values())
        result = {name: torch.stack(values).mean() for name, values in found.items() if values}
        result["growth"] = mean(sum(grown, none), ~new)
        if every:
            second = answers(torch.cat(every, 1), start + self.text.mentions[1])
            copied = F.cross_entropy(second.transpose(1, 2), self.text.digits[self.key], reduction="none").mean(1)
            result["copy"] = mean(copied, new)
        self.state = {name: past.detach() for name, past in state.items()}
        self.forgot, self.age = ~right & ordinary, self.age + blocks
        self.right = right
        return result

    def _modelled(self) -> Tensor | None:
        """The places [b, SAMPLED] of a block whose next tokens are predicted; None for all of them."""
        if not self.options.pretrained:
            return None
        return torch.randint(0, self.block - 1, (self.rows, min(SAMPLED, self.block - 1)), device=self.device)

    def _go(self, tokens: Tensor, state: State, at: Tensor | None) -> tuple[Tensor, State]:
        """One block, with the logits of the places ``at`` [b, n] or of all. Everything contiguous, or every new stride
        would be compiled again; a small model always gives all logits, or it would be compiled twice."""
        call = tokens.contiguous(), {name: past.contiguous() for name, past in state.items()}
        if self.options.pretrained:
            return self._step(*call, at)
        logits, state = self._step(*call)
        return logits if at is None else taken(logits, at), state

    def _begin(self, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Say another key in every stream whose life is over: the text with it, those rows, and where it was put."""
        new = self.forgot | (self.age >= self.life)
        self.kinds = torch.where(new, self.text.kinds(self.rows), self.kinds)
        text = self.text.filler(self.kinds, blocks * self.block)
        self.key = torch.where(new[:, None], torch.randint_like(self.key, 10), self.key)
        least = torch.where(self._short, 1.0, min(32.0, self.options.oldest / 2))
        most = torch.where(self._short, float(SHORT_LIFE), float(self.options.oldest))
        self.life = torch.where(new, least * (most / least) ** torch.rand_like(self.life), self.life)  # log-uniform
        self.age = torch.where(new, 0.0, self.age)
        said = self.text.said(self.key)
        room = min(text.shape[1], 2 * self.block) - said.shape[1]
        start = (torch.rand(self.rows, device=self.device) * room).long()
        kept = ~new | (torch.rand(self.rows, device=self.device) < PASSED_ON)
        for name, past in self.state.items():
            if "fam" in name and self.options.noise:
                noisy = (torch.rand(self.rows, device=self.device) < 0.5)[:, None, None]
                past = past + torch.where(noisy, self.options.noise * rms(past, (1, 2))[:, None, None], 0.0) * (
                    torch.randn_like(past)
                )
            self.state[name] = torch.where(kept.reshape(-1, *[1] * (past.dim() - 1)), past, past.new_zeros(()))
        return put(text, start, said, new), new, start

    def _ask(self, state: State, rows: Tensor, across: bool) -> tuple[Tensor, Tensor]:
        """Put the question to a copy of the state: cross-entropy of ``rows``, and which of all answered rightly."""
        text, key = self.text.filler(self.kinds, self.block * (1 + across)), self.key
        said, length = self.text.said(key), self.text.asked(key).shape[1]
        low, high = (self.block - length + 1, self.block) if across else (0, self.block - length + 1)
        start = torch.randint(low, high, (self.rows,), device=self.device)
        here = (torch.rand(self.rows, device=self.device) < IN_BLOCK) & (start >= said.shape[1]) & (not across)
        key = torch.where(here[:, None], torch.randint_like(key, 10), key)
        place = (torch.rand(self.rows, device=self.device) * (start - said.shape[1]).clamp(min=0)).long()
        text = put(text, place, self.text.said(key), here)
        text = put(text, start, self.text.asked(key), torch.ones_like(here))
        at = predicting(start + length - DIGITS)
        logits, target = None, self.text.digits[key]
        for k, part in enumerate(text.split(self.block, 1)):
            there, state = self._go(part, state, (at - k * self.block).clamp(0, self.block - 1))
            logits = there if logits is None else torch.where((at >= k * self.block)[..., None], there, logits)
        loss = F.cross_entropy(logits.transpose(1, 2).float(), target, reduction="none").mean(1)
        return mean(loss, rows | here), (logits.argmax(-1) == target).all(1) | here


def fresh(model: FamModel, rows: int, device: str) -> State:
    """The state of fresh streams, all zeros."""
    states = model.contract("fp32", rows).states
    return {s.name: torch.zeros(s.sized(rows), dtype=getattr(torch, s.dtype), device=device) for s in states}


def put(text: Tensor, start: Tensor, piece: Tensor, rows: Tensor) -> Tensor:
    """``piece`` [b, n] written over ``text`` [b, length] from ``start`` [b] on, in the rows that are true."""
    at = start[:, None] + torch.arange(piece.shape[1], device=text.device)
    return torch.where(rows[:, None], text.scatter(1, at, piece), text)


def answers(logits: Tensor, start: Tensor) -> Tensor:
    """The logits [b, DIGITS, V] that predict the tokens from ``start`` [b] on."""
    return taken(logits, predicting(start))


def predicting(start: Tensor) -> Tensor:
    """Where the logits stand [b, DIGITS] that predict the tokens from ``start`` [b] on."""
    return start[:, None] - 1 + torch.arange(DIGITS, device=start.device)


def taken(logits: Tensor, at: Tensor) -> Tensor:
    """The logits of the places ``at`` [b, n]."""
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))


def mean(values: Tensor, rows: Tensor) -> Tensor:
    """The mean of ``values`` [b] over the rows that are true; 0 where none is."""
    return (values * rows).sum() / rows.sum().clamp(min=1)


def rms(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    return (x.pow(2).mean(axes) + 1e-8).sqrt()


def bent(x: Tensor) -> Tensor:
    """The square up to 1, a straight line from there: nothing far off may outweigh everything else."""
    return torch.where(x < 1, x * x, 2 * x - 1)


def leaf(past: Tensor) -> Tensor:
    """Always with a gradient where it can have one: one compiled step serves first and later blocks."""
    return past.detach().requires_grad_(past.is_floating_point())


@torch.no_grad()
def recall(model: FamModel, task: Task, kind: str, length: int, count: int, seed: int, device: str) -> float:
    """The share of keys that are answered exactly, by the model in float32. The right answer is fed as it is asked for:
    an answer is exact under that if and only if it is exact when generated greedily."""
    size = model.config.block_size
    model.fold_fam()
    exam = task.exam(kind, length, count, seed, size)
    tokens, wanted = torch.from_numpy(exam.tokens).to(device), torch.from_numpy(exam.answers).to(device)
    at = torch.from_numpy(exam.places).to(device)
    state, right = fresh(model, count, device), torch.zeros_like(wanted, dtype=torch.bool)
    for k, part in enumerate(tokens.split(size, 1)):
        logits, state = model.step(part, state)
        if (k + 1) * size >= int(exam.begins.min()):
            found = logits.argmax(-1).gather(1, (at - k * size).clamp(0, size - 1))
            right |= (at // size == k) & (found == wanted)
    model.fam_init = None
    return float(right.all(1).float().mean())
