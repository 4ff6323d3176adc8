"""How networks are trained, as data: named recipes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch

from linl.distortions import DISTORTIONS
from linl.losses import ADVERSARIES, LOSSES

# One pass over weights, gradients and moments: AlexNet in a seventh of torch's default time on two cores.
OPTIMIZERS = {
    "sgd": lambda groups, settings: torch.optim.SGD(groups, momentum=settings.momentum, fused=True),
    "adamw": lambda groups, settings: torch.optim.AdamW(groups, fused=True),
}
SCHEDULES = ("step", "onecycle", "milestones", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: everything but the network, the data and the seed.

    Attributes:
        epochs, batch_size: passes over the training images; images a step.
        lr, unit_lr: peak learning rates of the weights and of p or α; None is the weights'.
        weight_decay, unit_weight_decay: likewise.
        optimizer: "sgd", as all the papers; or "adamw" (Loshchilov & Hutter, ICLR 2019).
        momentum: of SGD.
        schedule: "step" (times `gamma` every `decay_every` epochs), "onecycle" (linear up for the share
            `warmup` of all steps, cosine down to zero), "milestones" (linear up likewise, and times `gamma` from each
            of `milestones` on, epochs counted from 0) or "constant".
        penalty: λ of Layer Folding's penalty; 0 for LiNLNet.
        augment: distortions of training images, of `linl.distortions.DISTORTIONS`; empty: the data set's own.
        init: weights before training, as `linl.models.INITS`.
        loss: "cross_entropy", or "reconstruction" (mean squared error of the image itself, for autoencoders).
        l1: times Σ|weights| of all dense layers, the classifier's too, biases not (Serra et al., NeurIPS 2021).
        adversary: "none"; "pgd" (Madry et al., ICLR 2018: trained on attacked images); "single" (as Kumar et al.'s
            code in effect does: one gradient's sign, each batch trained clean, then attacked).
        eps, attack_step, attack_steps: of the attack, in pixels from 0 to 1.
        stability, stability_eps: weight of the ReLU-stability loss (Xiao et al., ICLR 2019) and the radius, in
            pixels from 0 to 1, in which it looks.
        distill, temperature: share of the loss that is the distance to a teacher's outputs (Hinton et al., 2015), and
            how much both are softened for it; the rest is `loss`.
        hint: weight of what the values of some modules miss of the teacher's (Romero et al., ICLR 2015), added.
    """

    epochs: int
    batch_size: int = 100
    lr: float = 1e-2
    unit_lr: float | None = 1e-3
    weight_decay: float = 5e-4
    unit_weight_decay: float | None = 5e-4
    optimizer: str = "sgd"
    momentum: float = 0.9
    schedule: str = "step"
    decay_every: int = 140
    gamma: float = 0.1
    warmup: float = 0.3
    milestones: tuple[int, ...] = ()
    penalty: float = 0.0
    init: str = "default"
    loss: str = "cross_entropy"
    l1: float = 0.0
    adversary: str = "none"
    eps: float = 0.15
    attack_step: float = 0.0375
    attack_steps: int = 7
    stability: float = 0.0
    stability_eps: float = 0.1
    distill: float = 0.0
    temperature: float = 2.0
    hint: float = 0.0
    augment: tuple[str, ...] = ()

    def identity(self) -> dict:
        """What tells one training from another; settings that came later count only where they are used."""
        values = asdict(self) | {"milestones": list(self.milestones), "augment": list(self.augment)}
        used = {"loss": self.loss != "cross_entropy", "l1": self.l1, "adversary": self.adversary != "none",
                "stability": self.stability, "milestones": self.milestones, "optimizer": self.optimizer != "sgd",
                "distill": self.distill, "hint": self.hint, "augment": self.augment}  # fmt: skip
        unused = [name for name, on in used.items() if not on]
        unused += ["eps", "attack_step", "attack_steps"] if not used["adversary"] else []
        unused += ["stability_eps"] if not used["stability"] else []
        unused += ["temperature"] if not used["distill"] else []
        unused += ["momentum"] if used["optimizer"] else []
        return {name: value for name, value in values.items() if name not in unused}

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rates' factor at a step, counted from 0."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return self.gamma ** (step // (self.decay_every * steps_per_epoch))
        total = self.epochs * steps_per_epoch
        rise = max(1, round(self.warmup * total))
        if self.schedule == "milestones":
            passed = sum(step >= epoch * steps_per_epoch for epoch in self.milestones)
            return self.gamma**passed if passed else min(1.0, (step + 1) / rise)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


RECIPES: dict[str, Recipe] = {
    # defaults of the authors' main.py: 200 epochs, ×0.1 after 140, p at a tenth of the weights' rate
    "linlnet": Recipe(epochs=200, init="linlnet"),
    "linlnet-imagenet": Recipe(epochs=200, init="linlnet-imagenet"),
    # ours, for a few epochs: the same ratio of the two rates, one cycle instead of a long plateau
    "linlnet-short": Recipe(epochs=10, batch_size=128, lr=5e-2, unit_lr=5e-3, schedule="onecycle", init="linlnet"),
    # ours, for a GPU: larger batches and a higher rate, in the manner of the races to 94 % on CIFAR-10; not run yet
    "linlnet-race": Recipe(epochs=30, batch_size=512, lr=0.2, unit_lr=0.02, schedule="onecycle", init="kaiming"),
    "linlnet-digits": Recipe(epochs=20, batch_size=32, lr=5e-2, unit_lr=5e-3, schedule="onecycle", init="linlnet"),
    # Layer Folding's code: pre-folding with the penalty, then fine-tuning; its learning-rate steps lie after the end
    "layer-folding": Recipe(epochs=100, batch_size=128, lr=1e-3, unit_lr=None, weight_decay=0.0, unit_weight_decay=None, schedule="constant", penalty=0.25),  # noqa: E501
    "layer-folding-vgg": Recipe(epochs=100, batch_size=128, lr=1e-3, unit_lr=None, unit_weight_decay=None, decay_every=50, penalty=0.25),  # noqa: E501
    "fine-tune": Recipe(epochs=100, batch_size=128, lr=1e-3, weight_decay=0.0, schedule="constant"),
    "fine-tune-vgg": Recipe(epochs=100, batch_size=128, lr=1e-3, schedule="constant"),
    # ours, for a few epochs: one cycle at a rate from which a damaged network recovers
    "fine-tune-short": Recipe(epochs=10, batch_size=128, lr=1e-2, schedule="onecycle"),
    # ours, after `linl.refit`: the aim is what the original says of each image. SGD, at a rate that gets anywhere,
    # tears apart what the regression has found (MobileNetV2 on Imagenette: from 87 % to 37 % in an epoch)
    "distill-short": Recipe(epochs=5, batch_size=128, lr=3e-4, weight_decay=1e-2, schedule="onecycle", warmup=0.2, optimizer="adamw", distill=1.0),  # noqa: E501
    # the same, and what it computes on the way
    "distill-hints": Recipe(epochs=10, batch_size=128, lr=3e-4, weight_decay=1e-2, schedule="onecycle", warmup=0.2, optimizer="adamw", distill=1.0, hint=1.0),  # noqa: E501
    # four times as many steps an epoch, for few pictures. Its rate: MobileNetV2 without two of its blocks and the head,
    # ten narrower, after three epochs on crops of 35 % and more of Imagenette's pictures (validation images, one seed):
    # a loss of 0.13, and of 0.16 at 3e-4
    "distill-hints-small-batch": Recipe(epochs=10, batch_size=32, lr=1e-4, weight_decay=1e-2, schedule="onecycle", warmup=0.2, optimizer="adamw", distill=1.0, hint=1.0),  # noqa: E501
    "distill-digits": Recipe(epochs=5, batch_size=32, lr=1e-3, weight_decay=1e-2, schedule="onecycle", warmup=0.2, optimizer="adamw", distill=1.0),  # noqa: E501
    "distill-hints-digits": Recipe(epochs=5, batch_size=32, lr=1e-3, weight_decay=1e-2, schedule="onecycle", warmup=0.2, optimizer="adamw", distill=1.0, hint=1.0),  # noqa: E501
    "fine-tune-digits": Recipe(epochs=5, batch_size=32, lr=1e-2, schedule="onecycle"),
    # ours, for the few steps an epoch of digits has: ten times the rate, so that α gets as far
    "layer-folding-digits": Recipe(epochs=10, batch_size=32, lr=1e-2, unit_lr=None, weight_decay=0.0, unit_weight_decay=None, schedule="constant", penalty=0.25),  # noqa: E501
    # the same for MobileNetV2 and EfficientNet-Lite, which LiNLNet's paper doesn't have: their own weights to start
    "mobile-short": Recipe(epochs=10, batch_size=128, lr=5e-2, unit_lr=5e-3, schedule="onecycle"),
    "mobile-digits": Recipe(epochs=20, batch_size=32, lr=5e-2, unit_lr=5e-3, schedule="onecycle"),
    # torchvision's reference training of MobileNetV2, on eight GPUs with 32 images each
    "mobilenetv2-imagenet": Recipe(epochs=300, batch_size=256, lr=0.045, unit_lr=4.5e-3, weight_decay=4e-5, decay_every=1, gamma=0.98),  # noqa: E501
    # Serra et al.: for ReLU stability; give l1. On CIFAR with their distortions. Half as long, the rate's steps at the
    # same shares of it
    "stability": Recipe(epochs=120, batch_size=128, weight_decay=0.0, decay_every=50, init="kaiming"),
    "stability-cifar": Recipe(epochs=120, batch_size=128, weight_decay=0.0, decay_every=50, init="kaiming", augment=("flip", "affine", "jitter")),  # noqa: E501
    # their autoencoders: from Kaiming's normal weights they end as one image for every input, from torch's they don't
    "stability-autoencoder": Recipe(epochs=120, batch_size=128, weight_decay=0.0, decay_every=50),
    "stability-short": Recipe(epochs=60, batch_size=128, weight_decay=0.0, decay_every=25, init="kaiming"),
    "stability-digits": Recipe(epochs=60, batch_size=32, weight_decay=0.0, decay_every=25, init="kaiming"),
    # ours, for a few epochs: units and ReLUs by one schedule; no decay, which would pull at p and at stability
    "linear-stable": Recipe(epochs=10, batch_size=256, lr=5e-2, unit_lr=5e-3, weight_decay=0.0, unit_weight_decay=0.0, schedule="onecycle", init="kaiming"),  # noqa: E501
    "linear-stable-l1": Recipe(epochs=10, batch_size=256, lr=5e-2, unit_lr=5e-3, weight_decay=0.0, unit_weight_decay=0.0, schedule="onecycle", init="kaiming", l1=0.001),  # noqa: E501
    "linear-stable-digits": Recipe(epochs=12, batch_size=32, lr=3e-2, unit_lr=3e-3, weight_decay=0.0, unit_weight_decay=0.0, schedule="onecycle", init="kaiming"),  # noqa: E501
    # Liu et al.'s code, of one cycle of pruning: up over 20,000 steps of 782 an epoch, cut short at epoch 25
    "ap": Recipe(epochs=50, batch_size=64, lr=0.1, schedule="milestones", warmup=20_000 / (50 * 782), milestones=(25, 32)),  # noqa: E501
    # ours, for a cycle of few epochs
    "prune-short": Recipe(epochs=2, batch_size=256, lr=1e-1, weight_decay=0.0, schedule="onecycle", init="kaiming"),
    "prune-digits": Recipe(epochs=8, batch_size=32, lr=5e-2, weight_decay=0.0, schedule="onecycle", init="kaiming"),
}  # fmt: skip
"""Named settings. LiNLNet's are the published code's; the short ones are ours and say so in tables."""


def recipe(name: str, epochs: int | None = None, **changes) -> Recipe:
    """A named recipe, with changes.

    Args:
        name: a key of `linl.train.RECIPES`.
        epochs: instead of its own; where its schedule has steps, they stay at the same epochs.
        changes: other settings of `Recipe` by name.

    Raises:
        ValueError: an unknown recipe or setting, or epochs below 1.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
    if epochs is not None:
        changes["epochs"] = epochs
    unknown = set(changes) - set(Recipe.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"a recipe has no {', '.join(sorted(unknown))}; it has {', '.join(Recipe.__dataclass_fields__)}"
        )
    made = replace(RECIPES[name], **changes)
    if made.epochs < 1:
        raise ValueError(f"epochs = {made.epochs}: must be at least 1")
    if made.batch_size < 1:
        raise ValueError(f"batch_size = {made.batch_size}: must be at least 1")
    if made.schedule not in SCHEDULES:
        raise ValueError(f"schedule = {made.schedule!r}: choose from {', '.join(SCHEDULES)}")
    for setting, known in (("loss", LOSSES), ("adversary", ("none", *ADVERSARIES)), ("optimizer", OPTIMIZERS)):
        if getattr(made, setting) not in known:
            raise ValueError(f"{setting} = {getattr(made, setting)!r}: choose from {', '.join(known)}")
    if strange := [name for name in made.augment if name not in DISTORTIONS]:
        raise ValueError(f"augment = {strange[0]}: choose from {', '.join(DISTORTIONS)}")
    for setting in ("l1", "eps", "attack_step", "stability", "stability_eps", "hint"):
        if not getattr(made, setting) >= 0:
            raise ValueError(f"{setting} = {getattr(made, setting)}: must be at least 0")
    if not 0 <= made.distill <= 1 or not made.temperature > 0:
        raise ValueError(f"distill = {made.distill}, temperature = {made.temperature}: from 0 to 1, and above 0")
    if made.hint and not made.distill:
        raise ValueError(f"hint = {made.hint} with distill = 0: hints are a teacher's, give distill a share")
    if made.distill and made.loss != "cross_entropy":
        raise ValueError(
            f"distill = {made.distill} with loss = {made.loss!r}: a teacher's outputs are taken as classes"
        )
    return made
