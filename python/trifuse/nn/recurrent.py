"""What the recurrent modules over ``linear_scan`` share: the interface of ``torch.nn.GRU``."""

from __future__ import annotations

import numbers
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trifuse.ops import _checks as check

__all__ = ["Cell", "Recurrent", "at_least_float32"]


def at_least_float32(x: Tensor) -> Tensor:
    """Decays close to one are not for half precision: 0.999 in bfloat16 is 1."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Cell(nn.Module):
    """One layer in one direction. Subclasses have ``forward(x, h_0, reverse, cu_seqlens) -> (output, h_n)`` with
    x ``(B, T, input_size)``, output ``(B, T, hidden_size)`` in x's dtype, and states ``(B, hidden_size)``, or
    ``(S, hidden_size)`` with ``cu_seqlens``."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any, **options: Any) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size


class Recurrent(nn.Module):
    """Layers and directions of a cell. The arguments and shapes are those of ``torch.nn.GRU``."""

    cell: type[Cell]
    complex_state = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{self._name}: {name} is {size!r}; it must be an int")
            if size < 1:
                raise ValueError(f"{self._name}: {name} is {size}; it must be at least 1")
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Number) or not 0 <= dropout <= 1:
            raise ValueError(f"{self._name}: dropout is {dropout!r}; it must be a probability between 0 and 1")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"{self._name}: dropout is {dropout} and num_layers 1; it acts between layers, so not at all",
                stacklevel=2,
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bool(bias), bool(batch_first), float(dropout)
        self.bidirectional = bool(bidirectional)
        directions = 2 if bidirectional else 1
        sizes = [input_size] + [directions * hidden_size] * (num_layers - 1)
        self.cells = nn.ModuleList(
            self.cell(size, hidden_size, self.bias, device, dtype, **options)
            for size in sizes
            for _ in range(directions)
        )

    @property
    def _name(self) -> str:
        return type(self).__name__

    def flatten_parameters(self) -> None:
        """Nothing to do: here for code written for ``torch.nn.GRU``."""

    def forward(self, input: Tensor | PackedSequence, h_0: Tensor | None = None) -> tuple[Any, Tensor]:
        """Run over whole sequences.

        Args:
            input: ``(T, B, input_size)``, ``(B, T, input_size)`` with ``batch_first``, ``(T, input_size)``
                for one sequence without a batch, or a ``PackedSequence``.
            h_0: ``(directions * num_layers, B, hidden_size)`` (without the batch for an unbatched input): the
                state to start from, zero if None; the ``h_n`` of a call before.

        Returns:
            ``(output, h_n)``: the last layer's outputs of all steps, ``directions * hidden_size`` wide, in the
            form and dtype of the input; and the last states of every layer and direction, in the order and
            shape of ``h_0``, in at least float32.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, h_0)
        check.tensors(self._name, input=input)
        form = "(B, T, input_size)" if self.batch_first else "(T, B, input_size)"
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{self._name}: input has shape {tuple(input.shape)}; it must be {form}, or (T, input_size)"
            )
        if input.shape[-1] != self.input_size:
            was = tuple(input.shape)
            raise ValueError(f"{self._name}: input has shape {was}; its last size must be {self.input_size}")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0)
        if batched and not self.batch_first:
            x = x.transpose(0, 1)
        self._check_state(h_0, x.shape[0] if batched else None)
        if h_0 is not None and not batched:
            h_0 = h_0.unsqueeze(1)
        output, h_n = self._layers(x, h_0, None)
        if not batched:
            return output.squeeze(0), h_n.squeeze(1)
        return (output if self.batch_first else output.transpose(0, 1)), h_n

    def _layers(self, x: Tensor, h_0: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        directions, states = 2 if self.bidirectional else 1, []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                h = None if h_0 is None else h_0[index]
                output, h = self.cells[index](x, h, direction == 1, cu_seqlens)
                outputs.append(output)
                states.append(h)
            x = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return x, torch.stack(states)

    def _packed(self, input: PackedSequence, h_0: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """A PackedSequence holds step after step of all sequences; scans take sequence after sequence."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if data.dim() != 2 or data.shape[-1] != self.input_size:
            was = tuple(data.shape)
            raise ValueError(f"{self._name}: input.data has shape {was}; it must be (steps, {self.input_size})")
        self._check_state(h_0, int(batch_sizes[0]))
        rows = torch.arange(int(batch_sizes[0]))
        first = batch_sizes.cumsum(0) - batch_sizes
        present = rows[:, None] < batch_sizes[None, :]
        order = (first[None, :] + rows[:, None])[present].to(data.device)  # by sequence, then by time
        cu_seqlens = F.pad(present.sum(1).cumsum(0), (1, 0)).to(data.device)
        if h_0 is not None and sorted_indices is not None:
            h_0 = h_0.index_select(1, sorted_indices)
        output, h_n = self._layers(data[order].unsqueeze(0), h_0, cu_seqlens)
        output = torch.empty_like(output[0]).index_copy(0, order, output[0])
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _check_state(self, h_0: Tensor | None, batch: int | None) -> None:
        check.tensors(self._name, optional=True, h_0=h_0)
        if h_0 is None:
            return
        count = len(self.cells)
        expected = (count, self.hidden_size) if batch is None else (count, batch, self.hidden_size)
        form = (
            "(directions * num_layers, hidden_size)" if batch is None else "(directions * num_layers, B, hidden_size)"
        )
        check.shape(self._name, "h_0", h_0, expected, form)
        if h_0.is_complex() and not self.complex_state:
            raise TypeError(f"{self._name}: h_0 is {check.dtype_name(h_0.dtype)}; it must be real")

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text
