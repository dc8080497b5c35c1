"""What holds for the loss of every method: terms, epochs, gradients, dtypes, mixed images, scores."""

from types import SimpleNamespace

import pytest
import torch

from shike_fast import methods, ops
from shike_fast._util.options import options_of
from shike_fast.methods.families import rarest

COUNTS = torch.tensor([60, 40, 30, 20, 12, 8, 5, 5, 3, 2])
ALL = [name for name in methods.list_methods() if name != "shike"]
DETACHED = ("mdcs", "tcl")  # parts of these are constants to the gradient, so that differences are another one


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_backend("reference"):
        yield


def views(kind):
    settings = SimpleNamespace(**{name: option.default for name, option in options_of(kind).items()})
    return len(kind.views(settings))


def made(name, **options):
    kind = methods.find_method(name)
    experts = kind.experts or kind.defaults.get("num_experts", 3)
    return methods.create_method(name, class_counts=COUNTS, num_experts=experts, **options)


def batch(method, dtype=torch.float64, images=4):
    """Logits of every view, and their labels."""
    torch.manual_seed(0)
    shown = views(type(method))
    experts = len(method.branch_shares) if method.name == "reslt" else method.num_experts
    logits = 3 * torch.randn(experts, shown * images, len(COUNTS), dtype=dtype)
    return logits.requires_grad_(), torch.randint(len(COUNTS), (images,)).repeat(shown)


def stages(names=ALL):
    return [(name, stage.name) for name in names for stage in methods.find_method(name).stages]


def stage_of(method, name):
    return next(stage for stage in method.stages if stage.name == name)


@pytest.mark.parametrize(("name", "stage"), stages())
@pytest.mark.parametrize("epoch", [0, 199])
def test_the_terms_are_those_of_the_stage_and_add_up(name, stage, epoch):
    method = made(name)
    logits, target = batch(method)
    stage = stage_of(method, stage)
    loss, terms = method.loss(logits, target, stage=stage, epoch=method.phase(epoch))
    assert loss.shape == () and loss.dtype == torch.float64 and torch.isfinite(loss)
    assert tuple(terms) == stage.terms and not any(term.requires_grad for term in terms.values())
    if terms:
        assert float(sum(terms.values())) == pytest.approx(float(loss.detach()), rel=1e-6)
    loss.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.any()


@pytest.mark.parametrize("name", ALL)
def test_a_phase_stands_for_its_epochs(name):
    method = made(name)
    logits, target = batch(method)
    of_phases = {}
    for epoch in (0, 1, 19, 20, 159, 160, 199):
        phase = method.phase(epoch)
        assert phase == method.phase(phase)
        loss, _ = method.loss(logits, target, epoch=epoch)
        assert torch.equal(loss, of_phases.setdefault(phase, loss))


@pytest.mark.parametrize(("name", "stage"), [pair for pair in stages() if pair[0] not in DETACHED])
def test_gradients(name, stage):
    method = made(name)
    logits, target = batch(method, images=2)
    stage = stage_of(method, stage)
    for epoch in {method.phase(0), method.phase(199)}:
        assert torch.autograd.gradcheck(
            lambda z, e=epoch: method.loss(z, target, stage=stage, epoch=e)[0], logits, fast_mode=True
        )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(name, dtype):
    method = made(name)
    logits, target = batch(method)
    logits = logits.detach().to(dtype).requires_grad_()
    expected, _ = method.loss(logits.detach().double(), target, epoch=199)
    loss, _ = method.loss(logits, target, epoch=199)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == dtype
    # what a method computes beside the ops has the precision of the logits
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", [name for name in ALL if methods.find_method(name).mixes])
def test_mixed_images_have_two_labels(name):
    method = made(name)
    logits, target = batch(method)
    second, lam = target.flip(0), torch.tensor(0.3)
    for stage in method.stages:
        mixed, _ = method.loss(logits, target, stage=stage, epoch=199, target_b=second, lam=lam)
        one, other = (method.loss(logits, labels, stage=stage, epoch=199)[0] for labels in (target, second))
        assert float(mixed.detach()) == pytest.approx(float((0.3 * one + 0.7 * other).detach()), rel=1e-6)


@pytest.mark.parametrize(("name", "stage"), stages())
def test_scores(name, stage):
    method = made(name)
    logits, _ = batch(method)
    stage = stage_of(method, stage)
    scores = method.scores(logits, stage=stage)
    assert scores.shape == logits.shape[1:]
    factor = {"ldam-drw": 30.0, "reslt": 3.0}.get(name, 1.0)
    assert torch.allclose(scores, factor * logits.mean(0))
    assert method.prior_of_scores(stage) in ("train", "uniform")


@pytest.mark.parametrize("name", ["cb", "focal", "ldam-drw", "ride"])
def test_weights_begin_after_four_fifths_of_the_run_or_where_it_is_said(name):
    own = {} if name == "ride" else {"train_rule": "drw"}
    for method, first in (
        (methods.create_method(name, class_counts=COUNTS, epochs=40, **own), 32),
        (methods.create_method(name, class_counts=COUNTS, reweight_epoch=7, **own), 7),
    ):
        logits, target = batch(method)
        early, before, at, late = (method.loss(logits, target, epoch=e)[0] for e in (0, first - 1, first, 39))
        assert torch.equal(early, before) and torch.equal(at, late) and not torch.equal(before, at)


@pytest.mark.parametrize(("rule", "weighted"), [("none", (False, False)), ("reweight", (True, True))])
def test_rules_of_weights(rule, weighted):
    method = methods.create_method("cb", class_counts=COUNTS, num_experts=1, train_rule=rule)
    logits, target = batch(method)
    plain = ops.expert_loss(logits, target)
    for epoch, differs in zip((0, 199), weighted, strict=True):
        assert torch.equal(method.loss(logits, target, epoch=method.phase(epoch))[0], plain) is not differs
    assert method.prior_of_scores(method.stages[0]) == ("uniform" if rule == "reweight" else "train")


def test_logit_adjustment_post_hoc():
    method = made("la", post_hoc=True, tau=2.0)
    logits, target = batch(method)
    assert torch.equal(method.loss(logits, target)[0], ops.expert_loss(logits, target))
    bias = ops.class_bias(COUNTS, 2.0, eps=1e-12, power=True)
    assert torch.allclose(method.scores(logits, stage=method.stages[0]), logits[0] - bias)


def test_focal_at_certainty():
    """The power of a base that rounds to 0 has a derivative all the same."""
    method = made("focal", gamma=0.5)
    logits = torch.zeros(1, 2, 10).index_fill_(2, torch.tensor(3), 200.0).requires_grad_()
    loss, _ = method.loss(logits, torch.tensor([3, 3]))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("taus", "experts", "meant"), [((0, 2), 3, (0, 1, 2)), ((-1, 3), 5, (-1, 0, 1, 2, 3))])
def test_balpoe_spreads_two_taus(taus, experts, meant):
    method = methods.create_method("balpoe", class_counts=COUNTS, num_experts=experts, taus=taus)
    assert torch.allclose(method.bias.value, torch.stack([ops.class_bias(COUNTS, tau, eps=1e-9) for tau in meant]))


def test_mdcs_needs_its_first_view_to_be_right():
    method = made("mdcs")
    logits, target = batch(method)
    with torch.no_grad():
        wrong = logits.clone()
        wrong[:, :4].scatter_(2, ((target[:4] + 1) % 10).expand(3, -1).unsqueeze(2), 100.0)
    _, terms = method.loss(wrong, target, epoch=199)
    assert float(terms["consistency"]) == 0
    weights = [method.consistency_weight(epoch) for epoch in (0, 9, 19, 399)]
    assert weights == pytest.approx([0.03, 0.3, 0.6, 0.6])


@pytest.mark.parametrize("hard", ["zero", "exclude"])
def test_ncl_on_all_classes_is_the_same_twice(hard):
    """Where every class is hard, the two halves are equal."""
    method = made("ncl", hcm_n=10, hard_classes=hard)
    logits, target = batch(method)
    _, terms = method.loss(logits, target)
    assert terms["cross_entropy"] == terms["hard_cross_entropy"] and terms["mutual"] == terms["hard_mutual"]


def test_ncl_leaves_easy_classes_out_as_in_the_paper():
    method = made("ncl", hcm_n=3, hard_classes="exclude", ce_ratio=0.0, diversity_factor=0.0)
    logits, target = batch(method)
    mask = ops.hardest_classes(logits[0], target, 3)
    loss, _ = method.loss(logits, target)
    loss.backward()
    assert not logits.grad[:, ~mask].any()


def test_reslt_branches_see_the_rarest():
    assert rarest(torch.tensor([5, 1, 3, 1]), 2).tolist() == [False, True, False, True]
    assert rarest(torch.tensor([1, 1, 1]), 1).tolist() == [True, False, False]
    method = made("reslt", branch_shares=(1.0, 0.5, 0.2))
    assert method.seen.sum(1).tolist() == [10, 5, 2] and method.seen[2].nonzero().flatten().tolist() == [8, 9]
    logits, _ = batch(method)
    loss, _ = method.loss(logits, torch.zeros(4, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, logits)
    of_sum = gradient[1]  # frequent images teach the other branches by way of the sum alone
    assert torch.allclose(gradient[2], of_sum) and not torch.allclose(gradient[0], of_sum)


REFUSED = [
    ("balpoe", 3, {"taus": (0.0, 1.0, 2.0, 3.0)}, "--taus: method 'balpoe' needs a number for each of its 3 experts"),
    ("balpoe", 1, {}, "--taus: .* each of its 1 experts, got 2; name 1, or train with --experts 2"),
    ("mdcs", 2, {}, "--exponents: method 'mdcs' needs a number for each of its 2 experts, got 3"),
    ("tcl", 4, {}, "--deltas: method 'tcl' needs a number for each of its 4 experts, got 3"),
    ("ncl", 3, {"hcm_n": 11}, "--hcm-n: must be at most the number of classes, 10, got 11"),
    ("ncl++", 2, {"hcm_n": 11}, "--hcm-n: must be at most the number of classes, 10, got 11"),
    ("cb", 1, {"beta": 1.0}, r"--beta: must be in \[0, 1\), got 1"),
    ("cb", 1, {"train_rule": "late"}, "--train-rule: must be one of none, reweight, drw, got 'late'"),
    ("reslt", 1, {"branch_shares": (1.0, 0.0)}, r"--branch-shares: must be in \(0, 1\], got 0"),
    ("los", 1, {"label_smoothing": 1.5}, r"--label-smoothing: must be in \[0, 1\], got 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "experts", "options", "message"), REFUSED)
def test_what_does_not_fit(name, experts, options, message):
    with pytest.raises(ValueError, match=message):
        methods.create_method(name, class_counts=COUNTS, num_experts=experts, **options)


@pytest.mark.parametrize("name", ["cb", "focal", "ldam-drw", "ride"])
def test_a_class_without_images(name):
    counts = torch.tensor([4, 0, 2])
    with pytest.raises(
        ValueError, match=f"--method: '{name}' weighs classes by their training images, class 1 has none"
    ):
        methods.create_method(name, class_counts=counts)
    if name == "ride":
        methods.create_method(name, class_counts=counts, uses_class_counts=False)


def test_numbers_of_rows_and_branches_that_do_not_fit():
    logits, target = torch.randn(2, 6, 10), torch.randint(10, (6,))
    with pytest.raises(ValueError, match=r"ncl\+\+: the rows must be 4 views of as many images each, got 6"):
        made("ncl++").loss(logits, target)
    with pytest.raises(
        ValueError, match="--branch-shares: name a share for each of the 2 branches of the logits, got 3"
    ):
        made("reslt").loss(logits, target)
    with pytest.raises(ValueError, match="teacher 'view' needs an even batch"):
        made("mdcs").loss(torch.randn(3, 5, 10), target[:5])
