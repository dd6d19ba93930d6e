"""linear_logprob: log-probs and entropies from hidden states, without a [T, V] tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mem1_core import _library, reference
from mem1_core._head import Head, check_head, check_targets
from mem1_core.backend import choose_backend

AVAILABLE = ("cpu", *(["cuda"] if _library.cuda_architectures() else []), "reference")
WORKSPACE_BYTES = {"cpu": 192 * 2**20, "cuda": 512 * 2**20}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of `target` and entropy of the policy, row by row. Differentiable in hidden, weight,
    bias.

    .. math:: p = \operatorname{softmax}(z / \tau), \quad z = \text{hidden} W^\top + b, \quad
              \text{logprob} = \log p_{\text{target}}, \quad \text{entropy} = -\sum_v p_v \log p_v

    Logits exist for some rows at a time, in fp32 whatever the dtype of the inputs: matrix products by the
    vendor's library, one row kernel for the rest. The backward makes them once more (8 T H V FLOPs in all,
    where `fused_linear_ppo_loss` takes 6).

    Args:
        hidden: [T, H], float32, bfloat16, float16 or float64.
        weight: [V, H], of the same dtype.
        target: integers [T], below V.
        temperature: a number > 0 or a tensor [T] or []; it gets no gradient.
        bias: [V], of the same dtype. -inf rules a token out.
        workspace_bytes: of the logits; 192 MiB on the CPU, 512 MiB on CUDA when None. At least one row is
            computed at a time.
        backend: see `mem1_core.backend`. "cuda" is there if the package was built with nvcc.

    Returns:
        logprob and entropy, [T], float32 (float64 for float64). A row of nothing but -inf has logprob -inf,
        entropy 0 and gradient 0.

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it. (On CUDA a target that
            is out of range makes its row NaN.)
        NotImplementedError: no such backend for this device.

    Equivalent to:
        >>> logprobs = ((hidden.float() @ weight.float().T + bias) / temperature[:, None]).log_softmax(-1)
        >>> logprob = logprobs.gather(1, target[:, None])[:, 0]
        >>> entropy = -(logprobs.exp() * logprobs).sum(-1)
    """
    heat = check_head(hidden, weight, bias, target, temperature)
    chosen = choose_backend("linear_logprob", hidden, backend, AVAILABLE)
    if chosen == "reference":
        return reference.linear_logprob(hidden, weight, target, heat, bias)
    space = workspace(workspace_bytes, hidden)
    logprob, entropy, *_ = _library.ops.linear_logprob(hidden, weight, bias, target.long(), heat, space)
    return logprob, entropy


def workspace(workspace_bytes: int | None, hidden: Tensor) -> int:
    """The bytes of the logits of a chunk: the argument, checked, or the default of the device."""
    if workspace_bytes is None:
        return WORKSPACE_BYTES[hidden.device.type]
    if not isinstance(workspace_bytes, int) or workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: wanted an integer >= 1 or None, got {workspace_bytes!r}")
    return workspace_bytes


torch.library.define(
    "mem1_core::linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor temperature, int workspace_bytes) -> "
    "(Tensor logprob, Tensor entropy, Tensor top, Tensor log_mass)",
)
torch.library.define(
    "mem1_core::linear_logprob_backward",
    "(Tensor d_logprob, Tensor d_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor temperature, Tensor top, Tensor log_mass, Tensor entropy, int workspace_bytes, bool[] wanted) -> "
    "(Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


@torch.library.impl("mem1_core::linear_logprob", ("cpu", "cuda"))
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, space: int
) -> tuple[Tensor, ...]:
    check_targets(target, weight.shape[0])
    head = Head(hidden, weight, bias, None, space)
    out = temperature.new_empty(4, head.count)
    for part in head.chunks():
        given = head.logits(part), head.bias, target[part].contiguous(), temperature[part].contiguous()
        out[:, part] = _library.on_current_stream(_library.ops._rows_logprob, hidden.device, *given)
    return tuple(x.clone() for x in out)  # an op's results may not share memory


@torch.library.impl("mem1_core::linear_logprob_backward", ("cpu", "cuda"))
def _(
    d_logprob: Tensor,
    d_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    top: Tensor,
    log_mass: Tensor,
    entropy: Tensor,
    space: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, bias, None, space, (wanted[0], wanted[1], wanted[2]))
    for part in head.chunks():
        of_rows = (
            x[part].contiguous() for x in (target, temperature, top, log_mass, entropy, d_logprob, d_entropy)
        )
        given = logits, *_ = head.logits(part), head.bias, *of_rows, head.gradient_dtype
        _library.on_current_stream(_library.ops._rows_backward_, hidden.device, *given)
        head.add_gradient(part, logits)
    return head.gradients()


@torch.library.register_fake("mem1_core::linear_logprob")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, heat: Tensor, space: int) -> Any:
    return tuple(heat.new_empty(len(hidden)) for _ in range(4))


def fake_gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> tuple[Tensor, ...]:
    nothing = inputs[0].new_empty(0) if inputs[0] is not None else torch.empty(0)
    return tuple(
        x.new_empty(x.shape) if x is not None and want else nothing.clone()
        for x, want in zip(inputs, wanted, strict=True)
    )


@torch.library.register_fake("mem1_core::linear_logprob_backward")
def _(d_logprob: Tensor, d_entropy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(rest[:3], rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.space = inputs
    _, entropy, top, log_mass = output
    ctx.mark_non_differentiable(top, log_mass)
    ctx.save_for_backward(*tensors, top, log_mass, entropy)


def _backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    given = d_logprob, d_entropy, *ctx.saved_tensors, ctx.space, wanted
    gradients = _library.ops.linear_logprob_backward(*given)
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), None, None, None


def no_second_derivative(name: str, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        f"{name}: has no second derivative; backend='reference' is differentiable twice"
    )


torch.library.register_autograd("mem1_core::linear_logprob", _backward, setup_context=_setup)
torch.library.register_autograd(
    "mem1_core::linear_logprob_backward", partial(no_second_derivative, "linear_logprob")
)
