"""What a bench of the losses over the vocabulary runs: inputs, candidates on them, and the check of their
results.

A head is a function (hidden, weight, target) -> logprob and entropy, both [T], or None where it has no
entropy. All but ours take one, and add the loss of `Task.objective` to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from measure import Candidate
from torch import Tensor

from mem1_core import reference
from mem1_core.ops import fused_linear_ppo_loss, linear_logprob
from mem1_core.testing import assert_accurate

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

PPO, FORWARD, BOTH = "PPO loss, forward+backward", "log-probs, forward", "log-probs, forward+backward"
OURS = {PPO: "fused_linear_ppo_loss", FORWARD: "linear_logprob", BOTH: "linear_logprob"}
RECOMPUTED = "linear_logprob, then the loss"
EAGER, COMPILED = "eager", "torch.compile"
TRL, LIGER, CCE = "TRL chunked log-probs", "Liger scaled cross-entropy", "cut cross-entropy"
BARE = "the matrix products alone"

PEER_FACTOR = 8  # of eager's error: a peer may round more often (sums in bf16), it may not be wrong
EXACT_ROWS = 128  # that the fp64 reference computes at a time


class Shape(NamedTuple):
    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype


# --- heads --------------------------------------------------------------------------------------------------


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it: the product in the dtype of the model, the rest in fp32."""
    every = (hidden @ weight.T).float().log_softmax(-1)
    return every.gather(1, target[:, None])[:, 0], -(every.exp() * every).sum(-1)


def trl(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What its GRPO trainer calls (1.16): pieces of the vocabulary, 32,768 wide as there."""
    function = import_module("trl.kernels").ChunkedLogProbFunction
    logprob, entropy, *_ = function.apply(
        hidden, weight, None, target, 1.0, 32_768, None, 1.0, ("log_probs", "entropy")
    )
    return logprob, entropy


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel of its own on sm_90, elsewhere plain PyTorch in chunks of 512 tokens."""
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    loss, entropy = function.apply(hidden, weight, target, return_entropy=True)
    return -loss, entropy


def cce(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, None]:
    """No entropy. Nothing is filtered: by default it leaves out gradients below 2^-12, which is the whole
    softmax of a policy that is not sure."""
    implementation = {"impl": "cce", "filter_eps": None} if hidden.is_cuda else {"impl": "torch_compile"}
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return -function(hidden, weight, target, reduction="none", **implementation), None


class Task:
    """One of PPO, FORWARD and BOTH over random inputs. A call returns [logprob, entropy] without gradients,
    else [loss, d_hidden, d_weight].
    """

    clip, entropy_coef = 0.2, 0.01

    def __init__(self, work: str, shape: Shape, device: str, measuring: bool) -> None:
        self.work, self.shape, self.device, self.measuring = work, shape, device, measuring
        generator = torch.Generator(device).manual_seed(0)
        tokens, width, vocabulary, dtype = shape

        def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        self.hidden = draw(tokens, width, dtype=dtype)
        self.weight = draw(vocabulary, width, dtype=dtype).mul_(width**-0.5)  # logits of variance 1
        self.target = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        self.inputs = self.hidden, self.weight, self.target
        # Log-ratios on both sides of the clip, as far from it as rounding does not reach.
        ratios = torch.tensor([-0.5, -0.1, 0.1, 0.4], device=device)
        with torch.no_grad():
            self.old_logprob = eager(*self.inputs)[0] - ratios[torch.arange(tokens, device=device) % 4]
        self.advantage = draw(tokens)
        self.factors = draw(2, tokens)  # of log-prob and entropy, in BOTH
        self.loss_mask = torch.ones(tokens, dtype=torch.bool, device=device)
        # Rows of the weight whose gradient is checked: of tokens that were taken, and others.
        others = torch.randint(vocabulary, (256,), generator=generator, device=device)
        self.sample = torch.cat([self.target[:256], others])
        self._expected: dict[bool, list[tuple[str, Tensor, Tensor]]] = {}
        if work != FORWARD:
            self.hidden.requires_grad_()
            self.weight.requires_grad_()

    @property
    def flops(self) -> float:
        products = 1 if self.work == FORWARD else 3
        return 2.0 * products * self.shape.tokens * self.shape.width * self.shape.vocabulary

    @property
    def gradient_bytes(self) -> int:
        """Of d_hidden and d_weight, which everybody returns."""
        if self.work == FORWARD:
            return 0
        return sum(x.numel() * x.element_size() for x in (self.hidden, self.weight))

    def title(self) -> str:
        tokens, width, vocabulary, dtype = self.shape
        where = "" if self.device == "cpu" else f" on {self.device}"
        return (
            f"{self.work}{where}, {str(dtype).removeprefix('torch.')}, T {tokens:,}, H {width:,}, "
            f"V {vocabulary:,}"
        )

    # --- candidates -----------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Ours first."""
        candidates = [Candidate(OURS[self.work], self._ours, self._check)]
        if self.work == PPO:
            candidates.append(self._with(RECOMPUTED, linear_logprob))
        candidates.append(self._with(EAGER, eager, peer=True))
        if self.measuring:  # these two compile for many seconds
            candidates.append(Candidate(COMPILED, self._compiled(), self._check, peer=True))
            note = "without the entropy" + (
                ", its implementation for the CPU" if self.device == "cpu" else ""
            )
            candidates.append(self._with(CCE, cce, note, peer=True))
        return [
            *candidates,
            self._with(TRL, trl, peer=True),
            self._with(LIGER, liger, peer=True),
            Candidate(BARE, self._products, note="another function: a floor only"),
        ]

    def _with(self, name: str, head: Head, note: str = "", peer: bool = False) -> Candidate:
        check = partial(self._check, entropy=head is not cce, factor=PEER_FACTOR if peer else 2)
        return Candidate(name, partial(self._run, head), check, note=note, peer=peer)

    def _run(self, head: Head) -> list[Tensor]:
        logprob, entropy = head(*self.inputs)
        if self.work == FORWARD:
            return [logprob] if entropy is None else [logprob, entropy]
        return self._gradients(self.objective(logprob, entropy))

    def _ours(self) -> list[Tensor]:
        if self.work != PPO:
            return self._run(linear_logprob)
        given = self.old_logprob, self.advantage, self.loss_mask
        clip, bonus = self.clip, self.entropy_coef
        loss, _ = fused_linear_ppo_loss(
            *self.inputs, *given, clip_low=clip, clip_high=clip, entropy_coef=bonus
        )
        return self._gradients(loss)

    def _compiled(self) -> Callable[[], list[Tensor]]:
        """Loss and head as one graph."""
        compiled: Any = torch.compile(
            eager if self.work == FORWARD else lambda *inputs: self.objective(*eager(*inputs)),
            dynamic=False,
            fullgraph=True,
        )
        if self.work == FORWARD:
            return lambda: list(compiled(*self.inputs))
        return lambda: self._gradients(compiled(*self.inputs))

    def _products(self) -> list[Tensor]:
        """Logits, d_hidden and d_weight, as if nothing were between them."""
        with torch.no_grad():
            logits = self.hidden @ self.weight.T
            return [logits] if self.work == FORWARD else [logits @ self.weight, logits.T @ self.hidden]

    def objective(self, logprob: Tensor, entropy: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """The loss of some rows, divided by the number of all: what PPO does with log-probs, or in BOTH just
        some weighted sum. Without the entropy its term is left out.
        """
        old, advantage, factors = (
            x[..., rows].to(logprob.dtype) for x in (self.old_logprob, self.advantage, self.factors)
        )
        if self.work == BOTH:
            loss, coefficients = factors[0] * logprob, factors[1]
        else:
            ratio = (logprob - old).clamp(-20, 20).exp()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            loss, coefficients = torch.maximum(-advantage * ratio, -advantage * clipped), -self.entropy_coef
        if entropy is not None:
            loss = loss + coefficients * entropy
        return loss.sum() / self.shape.tokens

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))]

    # --- checks ---------------------------------------------------------------------------------------------

    def _check(self, results: list[Tensor], entropy: bool = True, factor: float = 2) -> None:
        """Against fp64, by the error that eager code makes."""
        if entropy not in self._expected:
            yardstick = self._sampled(self._run(eager if entropy else _without_entropy))
            expected = zip(self._names(entropy), yardstick, self._exact(entropy), strict=True)
            self._expected[entropy] = list(expected)
        for got, (name, plain, exact) in zip(self._sampled(results), self._expected[entropy], strict=True):
            atol = None
            if (
                name == "loss"
            ):  # a mean of terms of size 1 that cancel: neither it nor eager's error is a scale
                sums = torch.promote_types(self.shape.dtype, torch.float32)
                atol = 0.5 * torch.finfo(self.shape.dtype).eps + 16 * torch.finfo(sums).eps
            assert_accurate(got, plain.to(got.dtype), exact, factor, atol, name)

    def _names(self, entropy: bool) -> list[str]:
        if self.work == FORWARD:
            return ["logprob", "entropy"] if entropy else ["logprob"]
        return ["loss", "d_hidden", "d_weight"]

    def _sampled(self, results: list[Tensor]) -> list[Tensor]:
        return results if self.work == FORWARD else [*results[:2], results[2][self.sample]]

    def _exact(self, entropy: bool) -> list[Tensor]:
        """In fp64, of some rows at a time: those of all would not fit on a device."""
        weight = self.weight.detach().double().requires_grad_(self.work != FORWARD)
        parts = []
        for begin in range(0, self.shape.tokens, EXACT_ROWS):
            rows = slice(begin, begin + EXACT_ROWS)
            hidden = self.hidden.detach()[rows].double().requires_grad_(self.work != FORWARD)
            found = reference.linear_logprob(hidden, weight, self.target[rows])
            if self.work == FORWARD:
                parts.append(found if entropy else found[:1])
                continue
            loss = self.objective(found[0], found[1] if entropy else None, rows)
            d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
            parts.append((loss.detach()[None], d_hidden, d_weight[None, self.sample]))
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        if self.work == FORWARD:
            return columns
        loss, d_hidden, d_weight = columns
        return [loss.sum(), d_hidden, d_weight.sum(0)]


def _without_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, None]:
    return eager(hidden, weight, target)[0], None
