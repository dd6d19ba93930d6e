"""linear_logprob: log-probs and entropies from hidden states, without a [T, V] tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mem1_core import _library, reference
from mem1_core._head import ChunkedLMHead, check_head, check_targets, workspace_shape
from mem1_core.backend import check_softcap, check_whole, choose_backend

AVAILABLE = ("cpu", *(["cuda"] if _library.cuda_architectures() else []), "reference")
WORKSPACE_BYTES = 512 * 2**20


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of `target` and entropy of the policy, row by row. Differentiable in hidden, weight,
    bias.

    .. math:: p = \operatorname{softmax}(z / \tau), \quad z = \text{hidden} W^\top + b, \quad
              \text{logprob} = \log p_{\text{target}}, \quad \text{entropy} = -\sum_v p_v \log p_v

    Logits exist for some rows at a time, in fp32 whatever the dtype of the inputs: matrix products by the
    vendor's library, one row kernel for the rest. If there will be a backward, those of the first rows, as
    many as `workspace_bytes` holds, are kept for it, which then makes the gradients in their place; the
    others it makes once more. So forward and backward take 6 T H V FLOPs where all logits fit and at most 8
    (6 in `fused_linear_ppo_loss`, which keeps none). A backward that leaves the graph for another one
    (`retain_graph`), or is compiled, works on a copy.

    Args:
        hidden: [T, H], float32, bfloat16, float16 or float64.
        weight: [V, H], of the same dtype.
        target: integers [T], below V.
        temperature: a number > 0 or a tensor [T] or []; it gets no gradient.
        bias: [V], of the same dtype. -inf rules a token out.
        softcap: a number > 0: z becomes `softcap * tanh(z / softcap)` (Gemma 2, arXiv 2408.00118), also where
            the bias is -inf.
        workspace_bytes: of the logits, also of those that are kept; 512 MiB when None. At least one row is
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
        >>> logits = hidden.float() @ weight.float().T + bias
        >>> logits = softcap * torch.tanh(logits / softcap)  # with a soft cap
        >>> logprobs = (logits / temperature[:, None]).log_softmax(-1)
        >>> logprob = logprobs.gather(1, target[:, None])[:, 0]
        >>> entropy = -(logprobs.exp() * logprobs).sum(-1)
    """
    check_whole(hidden=hidden, weight=weight, bias=bias, target=target, temperature=temperature)
    temperatures = check_head(hidden, weight, bias, target, temperature)
    cap = check_softcap(softcap)
    chosen = choose_backend("linear_logprob", hidden, backend, AVAILABLE)
    if chosen == "reference":
        return reference.linear_logprob(hidden, weight, target, temperatures, bias, softcap)
    space = workspace(workspace_bytes, WORKSPACE_BYTES)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    logprob, entropy, *_ = _library.ops.linear_logprob(
        hidden, weight, bias, target.long(), temperatures, cap, space, keep, True
    )
    return logprob, entropy


def workspace(workspace_bytes: int | None, default: int) -> int:
    """The bytes of the logits of a chunk: the argument, checked, or the default."""
    if workspace_bytes is None:
        return default
    if not isinstance(workspace_bytes, int) or workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: expected an integer >= 1 or None, got {workspace_bytes!r}")
    return workspace_bytes


# With `overwrite` the backward may make its gradients in `kept`: nobody else may then read it.
torch.library.define(
    "mem1_core::linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor temperature, float softcap, "
    "int workspace_bytes, bool keep, bool overwrite) -> "
    "(Tensor logprob, Tensor entropy, Tensor max_logit, Tensor log_sum_exp, Tensor kept)",
)
torch.library.define(
    "mem1_core::linear_logprob_backward",
    "(Tensor d_logprob, Tensor d_entropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor temperature, Tensor max_logit, Tensor log_sum_exp, Tensor entropy, Tensor kept, "
    "float softcap, int workspace_bytes, bool[] needs_grad) -> "
    "(Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


@torch.library.impl("mem1_core::linear_logprob", ("cpu", "cuda"))
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    space: int,
    keep: bool,
    overwrite: bool,
) -> tuple[Tensor, ...]:
    check_targets(target, weight.shape[0])
    head = ChunkedLMHead(hidden, weight, bias, None, space, softcap=softcap)
    out = temperature.new_empty(4, head.count)
    for part in reversed(head.chunks()):  # the first, which is a whole one, stays in the workspace
        given = head.logits(part), head.rows_bias, target[part].contiguous(), temperature[part].contiguous()
        out[:, part] = _library.on_current_stream(_library.ops._rows_logprob, hidden.device, *given)
    kept = head.workspace if keep else temperature.new_empty(0, head.workspace.shape[1])
    kept[:, weight.shape[0] :] = 0  # an op's results are never uninitialised,
    return *(x.clone() for x in out), kept  # and may not share memory


def _gradients(
    d_logprob: Tensor,
    d_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    max_logit: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    kept: Tensor,
    softcap: float,
    space: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias. Of the logits in `kept` nothing is left."""
    given = needs_grad[0], needs_grad[1], needs_grad[2]
    head = ChunkedLMHead(hidden, weight, bias, None, space, given, kept if len(kept) else None, softcap)
    for part in head.chunks():
        of_rows = (
            x[part].contiguous()
            for x in (target, temperature, max_logit, log_sum_exp, entropy, d_logprob, d_entropy)
        )
        logits = head.logits(part)
        arguments = logits, head.rows_bias, *of_rows, head.gradient_dtype, softcap
        _library.on_current_stream(_library.ops._rows_backward_, hidden.device, *arguments)
        head.add_gradient(part, logits)
    return head.gradients()


@torch.library.impl("mem1_core::linear_logprob_backward", ("cpu", "cuda"))
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, kept, softcap, space, needs_grad = given
    arguments: list[Any] = [*tensors, kept.clone(), softcap, space, needs_grad]
    return _gradients(*arguments)


@torch.library.register_fake("mem1_core::linear_logprob")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperatures: Tensor, *rest: Any
) -> Any:
    _, space, keep, _ = rest
    rows, columns = workspace_shape(len(hidden), weight, space)
    kept = temperatures.new_empty(rows if keep else 0, columns)
    return *(temperatures.new_empty(len(hidden)) for _ in range(4)), kept


def fake_gradients(inputs: tuple[Tensor | None, ...], needs_grad: list[bool]) -> tuple[Tensor, ...]:
    nothing = inputs[0].new_empty(0) if inputs[0] is not None else torch.empty(0)
    return tuple(
        x.new_empty(x.shape) if x is not None and want else nothing.clone()
        for x, want in zip(inputs, needs_grad, strict=True)
    )


@torch.library.register_fake("mem1_core::linear_logprob_backward")
def _(d_logprob: Tensor, d_entropy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(rest[:3], rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softcap, ctx.space, _, ctx.overwrite = inputs
    _, entropy, max_logit, log_sum_exp, kept = output
    ctx.mark_non_differentiable(max_logit, log_sum_exp, kept)
    ctx.save_for_backward(*tensors, max_logit, log_sum_exp, entropy, kept)
    ctx.set_materialize_grads(False)  # those of `kept` would be as large as the logits


def _backward(
    ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, *unused: None
) -> tuple[Tensor | None, ...]:
    needs_grad = list(ctx.needs_input_grad[:3])
    saved = ctx.saved_tensors  # once: where they are checkpoints or hooks, each reading is paid for
    entropy = saved[-2]
    d_logprob, d_entropy = (torch.zeros_like(entropy) if d is None else d for d in (d_logprob, d_entropy))
    in_place = ctx.overwrite and last_backward(d_logprob) and not torch.is_grad_enabled()
    backward: Any = _gradients if in_place else _library.ops.linear_logprob_backward
    made = backward(d_logprob, d_entropy, *saved, ctx.softcap, ctx.space, needs_grad)
    return *(x if want else None for x, want in zip(made, needs_grad, strict=True)), *(None,) * 6


def last_backward(gradient: Tensor) -> bool:
    """Whether what the forward has saved may be overwritten: in a backward that is no trace, and after which
    the graph is gone.
    """
    return type(gradient) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


def no_second_derivative(name: str, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        f"{name}: has no second derivative; backend='reference' is differentiable twice"
    )


torch.library.register_autograd("mem1_core::linear_logprob", _backward, setup_context=_setup)
torch.library.register_autograd(
    "mem1_core::linear_logprob_backward", partial(no_second_derivative, "linear_logprob")
)
