"""Teachers: outputs, hints, and what becomes of a training that is killed."""

from dataclasses import replace

import pytest
import torch

import linl
from linl.teaching import Teacher
from linl.tests.small_trainings import setting
from linl.train import fit, recipe

INNER = "the dense layer within"


def test_distillation_is_hintons():
    """T² Σ q·log(q/p), softened by T, mean over images; in float64, written out."""
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = (torch.exp(z / 3.0) / torch.exp(z / 3.0).sum(1, keepdim=True) for z in (a, b))
    wanted = 9 * (q * (q / p).log()).sum(1).mean()
    assert abs(linl.losses.distillation(a, b, 3.0) - wanted) < 1e-12
    assert linl.losses.distillation(a, a, 2.0).abs() < 1e-12 < linl.losses.distillation(a, b, 2.0)


def test_a_student_comes_nearer_to_its_teacher(tmp_path):
    """By its outputs alone: the labels are wrong. Killed on its way it ends the same; other teachers are refused."""
    net, digits = setting()
    teacher = linl.graph.clone(net)
    fit(teacher, digits, recipe("linlnet-digits", epochs=6), device="cpu", verbose=False)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    digits.train = digits.train[0], digits.train[1].flip(0)
    settings = recipe("distill-digits", epochs=8, batch_size=16, lr=3e-3)
    how = {"device": "cpu", "precision": "fp32", "verbose": False}

    def apart(student):
        return linl.losses.distillation(student.eval()(x), teacher(x), 2.0).item()

    x, start = digits.normalize(digits.test[0]), linl.graph.clone(net)
    first = apart(start)
    whole = fit(net, digits, settings, teacher=teacher, folder=tmp_path / "whole", **how)
    assert apart(net) < first / 2 and whole.metrics["train_loss"].is_monotonic_decreasing
    assert not teacher.training and all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert any(p.requires_grad for p in teacher.parameters())

    epochs = []

    def kill(net):
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        fit(start, digits, settings, teacher=teacher, folder=tmp_path / "killed", watch=kill, **how)
    again = fit(start, digits, settings, teacher=teacher, folder=tmp_path / "killed", **how)
    assert again.resumed_from == 1
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), start.parameters(), strict=True))
    with pytest.raises(ValueError, match="teacher"):
        fit(start, digits, settings, teacher=start, folder=tmp_path / "whole", **how)


def test_a_teacher_belongs_to_a_recipe_that_distils():
    net, digits = setting()
    with pytest.raises(ValueError, match=r"distill = 1.0: a recipe with distill above 0 needs teacher="):
        fit(net, digits, recipe("distill-digits"), device="cpu")
    with pytest.raises(ValueError, match=r"distill = 0.0: .* another takes none"):
        fit(net, digits, recipe("linlnet-digits"), device="cpu", teacher=net)


def test_a_hint_is_what_is_missed_of_a_modules_values():
    """The recipe's weight times the squared distance in the teacher's variance, beside its outputs'."""
    net, digits = setting()
    teacher, x = linl.graph.clone(net), digits.normalize(digits.test[0][:40])
    name, width = hinted(net)
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.1 * torch.randn_like(p)
    chosen = torch.arange(width).flip(0)  # in another order
    settings = recipe("distill-hints-digits", hint=0.3, distill=0.5)
    seen = {}
    for key, one in (("mine", net.eval()), ("its", teacher.eval())):
        one.get_submodule(name).register_forward_hook(lambda m, i, o, key=key: seen.__setitem__(key, o.detach()))
    with Teacher(teacher, net, settings, x.device, "fp32", {name: chosen}, x[:1]) as taught:
        logits = net(x)
        told = taught.mixed(torch.tensor(2.0), logits, x)
    teacher(x)
    mine, its = seen["mine"].double(), seen["its"][:, chosen].double()
    share = ((mine - its) ** 2).sum() / (its - its.mean(0)).pow(2).sum()
    apart = linl.losses.distillation(logits, teacher(x), settings.temperature)
    assert told.item() == pytest.approx((1 + 0.5 * apart + 0.3 * share).item(), rel=1e-5)
    assert linl.teaching.missed(its, its) == 0
    assert linl.teaching.missed(its.mean(0).expand_as(its), its).item() == pytest.approx(1)


def hinted(net):
    """A dense layer within, and its outputs."""
    name, layer = next((name, m) for name, m in net.named_modules() if isinstance(m, torch.nn.Linear))
    return name, layer.out_features


def test_hints_bring_a_module_nearer_and_belong_to_the_training(tmp_path):
    """Killed on its way it ends the same; with other hints it is another training; nobody listens afterwards."""
    net, digits = setting()
    teacher, (name, width) = linl.graph.clone(net), hinted(net)
    fit(teacher, digits, recipe("linlnet-digits", epochs=6), device="cpu", verbose=False)
    how = {"device": "cpu", "precision": "fp32", "verbose": False, "teacher": teacher}
    x, ends = digits.normalize(digits.test[0]), {}

    def missing(student):
        with torch.no_grad():
            return linl.teaching.missed(values(student, name, x), values(teacher, name, x)).item()

    for hint in (0.0, 3.0):
        ends[hint] = linl.graph.clone(net)
        settings = recipe("distill-hints-digits", epochs=4, batch_size=16, lr=3e-3, hint=hint)
        fit(ends[hint], digits, settings, hints={name: None} if hint else None, folder=tmp_path / str(hint), **how)
    assert missing(ends[3.0]) < missing(ends[0.0]) / 2
    assert not any(m._forward_hooks for m in ends[3.0].modules())

    epochs = []

    def kill(net):
        epochs.append(1)
        assert not any(m._forward_hooks for m in net.modules()), "a copy made here would listen for ever"
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return {}

    start = linl.graph.clone(net)
    with pytest.raises(KeyboardInterrupt):
        fit(start, digits, settings, hints={name: None}, folder=tmp_path / "killed", watch=kill, **how)
    fit(start, digits, settings, hints={name: None}, folder=tmp_path / "killed", **how)
    assert all(torch.equal(a, b) for a, b in zip(ends[3.0].parameters(), start.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"\(hints differ\)"):
        fit(start, digits, settings, hints={name: torch.arange(width)}, folder=tmp_path / "killed", **how)


def values(net, name, x):
    kept = []
    hook = net.get_submodule(name).register_forward_hook(lambda module, inputs, output: kept.append(output))
    net.eval()(x)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize(
    ("hint", "hints", "said"),
    [
        (1.0, {}, "hint = 1.0: a recipe with hint above 0 needs hints="),
        (0.0, {"a": None}, "hint = 0.0: .* another takes none"),
        (1.0, {"a": None}, "hints: no module 'a' in the network"),
        (1.0, {INNER: torch.arange(3)}, r"hints: .* gives \(\d+,\) where the teacher's gives \(3,\)"),
        (1.0, {INNER: [0, 1000]}, "hints: .* no channel 1000, the teacher's has"),
        (1.0, {INNER: [True, False]}, "aren't the numbers of channels"),
    ],
)
def test_hints_that_cannot_be_compared(hint, hints, said):
    net, digits = setting()
    hints = {hinted(net)[0] if name == INNER else name: at for name, at in hints.items()}
    with pytest.raises(ValueError, match=said):
        fit(net, digits, recipe("distill-hints-digits", hint=hint), device="cpu", teacher=net, hints=hints)


def test_hints_are_a_teachers():
    net, digits = setting()
    settings = replace(recipe("linlnet-digits"), hint=1.0)  # `recipe` itself refuses it
    with pytest.raises(ValueError, match="hints without a teacher"):
        fit(net, digits, settings, device="cpu", hints={hinted(net)[0]: None})


class Odd(torch.nn.Module):
    """A layer that training skips, one that gives two values, one that nobody calls, and one changed in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (torch.nn.Linear(4, 4) for _ in "abcd")
        self.two, self.act = torch.nn.MaxPool1d(2, return_indices=True), torch.nn.ReLU(inplace=True)

    def forward(self, x):
        x = x if self.training else self.a(x)
        self.two(x)
        return self.act(self.b(x)) + self.d(x)


@pytest.mark.parametrize(
    ("name", "said"),
    [("c", "c isn't called in the network"), ("two", "two gives a tuple"), ("b", "b gives is changed in place")],
)
def test_values_that_are_no_hint_are_refused_before_any_work(name, said):
    net, x = Odd(), torch.randn(5, 4)
    with pytest.raises(ValueError, match=said):
        Teacher(Odd(), net, recipe("distill-hints"), x.device, "fp32", {name: None}, x[:1])
    assert not any(m._forward_hooks for m in net.modules())


def test_values_of_another_pass_are_never_taken():
    net, x, settings = Odd(), torch.randn(5, 4), recipe("distill-hints")
    with Teacher(Odd(), net, settings, x.device, "fp32", {"a": None, "d": None}, x[:1]) as taught:
        net.eval()
        taught.mixed(torch.tensor(0.0), net(x), x)
        net.train()
        with pytest.raises(ValueError, match="a isn't called in the network"):
            taught.mixed(torch.tensor(0.0), net(x), x)


def test_values_that_do_not_vary():
    """A dead layer of the teacher's: the mean squared distance, no infinity."""
    mine, dead = torch.randn(6, 3), torch.zeros(6, 3)
    assert linl.teaching.missed(mine, dead).item() == pytest.approx((mine**2).mean().item())


def test_without_hints_nothing_is_run_beforehand():
    """So that a network in float64, or one that reads no images, has a teacher too."""
    net = torch.nn.Linear(4, 3).double()
    with Teacher(net, net, recipe("distill-digits"), torch.device("cpu"), "fp32", {}) as taught:
        x = torch.randn(5, 4, dtype=torch.float64)
        assert taught.mixed(torch.tensor(1.0), net(x), x).item() == pytest.approx(0, abs=1e-6)
