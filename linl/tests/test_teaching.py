"""Teachers: outputs, hints, and what becomes of a training that is killed."""

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
    with Teacher(teacher, net, settings, {name: chosen}, x[:1], "fp32") as taught:
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
    assert not any(m._forward_hooks for one in (teacher, ends[3.0]) for m in one.modules())

    epochs = []

    def kill(net):
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return {}

    start = linl.graph.clone(net)
    with pytest.raises(KeyboardInterrupt):
        fit(start, digits, settings, hints={name: None}, folder=tmp_path / "killed", watch=kill, **how)
    fit(start, digits, settings, hints={name: None}, folder=tmp_path / "killed", **how)
    assert all(torch.equal(a, b) for a, b in zip(ends[3.0].parameters(), start.parameters(), strict=True))
    with pytest.raises(ValueError, match="teacher"):
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
    ],
)
def test_hints_that_cannot_be_compared(hint, hints, said):
    net, digits = setting()
    hints = {hinted(net)[0] if name == INNER else name: at for name, at in hints.items()}
    with pytest.raises(ValueError, match=said):
        fit(net, digits, recipe("distill-hints-digits", hint=hint), device="cpu", teacher=net, hints=hints)
    with pytest.raises(ValueError, match="hints without a teacher" if hints else "needs teacher="):
        fit(net, digits, recipe("linlnet-digits" if hints else "distill-hints-digits"), device="cpu", hints=hints)
