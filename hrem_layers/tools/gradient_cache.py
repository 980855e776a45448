"""Encoders in micro-batches under a loss that sees the whole batch (Gao et al., "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup", RepL4NLP 2021: GradCache).

Two passes. The first encodes micro-batch by micro-batch and keeps outputs, no activations; the loss of all outputs
then says what gradient each of them gets. The second encodes every micro-batch once more, now with its activations,
and hands them the gradients of their outputs. The price is one more forward pass of the encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hrem_layers._core.checks import check_int, describe, said
from hrem_layers._core.numerics import autocast_off

Encoder = Callable[..., Any]
"""Items -> a tensor of as many, or tuples, lists or dictionaries of such tensors and None."""

RandomStates = list[tuple[torch.device, Tensor]]


def gradient_cached_backward(
    loss: Callable[..., Tensor],
    encoders: Sequence[Encoder],
    inputs: Sequence[Sequence[Any]],
    *,
    micro_batch_size: int,
    backward: Callable[[Tensor], object] = torch.autograd.backward,
) -> Tensor:
    """``loss(*outputs).backward()`` for outputs of a batch whose activations would not fit into memory.

    Gradients are those of one pass up to rounding: they are added to ``.grad`` of the encoders' parameters, and of
    whatever the loss has of its own. Random numbers (dropout) of a micro-batch are the same in both passes, and the
    generators end where one pass would leave them. Call it where you would call forward and backward; where autocast
    is on, encoders and loss compute under it in both passes, and gradients flow outside of it, as usual.

    An encoder may be wrapped in DistributedDataParallel (each in a wrapper of its own): gradients are averaged once,
    with its last micro-batch. An encoder whose items see each other (batch normalisation in training) normalises over
    the micro-batch; buffers of an ``nn.Module`` end as the first pass left them.

    Args:
        loss: ``(output of the first encoder, of the second, ...) -> scalar``, called once, with the whole batch.
        encoders: callables, called with a micro-batch of their inputs. Each returns a tensor, or tuples, lists or
            dictionaries of tensors and None, such as (embedding, fragments, mask): every tensor with one entry per
            item, first. What one micro-batch returns must fit to the others: pad to the longest of the batch.
        inputs: the arguments of each encoder, tensors (N, ...) or lists of N. N may differ between encoders.
        micro_batch_size: items per micro-batch, at least 1; the last one holds what is left.
        backward: what to call with the loss: ``lambda total: scaler.scale(total).backward()`` with a GradScaler.

    Returns:
        The loss, a scalar without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, inputs of one encoder differ in length, an encoder
            returned something else, or the loss is not a scalar.

    Example:
        >>> import torch
        >>> from hrem_layers import InfoNCELoss
        >>> from hrem_layers.tools.gradient_cache import gradient_cached_backward
        >>> image_encoder, text_encoder = torch.nn.Linear(8, 4), torch.nn.Embedding(100, 4)
        >>> images, texts = torch.randn(10, 8), torch.randint(100, (10,))
        >>> total = gradient_cached_backward(
        ...     InfoNCELoss().from_embeddings, [image_encoder, text_encoder], [(images,), (texts,)], micro_batch_size=4
        ... )
        >>> text_encoder.weight.grad.shape
        torch.Size([100, 4])
    """
    size = check_int("micro_batch_size", micro_batch_size, minimum=1)
    batches = _check(loss, encoders, inputs, size)
    passes = [_first_pass(i, encoder, cut) for i, (encoder, cut) in enumerate(zip(encoders, batches, strict=True))]
    _forget_casts()
    total = loss(*(pytree.tree_unflatten(leaves, spec) for leaves, spec, _ in passes))
    if not isinstance(total, Tensor) or total.dim():
        raise TypeError(f"loss must return a scalar tensor, got {said(total)}")
    if total.requires_grad:
        with autocast_off(total.device):
            backward(total)
        for encoder, cut, (leaves, _, states) in zip(encoders, batches, passes, strict=True):
            _second_pass(encoder, cut, [None if x is None else x.grad for x in leaves], states)
    return total.detach()


def _first_pass(
    index: int, encoder: Encoder, batches: list[tuple[Any, ...]]
) -> tuple[list[Tensor | None], Any, list[RandomStates]]:
    """Outputs of the whole batch as leaves of a graph, how they are nested, and the random states on the way."""
    collected: list[list[Any]] = []
    spec, states = None, []
    for batch in batches:
        states.append(_random_states(batch))
        with torch.no_grad():
            out, now = pytree.tree_flatten(encoder(*batch))
        _check_output(index, out, len(batch[0]))
        if spec is not None and (now != spec or any(map(_misfit, out, collected[0]))):
            raise ValueError(
                f"encoders[{index}] must return the same for every micro-batch up to the number of items: pad to the "
                f"longest of the batch; got {_shapes(collected[0])} and {_shapes(out)}"
            )
        spec = now
        collected.append(out)
    leaves = [None if parts[0] is None else torch.cat(parts) for parts in zip(*collected, strict=True)]
    for x in leaves:
        if x is not None and (x.dtype.is_floating_point or x.dtype.is_complex):
            x.requires_grad_()
    return leaves, spec, states


def _second_pass(
    encoder: Encoder, batches: list[tuple[Any, ...]], grads: list[Tensor | None], states: list[RandomStates]
) -> None:
    """Gradients of the outputs back into the encoder, micro-batch by micro-batch."""
    if all(grad is None for grad in grads):
        return
    start = 0
    with _kept_buffers(encoder):
        for i, (batch, state) in enumerate(zip(batches, states, strict=True)):
            stop = start + len(batch[0])
            # DistributedDataParallel averages what has gathered in .grad, once
            waits = getattr(encoder, "no_sync", nullcontext) if i + 1 < len(batches) else nullcontext
            with waits(), torch.enable_grad():
                with _random_states_of(state):
                    out = pytree.tree_leaves(encoder(*batch))
                reached = [
                    (x, grad[start:stop])
                    for x, grad in zip(out, grads, strict=True)
                    if grad is not None and x.requires_grad
                ]
                if not reached:  # a frozen encoder
                    break
                with autocast_off(reached[0][0].device):
                    torch.autograd.backward([x for x, _ in reached], [grad for _, grad in reached])
            del out, reached
            _forget_casts()
            start = stop


def _check(
    loss: object, encoders: Sequence[Encoder], inputs: Sequence[Sequence[Any]], size: int
) -> list[list[tuple[Any, ...]]]:
    """The inputs of every encoder, cut into micro-batches."""
    if not callable(loss):
        raise TypeError(f"loss must be a callable of the encoders' outputs, got {said(loss)}")
    for name, given in (("encoders", encoders), ("inputs", inputs)):
        if not isinstance(given, tuple | list):
            raise TypeError(f"{name} must be a list with one entry per encoder, got {said(given)}")
    if len(encoders) != len(inputs) or not encoders:
        raise ValueError(f"inputs must have one entry per encoder, got {len(encoders)} encoders, {len(inputs)} inputs")
    batches = []
    for i, (encoder, arguments) in enumerate(zip(encoders, inputs, strict=True)):
        if not callable(encoder):
            raise TypeError(f"encoders[{i}] must be callable, got {said(encoder)}")
        if not isinstance(arguments, tuple | list) or not arguments:
            raise TypeError(f"inputs[{i}] must be a tuple of the encoder's arguments, got {said(arguments)}")
        for x in arguments:
            if not (isinstance(x, list) or (isinstance(x, Tensor) and x.dim())):
                raise TypeError(f"inputs[{i}] must hold tensors (N, ...) and lists of N, got {said(x)}")
            if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
                raise ValueError(f"inputs[{i}] must be data: put what computed {describe(x)} into the encoder")
        lengths = {len(x) for x in arguments}
        if len(lengths) > 1 or not max(lengths):
            raise ValueError(f"inputs[{i}] must be of one length, at least 1, got {sorted(lengths)}")
        starts = range(0, lengths.pop(), size)
        batches.append([tuple(x[start : start + size] for x in arguments) for start in starts])
    return batches


def _check_output(index: int, out: list[Any], length: int) -> None:
    for x in out:
        if x is not None and not (isinstance(x, Tensor) and x.dim() and x.shape[0] == length):
            raise ValueError(
                f"encoders[{index}] must return tensors with one entry per item, {length} here, or None, got {said(x)}"
            )


def _misfit(x: Tensor | None, first: Tensor | None) -> bool:
    if x is None or first is None:
        return x is not first
    return x.shape[1:] != first.shape[1:] or x.dtype != first.dtype


def _shapes(out: list[Any]) -> str:
    return ", ".join("None" if x is None else f"{tuple(x.shape)} {x.dtype}" for x in out)


def _forget_casts() -> None:
    """Autocast keeps cast weights: older PyTorch also those cast without gradient where gradient is wanted."""
    torch.clear_autocast_cache()


def _random_states(batch: tuple[Any, ...]) -> RandomStates:
    """Of the CPU's generator and of those of the devices that the batch lies on."""
    devices = {x.device for x in batch if isinstance(x, Tensor) and x.device.type not in ("cpu", "meta")}
    if not devices and torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = {torch.device("cuda", torch.cuda.current_device())}  # lists, which the encoder moves
    others = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
    return [(torch.device("cpu"), torch.get_rng_state()), *others]


@contextmanager
def _random_states_of(states: RandomStates) -> Iterator[None]:
    """Inside, generators start from ``states``; afterwards they are where they were before."""
    with ExitStack() as stack:
        for device, state in states:
            if device.type == "cpu":
                stack.callback(torch.set_rng_state, torch.get_rng_state())
                torch.set_rng_state(state)
            else:
                module = torch.get_device_module(device)
                stack.callback(module.set_rng_state, module.get_rng_state(device), device)
                module.set_rng_state(state, device)
        yield


@contextmanager
def _kept_buffers(encoder: Encoder) -> Iterator[None]:
    """Running statistics are not counted twice."""
    buffers = list(encoder.buffers()) if isinstance(encoder, nn.Module) else []
    before = [x.detach().clone() for x in buffers]
    yield
    with torch.no_grad():
        for x, old in zip(buffers, before, strict=True):
            x.copy_(old)
