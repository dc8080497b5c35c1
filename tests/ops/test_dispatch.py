"""What the dispatcher would have resolved, seen or refused: every op, every tensor argument, every kind of tensor.

Against the reference on plain tensors. The fused ops call their kernels directly where they can, and the kernels read
memory as it lies there.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shike_fast import ops
from shike_fast.ops import BatchNormArguments
from shike_fast.ops._expert_call import ExpertOptions, ExpertTensors

K, B, C = 3, 5, 4


def loss_tensors():
    return {
        "logits": torch.randn(K, B, C),
        "target": torch.tensor([0, 3, 1, 2, 2]),
        "class_counts": torch.tensor([40.0, 9.0, 3.0, 1.0]),
        "bias": torch.randn(K, C),
        "second": torch.tensor([2, 2, 1, 3, 0]),
        "share": torch.rand(B),
        "of_rows": torch.rand(K, B),
    }


def expert_tensors():
    """One logits tensor an expert; the kinds apply to one of them."""
    tensors = loss_tensors()
    return {f"logits{k}": expert.clone() for k, expert in enumerate(tensors.pop("logits"))} | tensors


def map_tensors():
    maps = {name: torch.randn(B, 4, 3, 2) for name in ("deep", "shallow", "deep2", "shallow2", "shortcut", "shortcut2")}
    vectors = {
        f"{name}{norm}": torch.rand(4) + 0.5
        for norm in ("", "_deep")
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    return maps | vectors


def logits_of(t):
    return t["logits"] if "logits" in t else [t[f"logits{k}"] for k in range(K)]


def norm_of(t, training, name=""):
    vectors = [t[f"{part}{name}"] for part in ("weight", "bias", "running_mean", "running_var")]
    return BatchNormArguments(*vectors, training)


def bn_pool(training):
    return lambda t, **o: ops.dkf_bn_pool(
        t["deep"],
        t["shallow"],
        *norm_of(t, training)[:4],
        training=training,
        relu=True,
        **o,
    )


def experts(t, **o):
    plain = BatchNormArguments(None, None, None, None, True)
    return ops.dkf_experts(
        [t["deep"], t["deep2"]],
        [t["shallow"], t["shallow2"]],
        [plain, norm_of(t, True)],
        relu=[True, False],
        shortcut=[t["shortcut"], t["shortcut2"]],
        deep_norms=[norm_of(t, True, "_deep"), plain],
        **o,
    )


NORM = ("weight", "bias", "running_mean", "running_var")
DKT = lambda t, **o: ops.dkt_loss(logits_of(t), t["target"], **o)  # noqa: E731
BALANCED = lambda t, **o: ops.balanced_softmax_loss(logits_of(t), t["target"], t["class_counts"], **o)  # noqa: E731
CROSS = lambda t, **o: ops.expert_cross_entropy(  # noqa: E731
    logits_of(t), t["target"], bias=t["bias"].detach(), label_smoothing=0.1, **o
)
GENERAL = lambda t, **o: ops.expert_loss(  # noqa: E731
    logits_of(t),
    t["target"],
    bias=t["bias"],
    target_b=t["second"],
    lam=t["share"],
    kl=ops.ExpertKL(weight=t["of_rows"]),
    **o,
)
CALLS = {  # function, its tensors, those of the arguments to try
    "dkt_loss": (DKT, loss_tensors, ("logits", "target")),
    "dkt_loss, sequence": (DKT, expert_tensors, ("logits0", "logits2", "target")),
    "balanced_softmax_loss": (BALANCED, loss_tensors, ("logits", "target", "class_counts")),
    "balanced_softmax_loss, sequence": (BALANCED, expert_tensors, ("logits1",)),
    "expert_cross_entropy": (CROSS, loss_tensors, ("logits", "target", "bias")),
    "expert_cross_entropy, sequence": (CROSS, expert_tensors, ("logits0", "logits2", "bias")),
    "expert_loss": (GENERAL, loss_tensors, ("logits", "target", "second", "bias", "share", "of_rows")),
    "expert_loss, sequence": (GENERAL, expert_tensors, ("logits1",)),
    "dkf_pool": (lambda t, **o: ops.dkf_pool(t["deep"], t["shallow"], **o), map_tensors, ("deep", "shallow")),
    "dkf_bn_pool": (bn_pool(True), map_tensors, ("deep", "shallow", *NORM)),
    "dkf_bn_pool, eval": (bn_pool(False), map_tensors, ("deep", "shallow", *NORM)),
    "dkf_experts": (
        experts,
        map_tensors,
        ("deep", "deep2", "shallow2", "shortcut2", *NORM, *(f"{name}_deep" for name in NORM)),
    ),
}
ARGUMENTS = [pytest.param(call, name, id=f"{call}-{name}") for call, (_, _, names) in CALLS.items() for name in names]
DIFFERENTIABLE = ("logits", "deep", "shallow", "shortcut", "weight", "bias")
ERRORS = (RuntimeError, TypeError, ValueError, AssertionError)


class Subclass(torch.Tensor):
    """Nothing of its own; every operation returns it."""


class Watched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Followed(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def made_in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


def requiring_gradients(tensor):
    return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor


KINDS = {
    "negated": lambda x: torch._neg_view(-x),
    "imaginary part": lambda x: torch.complex(x, -x).conj().imag if x.dtype == torch.float32 else torch._neg_view(-x),
    "expanded": lambda x: x.unsqueeze(0).expand(2, *x.shape)[1],
    "subclass": lambda x: x.as_subclass(Subclass),
    "inference": made_in_inference_mode,
    "functional": torch._to_functional_tensor,
}


def same(value, expected):
    if torch._is_functional_tensor(value):
        value = torch._from_functional_tensor(value)
    torch.testing.assert_close(value.detach().as_subclass(torch.Tensor).clone(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_value_and_running_statistics(call, name, kind):
    function, make, _ = CALLS[call]
    tensors = make()
    plain = {key: value.clone() for key, value in tensors.items()}
    with torch.no_grad():
        expected = function(plain, backend="reference")
        for options in ({}, {"backend": "reference"}):
            given = {key: value.clone() for key, value in tensors.items()}
            given[name] = KINDS[kind](given[name])
            if kind == "inference" and call == "dkf_experts" and name.startswith("running"):
                # PyTorch's operators update it where some other expert keeps no statistics
                with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
                    function(given)
                return
            same(function(given, **options), expected)
            for key in (key for key in given if key.startswith("running")):
                same(given[key], plain[key])


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_gradients_through_a_negated_view(call, name):
    function, make, names = CALLS[call]
    tensors = make()
    leaves = [key for key in names if key.startswith(DIFFERENTIABLE) and not (key == "bias" and "target" in tensors)]
    results = []
    for negated in (False, True):
        given = {key: value.clone() for key, value in tensors.items()}
        for key in leaves:
            given[key].requires_grad_()
        inputs = [given[key] for key in leaves]
        if negated:
            given[name] = torch._neg_view(-given[name])
        value = function(given, **({} if negated else {"backend": "reference"}))
        results.append(torch.autograd.grad(value.square().sum(), inputs))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", CALLS)
def test_incoming_gradients_of_any_kind(call):
    function, make, names = CALLS[call]
    tensors = make()
    leaf = tensors[names[0]].requires_grad_()
    value = function(tensors)
    weights = torch.rand(value.shape)
    (expected,) = torch.autograd.grad(function(tensors, backend="reference"), leaf, weights)
    for incoming in (torch._neg_view(-weights), torch.complex(weights, -weights).conj().imag):
        assert incoming.is_neg()
        (gradient,) = torch.autograd.grad(value, leaf, incoming, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    zero = torch._efficientzerotensor(value.shape)
    (gradient,) = torch.autograd.grad(value, leaf, zero, retain_graph=True)
    assert not gradient.any()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weights, weights)
        with pytest.raises(RuntimeError, match=r"it has no forward-mode derivative; backend='reference' has one$"):
            torch.autograd.grad(value, leaf, dual, retain_graph=True)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(value, leaf, torch.stack([weights, weights]), is_grads_batched=True)


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_a_zero_tensor_counts_as_zeros(call, name):
    function, make, _ = CALLS[call]
    tensors = make()
    zero = torch._efficientzerotensor(tensors[name].shape, dtype=tensors[name].dtype)
    if name == "class_counts":
        with pytest.raises(ValueError, match="class_counts must be finite, >= 0 and not all 0"):
            function(tensors | {name: zero})
        return
    if name.startswith("running") and not call.endswith("eval"):
        with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
            function(tensors | {name: zero})
        return
    expected = function({k: v.clone() for k, v in tensors.items()} | {name: torch.zeros_like(tensors[name])})
    same(function(tensors | {name: zero}), expected)


def tangents(function, tensors, name, **options):
    tangent = torch.linspace(-1, 2, tensors[name].numel()).reshape(tensors[name].shape)
    with forward_ad.dual_level():
        given = {k: v.clone() for k, v in tensors.items()}
        given[name] = forward_ad.make_dual(given[name], tangent)
        return forward_ad.unpack_dual(function(given, **options))


FLOATING = [pytest.param(*p.values, id=p.id) for p in ARGUMENTS if p.values[1] not in ("target", "second")]


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("call", "name"), FLOATING)
def test_forward_mode_has_the_reference_s_tangent(call, name, needs_grad):
    function, make, _ = CALLS[call]
    if call.startswith("expert_cross_entropy"):  # its bias may take part as well
        function = lambda t, **o: ops.expert_cross_entropy(logits_of(t), t["target"], bias=t["bias"], **o)  # noqa: E731
    tensors = make()
    if needs_grad:
        tensors = {k: v.requires_grad_() if k.startswith(DIFFERENTIABLE) else v for k, v in tensors.items()}
    if name.startswith(("running", "class_counts")):
        with pytest.raises(ValueError, match=rf"{name.removesuffix('_deep')} must not require gradients"):
            tangents(function, tensors, name)
        return
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: it has no forward-mode derivative$"):
        tangents(function, tensors, name, backend="cpu")
    mine, theirs = tangents(function, tensors, name), tangents(function, tensors, name, backend="reference")
    assert theirs.tangent is not None
    same(mine.primal, theirs.primal.detach())
    same(mine.tangent, theirs.tangent.detach())


def test_the_fused_operators_refuse_tangents():
    logits, target = torch.randn(K, B, C), torch.tensor([0, 3, 1, 2, 2])
    calls = {
        "dkt_loss_fused": (lambda z, op: op([z], target, None, 10.0, 1.0, 0.0, -30.0, False, "cpu")[0]),
        "expert_loss_fused": (lambda z, op: op([z], *ExpertTensors(target), *ExpertOptions(True), "cpu")[0]),
    }
    for name, call in calls.items():
        op = getattr(torch.ops.shike_fast, name).default
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=rf"^{name}: it has no forward-mode derivative"):
            call(forward_ad.make_dual(logits, logits), op)
    maps = torch.randn(2, 3, 4, 4)
    op = torch.ops.shike_fast.dkf_fused.default
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"^dkf_fused: it has no forward-mode derivative"):
        op([forward_ad.make_dual(maps, maps)], [maps], [], [], [], torch.zeros(0, 3, 3), [], [False], "cpu")


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, 2 * x])),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda xs: torch.func.vmap(f)(xs).sum())(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("call", "name"), [p for p in FLOATING if p.values[1].startswith(DIFFERENTIABLE)])
def test_functorch_transforms(call, name, transform):
    function, make, _ = CALLS[call]
    if call.startswith("expert_cross_entropy"):
        function = lambda t, **o: ops.expert_cross_entropy(logits_of(t), t["target"], bias=t["bias"], **o)  # noqa: E731
    tensors = {k: v for k, v in make().items() if not k.startswith("running")}
    statistics = {f"running_{part}{norm}": None for part in ("mean", "var") for norm in ("", "_deep")}
    if call.endswith("eval"):
        statistics |= {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}

    def of(**options):
        return TRANSFORMS[transform](lambda x: function(statistics | tensors | {name: x}, **options), tensors[name])

    same(of(), of(backend="reference"))


def test_vmap_of_the_target_goes_to_the_reference():
    logits, targets = torch.randn(K, B, C), torch.randint(C, (2, B))
    for loss in (ops.dkt_loss, ops.expert_cross_entropy):
        losses = torch.func.vmap(lambda y, loss=loss: loss(logits, y))(targets)
        torch.testing.assert_close(losses, torch.stack([loss(logits, y) for y in targets]))


def test_modes_see_the_operators():
    for call, (function, make, _) in CALLS.items():
        op = "dkf_fused" if call.startswith("dkf") else "dkt_loss_fused" if "dkt" in call else "expert_loss_fused"
        tensors = make()
        expected = function({k: v.clone() for k, v in tensors.items()}, backend="reference")
        for mode in (Watched(), Followed()):
            with mode:
                value = function({k: v.clone() for k, v in tensors.items()}, backend="cpu")
            assert any(op in name for name in mode.seen), (call, type(mode))
            same(value, expected)


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_a_fake_or_meta_tensor_among_real_ones_is_an_error(call, name):
    function, make, _ = CALLS[call]
    mode = torch._subclasses.FakeTensorMode()
    for other in (mode.from_tensor, lambda x: x.to("meta")):
        tensors = make()
        tensors[name] = other(tensors[name])
        with pytest.raises(ERRORS):
            function(tensors)


LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "nested, jagged": lambda x: torch.nested.nested_tensor([x.reshape(x.shape[0], -1)], layout=torch.jagged),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_other_layouts_are_refused(call, name, layout):
    function, make, _ = CALLS[call]
    tensors = make()
    tensors[name] = LAYOUTS[layout](tensors[name])
    with pytest.raises(TypeError, match=rf"must be a dense tensor, got a {layout.partition(',')[0]} one$"):
        function(tensors)


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_tensors_that_require_gradients_without_any_wanted(call, name):
    function, make, _ = CALLS[call]
    plain = make()
    tensors = {k: v.clone() for k, v in plain.items()}
    tensors[name] = requiring_gradients(tensors[name])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            if name == "class_counts":
                with pytest.raises(ValueError, match="class_counts must not require gradients"):
                    function(tensors)
                continue
            value = function({k: v if k == name else v.clone() for k, v in tensors.items()})
            assert not value.requires_grad
            if not name.startswith("running"):
                same(value, function({k: v.clone() for k, v in plain.items()}, backend="reference"))
    if name.startswith("running"):
        with pytest.raises(ValueError, match=r"running_\w+ must not require gradients"):
            function(tensors)
