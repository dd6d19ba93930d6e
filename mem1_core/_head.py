"""The output layer in chunks: logits of some rows at a time, in fp32 (fp64), and their gradients.

Matrix products are the vendor's. On the CPU they are oneDNN's block products (csrc/torch/linear_cpu.cpp),
which widen half precision as they read it, or MKL's where those are clearly faster (`_products`); on CUDA
the tensor cores multiply it as it is and keep fp32 sums.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mem1_core._products import by_blocks
from mem1_core.backend import describe

_ALIGNED = 16  # rows of a chunk, and bytes of a row of logits: what vector loads and matrix products like
RowKind = Literal["a bool", "an integer", "a floating point"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ChunkedLMHead:
    """logits = hidden @ weight.T + bias for chosen rows of hidden; with a soft cap, cap * tanh(that / cap).

    hidden [T, H], weight [V, H] and bias [V] of one dtype; rows int64 [n]: those to compute, None for all
    (which saves copies). The logits of a chunk take at most `workspace_bytes`, in `workspace`. The expected
    gradients are summed up over the chunks: `d_hidden` (as hidden), `d_weight` and `d_bias`, the latter two
    in fp32 until `gradients` hands them out (on the CPU a single chunk's d_weight is what it will be).

    softcap: 0 is none. rows_bias: what the logits of `logits` lack, the bias unless a soft cap is over it.

    kept: the workspace of an earlier head of the same sizes, whose last logits were those of the first chunk.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        workspace_bytes: int,
        needs_grad: tuple[bool, bool, bool] = (False, False, False),
        kept: Tensor | None = None,
        softcap: float = 0.0,
    ) -> None:
        on_cpu = hidden.device.type == "cpu"
        self.hidden, self.weight, self.rows = hidden, weight.contiguous() if on_cpu else weight, rows
        self.count = len(hidden) if rows is None else len(rows)
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.softcap, self._bias = softcap, None if bias is None else bias.to(self.dtype).contiguous()
        self.rows_bias = None if softcap else self._bias
        # What the matrix products of the backward read: where they can, in the dtype of the weight.
        narrow = hidden.dtype == torch.bfloat16 and torch.ops.mem1_core._linear_in_bfloat16()
        self.gradient_dtype = self.dtype if on_cpu and not narrow else hidden.dtype
        want_hidden, want_weight, want_bias = needs_grad
        self.d_hidden = hidden.new_zeros(hidden.shape) if want_hidden else None
        self.d_bias = weight.new_zeros(weight.shape[0], dtype=self.dtype) if want_bias else None
        self._fresh = True
        shape = workspace_shape(self.count, weight, workspace_bytes)
        self.workspace = weight.new_empty(shape, dtype=self.dtype) if kept is None else kept
        self._made = kept is not None  # the logits of the first chunk
        # fp64, for gradcheck, takes torch.mm; half precision would have to be widened for it.
        self.by_blocks = on_cpu and self.dtype == torch.float32
        if self.by_blocks and weight.dtype == torch.float32:
            self.by_blocks = by_blocks(hidden, self.weight, len(self.workspace))
        # Blocks narrow what they have summed up themselves, unless other chunks will add to it.
        narrowed = self.by_blocks and len(self.workspace) == self.count > 0
        summed = weight.dtype if narrowed else self.dtype
        self.d_weight = weight.new_empty(weight.shape, dtype=summed) if want_weight else None

    def chunks(self) -> list[slice]:
        """Places in `rows` of each chunk; where one begins does not depend on how many rows there are."""
        chunk = max(len(self.workspace), 1)
        return [slice(begin, min(begin + chunk, self.count)) for begin in range(0, self.count, chunk)]

    def logits(self, part: slice) -> Tensor:
        """fp32 (fp64) [rows of the chunk, V], without `rows_bias`; in the workspace, which the next call
        overwrites.
        """
        self._hidden = (self.hidden[part] if self.rows is None else self.hidden[self.rows[part]]).contiguous()
        out = self.workspace[: len(self._hidden), : self.weight.shape[0]]
        if self._made:
            self._made = False
            return out
        if self.by_blocks:
            torch.ops.mem1_core._linear_logits_(self._hidden, self.weight, out)
        elif self.hidden.dtype != self.dtype:
            torch.mm(self._hidden, self.weight.T, out_dtype=self.dtype, out=out)
        else:
            torch.mm(self._hidden, self.weight.T, out=out)
        if self.softcap:
            out = out if self._bias is None else out.add_(self._bias)
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def add_gradient(self, part: slice, logits: Tensor) -> None:
        """Gradients have taken the place of the chunk's `logits`, in `gradient_dtype`."""
        d_logits = logits
        if self.gradient_dtype != self.dtype:  # from the same address of each row on
            d_logits = logits.view(self.gradient_dtype)[:, : logits.shape[1]]
        if self.d_hidden is not None:
            if self.rows is None:
                self._backward(d_logits, self.d_hidden[part])
            else:
                own = torch.empty_like(self._hidden)
                self._backward(d_logits, own)
                self.d_hidden.index_copy_(0, self.rows[part], own)
        if self.d_weight is not None:
            self._add_to_weight(d_logits, self.d_weight)
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=self.dtype)
        self._fresh = False

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight and d_bias in the dtypes of their tensors; empty where not expected."""
        d_hidden, d_weight, d_bias = (
            self.hidden.new_empty(0) if x is None else x for x in (self.d_hidden, self.d_weight, self.d_bias)
        )
        if self._fresh and self.d_weight is not None:
            d_weight.zero_()
        del self.workspace
        return d_hidden, _narrowed(d_weight, self.weight.dtype), d_bias.to(self.weight.dtype)

    def _backward(self, d_logits: Tensor, out: Tensor) -> None:
        if self.by_blocks:
            torch.ops.mem1_core._linear_hidden_gradient_(d_logits, self.weight, out)
        else:
            torch.mm(d_logits, self.weight, out=out)  # with out= autocast changes nothing

    def _add_to_weight(self, d_logits: Tensor, d_weight: Tensor) -> None:
        hidden, rows = self._hidden, d_logits.T
        if self.by_blocks:
            torch.ops.mem1_core._linear_weight_gradient_(d_logits, hidden, d_weight, not self._fresh)
        elif self.gradient_dtype == self.dtype:
            torch.addmm(d_weight, rows, hidden, beta=0 if self._fresh else 1, out=d_weight)
        elif self._fresh:
            torch.mm(rows, hidden, out_dtype=self.dtype, out=d_weight)
        else:
            torch.addmm(d_weight, rows, hidden, out_dtype=self.dtype, out=d_weight)


def workspace_shape(rows: int, weight: Tensor, workspace_bytes: int) -> tuple[int, int]:
    """Of the logits of a chunk, for that many rows in all. Chunks are whole multiples of 16 rows where 16
    fit, and a row begins where vector loads like it.
    """
    element = torch.promote_types(weight.dtype, torch.float32).itemsize
    columns = -(-weight.shape[0] * element // _ALIGNED) * _ALIGNED // element
    fitting = workspace_bytes // (columns * element)
    return torch.sym_min(rows, max(fitting // _ALIGNED * _ALIGNED, min(fitting, _ALIGNED), 1)), columns


def _narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`wide` [n, ..] in a dtype of half its size, at the same address, so that nothing is allocated.

    Rows [a, 2 a) come to lie where the rows [a / 2, a) have been read: they overlap no source of their own.
    The storage stays as large as it was.
    """
    if wide.dtype == dtype:
        return wide
    narrow = wide.view(-1).view(dtype)[: wide.numel()].view(wide.shape)
    narrow[:1] = wide[:1].to(dtype)  # a copy, as this one does overlap itself
    begin = 1
    while begin < len(wide):
        narrow[begin : 2 * begin].copy_(wide[begin : 2 * begin])
        begin *= 2
    return narrow


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float | Tensor
) -> Tensor:
    """Raise TypeError or ValueError, naming the argument, for what is no output layer; else the temperature
    of each row, [T] in the dtype of the logits.
    """
    for name, x, dims in (("hidden", hidden, "T, H"), ("weight", weight, "V, H"), ("bias", bias, "V")):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor) or x.dim() != len(dims.split(", ")) or x.dtype not in _DTYPES:
            raise TypeError(
                f"{name}: expected a float32, bfloat16, float16 or float64 tensor [{dims}], got {describe(x)}"
            )
        if x.dtype != hidden.dtype or x.device != hidden.device:
            raise ValueError(
                f"{name}: expected dtype and device of hidden, {hidden.dtype} on {hidden.device}, got "
                f"{x.dtype} on {x.device}"
            )
    tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    if weight.shape[1] != width or width == 0 or vocabulary == 0:
        raise ValueError(f"weight: expected [V, {width}] with V and {width} >= 1, got {list(weight.shape)}")
    if bias is not None and len(bias) != vocabulary:
        raise ValueError(f"bias: expected [{vocabulary}], got {list(bias.shape)}")
    check_rows("target", target, hidden, "an integer")
    if isinstance(temperature, Tensor):
        if temperature.dim():
            check_rows("temperature", temperature, hidden)
    elif not isinstance(temperature, (int, float)) or not temperature > 0 or temperature == float("inf"):
        raise ValueError(
            f"temperature: expected a finite number > 0 or a tensor [{tokens}], got {temperature!r}"
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        return temperature.detach().to(hidden.device, dtype).expand(tokens)
    return hidden.new_full((), temperature, dtype=dtype).expand(tokens)


def check_rows(name: str, x: Tensor, hidden: Tensor, kind: RowKind = "a floating point") -> None:
    """Raise TypeError or ValueError unless `x` is a tensor [T] of that kind on the device of hidden."""
    fits = (
        isinstance(x, Tensor)
        and {
            "a bool": x.dtype == torch.bool,
            "an integer": not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool),
            "a floating point": x.is_floating_point(),
        }[kind]
    )
    if not fits:
        raise TypeError(f"{name}: expected {kind} tensor [{len(hidden)}], got {describe(x)}")
    if x.shape != hidden.shape[:1]:
        raise ValueError(f"{name}: expected [{len(hidden)}], one for each row of hidden, got {list(x.shape)}")
    if x.device != hidden.device:
        raise ValueError(f"{name}: expected the device of hidden, {hidden.device}, got {x.device}")


def check_targets(target: Tensor, vocabulary: int, rows: Tensor | None = None) -> None:
    """ValueError for the first target, of those at `rows`, that is out of range; on the CPU, where looking
    costs nothing.
    """
    if target.device.type != "cpu":
        return
    bad = (target < 0) | (target >= vocabulary)
    if rows is not None:
        bad &= torch.zeros_like(bad).index_fill(0, rows, True)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f"target[{i}]: expected 0 to {vocabulary - 1}, got {int(target[i])}")


def check_normalizer(normalizer: float | Tensor | None, device: torch.device) -> None:
    """Raise ValueError unless it is None, a number > 0 or a tensor [] on `device`."""
    if isinstance(normalizer, Tensor):
        if normalizer.dim() or normalizer.device != device:
            raise ValueError(
                f"normalizer: expected a number or a tensor [] on {device}, got {describe(normalizer)} on "
                f"{normalizer.device}"
            )
    elif normalizer is not None and not (isinstance(normalizer, (int, float)) and normalizer > 0):
        raise ValueError(f"normalizer: expected a number > 0 or a tensor [], got {normalizer!r}")
