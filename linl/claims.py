"""Published claims beside our runs: a row a claim, with a verdict (`linl.verdicts`).

What the claims of the four systems share: `training_claims`, `folding_claims`, `stability_claims`, `proof_claims`,
`region_claims`, `pruning_claims`. Each function there takes the finished runs of one experiment (as `linl.results.runs`
gives them) and returns rows: system, claim, settings, published, ours, verdict, seeds, schedule, hardware, source, run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from linl.tables import machines, short


def row(
    system: str, claim: str, published: str, source: str, word: str = "not run", ours: str = "", schedule: str = "",
    *groups: pd.DataFrame, settings: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """One claim.

    Args:
        system, claim, published, source: whose it is, what it says, and where.
        word: the verdict.
        ours, schedule: our figures, and how they were trained.
        groups: the settings that it is compared with, each a row a seed.
        settings: how many published settings it stands for, where those that were not run share a row.
    """
    how = {"seeds": "", "schedule": schedule, "hardware": "", "source": source, "run": ""}
    if groups:
        runs = " ".join(short(group["key"].iloc[0]) for group in groups)
        how |= {
            "seeds": seeds_of(groups),
            "hardware": machines(pd.concat(groups).sort_values(["how_cpu", "how_threads"])),
            "run": runs,
        }
    told = {"system": system, "claim": claim, "settings": settings, "published": published}
    return {**told, "ours": ours, "verdict": word, **how}


def seeds_of(groups: Sequence[pd.DataFrame]) -> int | str:
    """How many seeds each setting has: 5, or "2 to 5"."""
    counts = sorted({len(group) for group in groups})
    return counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


@dataclass(frozen=True)
class Trained:
    """How a network was trained for a published figure.

    Attributes:
        epochs: how many.
        recipes: whose settings are the published ones.
        named: the parameters of an experiment that tell both.
    """

    epochs: int
    recipes: tuple[str, ...]
    named: tuple[str, str] = ("epochs", "recipe")

    def unlike(self, *groups: pd.DataFrame) -> str:
        """What is unlike in the runs of one or more settings, of `linl.verdicts.UNLIKE`; "" where nothing is."""
        told = [tuple(group.iloc[0][name] for name in self.named) for group in groups]
        if any(epochs < self.epochs for epochs, _ in told):
            return "shorter schedule"
        return "" if all(recipe in self.recipes for _, recipe in told) else "another recipe"

    def told(self, run: pd.Series) -> str:
        """A run's schedule beside the published one, with the images it was trained on and the precision, where they
        are recorded."""
        epochs, recipe = (run[name] for name in self.named)
        images, precision = run.get("train_images"), run.get("how_precision")
        how = [f"{images:,.0f} images"] if pd.notna(images) else []
        how += [precision] if isinstance(precision, str) and precision else []
        return ", ".join([f"{epochs} of {self.epochs} epochs", recipe, *how])


def setting(done: pd.DataFrame, trained: Trained, **where: Any) -> pd.DataFrame | None:
    """The runs of one setting on all images, a row a seed: of those with these parameters the one that was trained
    longest, then one by a published recipe, then the newest. None where there is none."""
    for name, value in {"limit": 0, **where}.items():
        if name in done:  # a run from before there was such a parameter had what is its default now
            done = done[(done[name] == value) | done[name].isna()]
    if done.empty:
        return None
    epochs, recipe = trained.named
    done = done.assign(published=done[recipe].isin(trained.recipes))
    best = done.sort_values([epochs, "published", "finished"]).iloc[-1]["key"]
    return done[done["key"] == best].sort_values("seed")
