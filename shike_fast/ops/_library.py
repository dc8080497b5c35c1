"""Registration with the PyTorch dispatcher, in the namespace ``shike_fast``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("shike_fast", "FRAGMENT")

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def define_composite(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``function`` as ``shike_fast::<name>`` and return the op.

    The function is a composition of PyTorch operators, so autograd, ``torch.compile``, ``torch.export`` and
    ``torch.func`` see through it and it needs no derivative or shape rule of its own. ``Library.define`` and ``impl``
    cost a fraction of the time of a call through ``torch.library.custom_op``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.shike_fast, name).default


def define_opaque(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]
) -> Callable[..., Any]:
    """Register ``function``, into which PyTorch cannot see, as ``shike_fast::<name>`` and return the op.

    ``fake`` is the same on tensors without data: shapes, dtypes and strides; ``autograd`` what the op does where
    gradients may be wanted, such as ``no_derivative``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"shike_fast::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, autograd, "Autograd")
    return getattr(torch.ops.shike_fast, name).default


def define_fused_loss(
    name: str,
    arguments: str,
    options: str,
    results: int,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Tensor],
    fake_forward: Callable[..., tuple[Tensor, ...]],
    both: Callable[..., tuple[tuple[Tensor, ...], Tensor] | None] | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register a loss whose kernels PyTorch cannot see into, with its derivative; return the op.

        shike_fast::<name>(Tensor[] logits, <arguments>, <options>, str backend) -> (loss, ..., state)
        shike_fast::<name>_backward(Tensor incoming, Tensor[] logits, <arguments>, Tensor state, <options>, str backend)
            -> gradient of the logits

    The logits travel as one tensor [K, B, C] or as K tensors [B, C], so that neither kind is copied; only they are
    differentiable, and only the first result, the loss, passes gradients on.

    Args:
        name: the op's name, without the namespace.
        arguments: schema of the other tensors, ``"Tensor target, Tensor? bias"``.
        options: schema of the numbers and flags.
        results: how many tensors the forward returns; the last is the state that the backward takes.
        forward: (logits, *arguments, *options, backend) -> results.
        backward: (incoming, logits, *arguments, state, *options, backend) -> one tensor [K, B, C].
        fake_forward: as ``forward``, on tensors without data: shapes, dtypes and strides of the results.
        both: as ``forward``, and the gradient for an incoming gradient of 1; None where it cannot. It is used where a
            gradient is wanted and no tracer is at work.

    Returns:
        A function of (logits, *arguments, *options, backend) with the op's results, the state perhaps left out. It
        calls the op, or, where nobody would notice the difference, what the op would call: the dispatcher's way
        through Python costs as much as a small loss.
    """
    tensors = len(arguments.split(","))

    def run_forward(direct: bool, logits: Sequence[Tensor], *others: Any) -> tuple[Tensor, ...]:
        if direct:
            return forward(logits, *others)
        with torch._C._AutoDispatchBelowAutograd():
            out: tuple[Tensor, ...] = op(logits, *others)
        return out

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, beside: list[Tensor] | None, others: tuple[Any, ...], *logits: Tensor
        ) -> Tensor | tuple[Tensor, ...]:
            together = both(logits, *others) if both is not None and beside is not None else None
            out, ctx.gradient = together or (run_forward(beside is not None, logits, *others), None)
            ctx.save_for_backward(*logits, *others[:tensors], out[-1])
            ctx.options, ctx.stacked = others[tensors:], logits[0].dim() == 3
            if beside is not None:  # called directly: what is no function of the logits need not pass through autograd
                beside += out[1:-1]
                return out[0]
            ctx.mark_non_differentiable(*out[1:])
            ctx.set_materialize_grads(False)
            return out

        @staticmethod
        def backward(ctx: Any, incoming: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            return None, None, *gradients_of(ctx, len(ctx.needs_input_grad) - 2, incoming)

    class TransformedLoss(Loss):
        """The same for torch.func, which wants the context set apart from the forward; that costs time otherwise."""

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            count = args[0]
            return run_forward(is_plain(*args[1 : count + 1 + tensors]), args[1 : count + 1], *args[count + 1 :])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            count = inputs[0]
            ctx.count, ctx.gradient = count, None
            ctx.save_for_backward(*inputs[1 : count + 1 + tensors], output[-1])
            ctx.options, ctx.stacked = inputs[count + 1 + tensors :], inputs[1].dim() == 3
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, incoming: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            gradients = gradients_of(ctx, ctx.count, incoming)
            return None, *gradients, *[None] * (len(ctx.needs_input_grad) - 1 - ctx.count)

    def gradients_of(ctx: Any, count: int, incoming: Tensor | None) -> Sequence[Tensor | None]:
        if incoming is None:
            return (None,) * count
        in_graph = torch.is_grad_enabled()  # a graph of the backward is wanted
        if ctx.gradient is not None and not in_graph and is_plain(incoming):
            # Given away: whoever asks a second time gets a gradient of his own, computed anew.
            gradient, ctx.gradient = ctx.gradient, None
            if incoming.item() != 1.0:
                gradient *= incoming
        else:
            saved = ctx.saved_tensors
            logits = saved[:count]
            run = backward if is_plain(incoming, *saved) else backward_op
            gradient = run(incoming, logits, *saved[count:], *ctx.options)
            if in_graph:
                gradient = differentiable_once(name, gradient, incoming, *logits)
        return (gradient,) if ctx.stacked else gradient.unbind(0)

    def needs_gradient(logits: Sequence[Tensor]) -> bool:
        return torch.is_grad_enabled() and any(expert.requires_grad for expert in logits)

    def with_autograd(logits: Sequence[Tensor], *others: Any) -> tuple[Tensor, ...]:
        forbid_tangents(name, *logits, *others[:tensors])
        out: tuple[Tensor, ...] = (
            Loss.apply(None, others, *logits) if needs_gradient(logits) else run_forward(False, logits, *others)
        )
        return out

    def call(logits: Sequence[Tensor], *others: Any) -> tuple[Tensor, ...]:
        if is_plain(*logits, *others[:tensors]):
            if not needs_gradient(logits):
                return forward(logits, *others)
            beside: list[Tensor] = []
            return Loss.apply(beside, others, *logits), *beside
        transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
        out: tuple[Tensor, ...] = (
            TransformedLoss.apply(len(logits), *logits, *others) if transformed else op(logits, *others)
        )
        return out

    op = define_opaque(
        f"{name}(Tensor[] logits, {arguments}, {options}, str backend) -> ({', '.join(['Tensor'] * results)})",
        forward,
        fake_forward,
        with_autograd,
    )
    backward_op = define_opaque(
        f"{name}_backward(Tensor incoming, Tensor[] logits, {arguments}, Tensor state, {options}, str backend)"
        " -> Tensor",
        backward,
        _fake_gradient,
        no_derivative(name, lambda *args: backward_op(*args)),
    )
    return call


class _SecondDerivative(torch.autograd.Function):
    """A gradient that is no constant, although its derivative is not known: asking for it must not give 0."""

    @staticmethod
    def forward(name: str, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(f"{ctx.name}: it can be differentiated once only; backend='reference' has no such limit")


def differentiable_once(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
    """The gradient, as a function of the inputs whose derivative raises."""
    result: Tensor = _SecondDerivative.apply(name, gradient, *inputs)
    return result


def no_derivative(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """What an op without a derivative of its own does at the Autograd key: refuse tangents, then run."""

    def below_autograd(*args: Any) -> Any:
        forbid_tangents(name, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return below_autograd


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing but call the kernel on these tensors.

    No tracer, functorch transform, mode or tensor subclass has to see the operation, and each tensor's memory holds its
    values.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and all(tensor is None or holds_its_values(tensor) for tensor in tensors)
        and not has_tangent(*tensors)
    )


def holds_its_values(tensor: Tensor) -> bool:
    """False for subclasses, wrappers, sparse layouts, lazily negated views and ZeroTensors."""
    return (
        type(tensor) in PLAIN_TENSORS
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        and tensor.data_ptr() != 0
    )


def materialised(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a lazily negated view or a ZeroTensor, whose memory does not hold the values.

    The dispatcher does so with the arguments of an operator, but not within a ``Tensor?[]``, and a ZeroTensor becomes
    an expanded one, whatever layout the operator expects.
    """
    if torch.compiler.is_compiling() or not (tensor.is_neg() or tensor._is_zerotensor()):
        return tensor
    return tensor.clone()


def has_tangent(*tensors: Any) -> bool:
    """Whether forward-mode differentiation is at work and one of the tensors, lists of tensors included, takes part."""
    if forward_ad._current_level < 0:
        return False
    for tensor in tensors:
        if isinstance(tensor, list | tuple):
            if has_tangent(*tensor):
                return True
        elif isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
    return False


def forbid_tangents(name: str, *tensors: Any) -> None:
    """Raise where a tangent would get lost."""
    if has_tangent(*tensors):
        raise RuntimeError(f"{name}: it has no forward-mode derivative; backend='reference' has one")


def gradient_like(logits: Sequence[Tensor]) -> Tensor:
    """Uninitialised memory for the gradient [K, B, C]: laid out as one tensor of logits, contiguous for a sequence."""
    first = logits[0]
    return torch.empty_like(first) if first.dim() == 3 else first.new_empty((len(logits), *first.shape))


def _fake_gradient(incoming: Tensor, logits: Sequence[Tensor], *_: Any) -> Tensor:
    return gradient_like(logits)
