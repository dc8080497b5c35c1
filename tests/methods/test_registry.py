"""Methods by name, and classes that cannot be registered."""

import pytest
import torch

from shike_fast import methods, ops
from shike_fast.engine.config import resolve
from shike_fast.errors import ConfigError
from shike_fast.evaluate import main as evaluate
from shike_fast.methods import Method, Stage, option

COUNTS = torch.tensor([100, 30, 5])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(2, 7, 3, requires_grad=True), torch.randint(3, (7,))


def test_shike(batch):
    method = methods.create_method(
        "shike", class_counts=COUNTS, num_experts=2, hardest_weight=4, kl_reduction="batchmean"
    )
    loss, terms = method.loss(*batch, epoch=0)
    expected, parts = ops.dkt_loss(*batch, hardest_weight=4.0, kl_reduction="batchmean", return_terms=True)
    assert torch.equal(loss, expected) and list(terms) == ["cross_entropy", "hardest", "mutual"]
    assert [float(term) for term in terms.values()] == parts.tolist()
    assert not any(term.requires_grad for term in terms.values())
    loss, terms = method.loss(*batch, stage=method.stages[1])
    assert torch.equal(loss, ops.balanced_softmax_loss(*batch, COUNTS)) and terms == {}


def test_cross_entropy(batch):
    method = methods.create_method("ce", class_counts=COUNTS, num_experts=1)
    loss, terms = method.loss(*batch, epoch=3)
    assert torch.equal(loss, ops.expert_cross_entropy(*batch)) and terms == {}
    logits, target = batch
    target_b, lam = target.flip(0), torch.tensor(0.25)
    mixed, terms = method.loss(logits, target, target_b=target_b, lam=lam)
    other = ops.expert_cross_entropy(logits, target_b)
    torch.testing.assert_close(mixed, 0.25 * loss + 0.75 * other)
    assert terms == {}


def test_the_prediction_is_that_of_the_mean_logits(batch):
    method = methods.create_method("shike", class_counts=COUNTS)
    assert torch.equal(method.scores(batch[0], stage=method.stages[0]), batch[0].mean(0))


def test_what_prior_the_scores_are_for():
    counts = torch.tensor([5, 2])
    shike = methods.create_method("shike", class_counts=counts)
    assert [shike.prior_of_scores(stage) for stage in shike.stages] == ["train", "uniform"]
    plain = methods.create_method("ce", class_counts=counts, num_experts=1)
    assert [plain.prior_of_scores(stage) for stage in plain.stages] == ["train"]


def test_names_and_settings_that_are_not_there():
    assert methods.list_methods()[:2] == ["shike", "ce"]
    with pytest.raises(
        ValueError, match=r"create_method: unknown method 'shik', known: shike, ce.*did you mean 'shike'"
    ):
        methods.create_method("shik", class_counts=COUNTS)
    with pytest.raises(
        ValueError, match="create_method: shike has no tau; it has hardest_weight, mutual_weight, scale"
    ):
        methods.create_method("shike", class_counts=COUNTS, tau=1)
    with pytest.raises(ValueError, match="create_method: ce has no tau; it has no settings"):
        methods.create_method("ce", class_counts=COUNTS, tau=1)
    with pytest.raises(ValueError, match=r"--scale: must be a positive number, got -1\.0"):
        methods.create_method("shike", class_counts=COUNTS, scale=-1)


def define(**content):
    def loss(self, logits, target, *, stage=None, epoch=0, **inputs):
        return logits.sum(), {}

    usual = {"name": "own", "summary": "a test", "stages": (Stage("one"),), "loss": loss}
    return type("Own", (Method,), {name: value for name, value in (usual | content).items() if value is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": None, "loss": None}, "register_method: Own has no name, loss"),
        ({"stages": ()}, "register_method: Own has no stages"),
        ({"name": "shike"}, "register_method: a method named 'shike' exists already"),
        ({"stages": (Stage("a"), Stage("a", epochs=0.5))}, "own: two stages have the same name, got a, a"),
        ({"stages": (Stage("a"), Stage("b"))}, "own: one stage, and no other, must have no epochs of its own"),
        ({"stages": (Stage("a", epochs=0.5),)}, "own: one stage, and no other, must have no epochs of its own"),
        ({"stages": (Stage("a", terms=("loss",)),)}, "own: terms must have different names, other than loss and top1"),
        ({"__annotations__": {"tau": "float"}, "tau": 1.0}, "own: tau must be declared by option"),
        ({"__annotations__": {"tau": "bytes"}, "tau": option(b"")}, "option tau: its type must be"),
    ],
)
def test_classes_that_cannot_be_registered(outside, content, message):
    with pytest.raises((TypeError, ValueError), match=message):
        methods.register_method(define(**content))


def test_what_is_no_method():
    with pytest.raises(TypeError, match="register_method: must be a subclass of Method, got 3"):
        methods.register_method(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"__annotations__": {"lr": "float"}, "lr": option(1.0)}, "method 'own': another option is called lr or --lr"),
        (
            {"__annotations__": {"experts": "int"}, "experts": option(1)},
            "another option is called experts or --experts",
        ),
        ({"__annotations__": {"scale": "int"}, "scale": option(1)}, "another option is called scale or --scale"),
        (
            {"stages": (Stage("one", lr="first_lr"),)},
            "method 'own': its stage one names the setting first_lr, there is no",
        ),
    ],
)
def test_settings_that_do_not_go_together(outside, content, message):
    methods.register_method(define(**content))
    with pytest.raises(ConfigError, match=message):
        resolve({"method": "own"})


def test_methods_may_share_a_setting(outside):
    methods.register_method(define(__annotations__={"scale": "float"}, scale=option(5.0)))
    assert resolve({"method": "own", "dataset": "digits-lt"}).scale == 16.0  # the recipe's
    assert resolve({"method": "own", "scale": 7.0}).scale == 7.0


def test_recipes_and_defaults(outside):
    """The user before the method's recipe, that before the data set's, that before defaults."""
    content = {"defaults": {"momentum": 0.5, "lr": 9.0}, "recipes": {"cifar10-lt": {"epochs": 400, "momentum": 0.8}}}
    methods.register_method(define(**content))
    digits, cifar = (resolve({"method": "own", "dataset": name}) for name in ("digits-lt", "cifar10-lt"))
    assert (digits.momentum, digits.lr, digits.epochs) == (0.5, 0.1, 60)
    assert (cifar.momentum, cifar.epochs) == (0.8, 400)
    assert resolve({"method": "own", "dataset": "cifar10-lt", "momentum": 0.7}).momentum == 0.7


def test_terms_that_the_stage_does_not_name(outside, runs, capsys):
    methods.register_method(define(stages=(Stage("one", terms=("norm",)),)))
    assert runs.train("--method", "own", "--model", "resnet8", "--epochs", 1, "--output-dir", outside / "run") == 1
    assert "error: method 'own': its loss has the terms none, its stage one says norm\n" in capsys.readouterr().err


def test_a_loss_that_changes_with_the_epoch(outside, runs):
    """It is told what ``phase`` says, and extra tensors of its forward come as inputs."""
    seen = []

    def forward(self, model, images, stage):
        return {"logits": model(images, stage=stage.classifiers), "means": images.mean((1, 2, 3))}

    def loss(self, logits, target, *, stage=None, epoch=0, means):
        seen.append(epoch)
        assert means.shape == target.shape
        return logits.logsumexp(-1).mean(), {}

    methods.register_method(define(forward=forward, loss=loss, phase=lambda self, epoch: min(epoch, 1)))
    arguments = ["--method", "own", "--model", "resnet8", "--batch-size", 400, "--epochs", 3]
    assert runs.train(*arguments, "--output-dir", outside / "run") == 0
    assert seen == [0, 1, 1]


def test_a_switch_and_a_ramp_by_the_length_of_the_run(outside, runs):
    """The loss changes after four fifths of the run and a weight climbs over it, wherever a stopped run resumes."""
    seen = []

    def post_init(self):
        self.weight = self.class_counts.new_zeros((), dtype=torch.float32)

    def loss(self, logits, target, *, stage=None, epoch=0):
        seen.append((epoch, self.weight.item()))
        return logits.logsumexp(-1).mean(), {}

    def start_epoch(self, epoch, model, stage):
        self.weight.fill_((epoch + 1) / self.epochs)

    def phase(self, epoch):
        return int(epoch >= 0.8 * self.epochs)

    methods.register_method(define(loss=loss, phase=phase, start_epoch=start_epoch, __post_init__=post_init))
    assert methods.create_method("own", class_counts=COUNTS).epochs == 200
    assert methods.create_method("own", class_counts=COUNTS, epochs=50).phase(40) == 1
    arguments = ["--method", "own", "--model", "resnet8", "--batch-size", 400, "--epochs", 5]
    assert runs.train(*arguments, "--output-dir", outside / "run") == 0
    expected = [(0, 0.2), (0, 0.4), (0, 0.6), (0, 0.8), (1, 1.0)]
    assert seen == [pytest.approx(pair) for pair in expected]
    assert runs.train("--resume", outside / "run" / "last.previous.pt", "--output-dir", outside / "again") == 0
    assert seen[5:] == [pytest.approx((1, 1.0))]


def test_modules_of_a_method_are_trained_saved_and_loaded(outside, runs):
    def extend_model(cls, model, settings):
        model.router = torch.nn.Linear(settings.num_experts, settings.num_experts)

    def forward(self, model, images, stage):
        logits = model(images, stage=stage.classifiers)
        return {"logits": logits, "routed": model.router(logits.movedim(0, -1)).movedim(-1, 0)}

    def loss(self, logits, target, *, stage=None, epoch=0, routed):
        return ops.expert_cross_entropy(routed, target), {}

    methods.register_method(define(extend_model=classmethod(extend_model), forward=forward, loss=loss))
    arguments = ["--method", "own", "--model", "resnet8", "--batch-size", 64, "--epochs", 2]
    assert runs.train(*arguments, "--output-dir", outside / "run") == 0
    before, after = (runs.checkpoint(outside / "run" / name)["model"] for name in ("last.previous.pt", "last.pt"))
    assert not torch.equal(before["router.weight"], after["router.weight"])
    assert evaluate(["--checkpoint", str(outside / "run" / "last.pt")]) == 0
    assert runs.train("--resume", "--output-dir", outside / "run") == 0
