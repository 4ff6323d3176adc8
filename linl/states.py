"""What is known of a network's activations on a box: every unit's state, its bounds, and the proof of it."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from linl.boxes import Box
from linl.branching import Leaves
from linl.checking import shown
from linl.files import atomic
from linl.pieces import STATES
from linl.witnesses import SOURCES, Witnesses

UNDECIDED, UNSTABLE = -2, -1
"""Codes of a unit's state; from 0 on, the number of the piece it stays in."""
PROOFS = ("", "interval", "crown", "optimized", "solver", "local", "branching")
"""What proved a unit stable, by number; an unstable unit's proof is where its witness came from."""
FORMAT = "linl stability 2"


@dataclass(repr=False)
class Stability:
    """What is known of every unit of every activation on a box.

    Attributes:
        names: of the activations, in the order of the forward pass.
        shapes: of their inputs, for one example.
        box: the domain.
        codes: for each activation (units,) int8: −2 undecided, −1 unstable, else the piece it stays in.
        proofs: for each activation (units,) int8, a number in `PROOFS`; 0 for units that aren't stable.
        lower, upper: for each activation (units,) float64, sound bounds of its input.
        when: for each activation (units,) float32, seconds into the analysis when the unit was settled.
        witnesses: the points that show units unstable.
        shares: slopes that "optimized" proofs and later ones need: (site, unit, sign) to shares by activation's target.
        trees: parts of the box that "branching" proofs go through: (site, unit, sign) to `linl.branching.Leaves`.
        seconds: by stage.
        method: which was asked for.
        notes: what went wrong or was left out, in words.
        fingerprint: of the network, `linl.program.Program.fingerprint`.
    """

    names: list[str]
    shapes: list[torch.Size]
    box: Box
    codes: list[Tensor]
    proofs: list[Tensor]
    lower: list[Tensor]
    upper: list[Tensor]
    when: list[Tensor]
    witnesses: Witnesses
    shares: dict[tuple[int, int, int], dict[int, Tensor]] = field(default_factory=dict)
    trees: dict[tuple[int, int, int], Leaves] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    method: str = "exact"
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""

    def refuse_other(self, network: str) -> None:
        """Nothing, if this is the state of the network with that fingerprint.

        Raises:
            ValueError: the state is of a network with another fingerprint.
        """
        if network != self.fingerprint:
            raise ValueError("the state is of another network, or its weights have changed since: analyse it anew")

    @property
    def table(self) -> pd.DataFrame:
        """A row a unit: layer, unit (flat position), lower, upper, state, proof, seconds until it was settled."""
        states = np.array(["undecided", "unstable", *STATES])
        parts = []
        for site, name in enumerate(self.names):
            codes, source = self.codes[site].numpy(), self.witnesses.source[site].numpy()
            proof = np.where(codes >= 0, np.array(PROOFS)[self.proofs[site].numpy()], np.array((*SOURCES, ""))[source])
            proof = np.where(codes == UNDECIDED, "", proof)
            parts.append(pd.DataFrame({
                "layer": name, "unit": np.arange(len(codes)), "lower": self.lower[site].numpy(),
                "upper": self.upper[site].numpy(), "state": states[codes + 2], "proof": proof,
                "seconds": self.when[site].numpy(),
            }))  # fmt: skip
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["layer", "unit", "state"])

    @property
    def summary(self) -> pd.DataFrame:
        """A row an activation: units, and how many are in each state."""
        rows = []
        for site, name in enumerate(self.names):
            counts = {state: int((self.codes[site] == code).sum()) for code, state in enumerate(STATES)}
            counts = {state: n for state, n in counts.items() if n or state != "saturated"}
            rest = {
                w: int((self.codes[site] == c).sum()) for c, w in ((UNSTABLE, "unstable"), (UNDECIDED, "undecided"))
            }
            rows.append({"layer": name, "units": len(self.codes[site]), **counts, **rest})
        return pd.DataFrame(rows).fillna(0).convert_dtypes()

    def witness(self, layer: str, unit: int) -> Tensor | None:
        """The two inputs that show a unit in a lower and in a higher piece, (2, *shape); None while there are none.

        Raises:
            ValueError: no such layer.
        """
        if layer not in self.names:
            raise ValueError(f"no activation {layer!r}: choose from {', '.join(self.names)}")
        site = self.names.index(layer)
        pair = [int(side[site][unit]) for side in (self.witnesses.low, self.witnesses.high)]
        return self.witnesses.points[pair] if min(pair) >= 0 else None

    @property
    def decided(self) -> bool:
        """Whether no unit is undecided."""
        return not any((codes == UNDECIDED).any() for codes in self.codes)

    def __repr__(self) -> str:
        return f"Stability on {self.box}:\n{self.summary.to_string(index=False)}"

    def _repr_html_(self) -> str:
        told = pd.DataFrame([{f"{stage}, s": round(s, 3) for stage, s in self.seconds.items()}])
        return shown(self.summary) + shown(told)

    # --- files -------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes everything to a folder: `stability-….safetensors` (numbers) and `stability.json` (the rest).

        The words name the file of numbers that belongs to them, and are written last: until then what was saved there
        before is whole, and so is what is there after.

        Returns: the folder.

        Raises:
            OSError: it can't be written (disk full); what was saved there before stays.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        tensors = {"box/lower": self.box.lower[0], "box/upper": self.box.upper[0], "points": self.witnesses.points}
        for site in range(len(self.names)):
            for name in _BY_SITE:
                tensors[f"{site}/{name}"] = getattr(self, name)[site]
            for name in _SEEN:
                tensors[f"{site}/{name}"] = getattr(self.witnesses, name)[site]
        for (site, unit, sign), shares in self.shares.items():
            for target, share in shares.items():
                tensors[f"share/{site}/{unit}/{sign}/{target}"] = share
        for (site, unit, sign), leaves in self.trees.items():
            for name, part in zip(_PARTS, leaves.parts, strict=True):
                tensors |= {f"tree/{site}/{unit}/{sign}/{target}/{name}": t for target, t in part.items()}
        numbers = folder / f"stability-{secrets.token_hex(4)}.safetensors"
        words = {
            "format": FORMAT, "names": self.names, "shapes": [list(shape) for shape in self.shapes],
            "method": self.method, "seconds": self.seconds, "notes": self.notes, "fingerprint": self.fingerprint,
            "numbers": numbers.name,
        }  # fmt: skip
        with atomic(numbers) as part:
            save_file({name: t.contiguous() for name, t in tensors.items()}, part)
        with atomic(folder / "stability.json") as part:
            part.write_text(json.dumps(words, indent=1) + "\n")
        for old in folder.glob("stability-*.safetensors"):
            if old != numbers:
                old.unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Stability:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: files that can't be read, or of another format.
        """
        from safetensors import safe_open

        folder = Path(folder)
        if not (folder / "stability.json").is_file():
            raise FileNotFoundError(f"no stability.json in {folder}: was state.save({str(folder)!r}) called?")
        try:
            words = json.loads((folder / "stability.json").read_text())
            with safe_open(folder / words["numbers"], "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise ValueError(f"{folder} can't be read as a saved stability ({error}): save it anew") from error
        if words.get("format") != FORMAT:
            raise ValueError(f"{folder} is of the format {words.get('format')!r}, this is {FORMAT!r}: save it anew")
        try:
            return cls._of(words, tensors)
        except KeyError as error:
            raise ValueError(f"{folder} lacks {error} of a saved stability: save it anew") from error

    @classmethod
    def _of(cls, words: dict, tensors: dict[str, Tensor]) -> Stability:
        sites = range(len(words["names"]))
        box = Box(tensors["box/lower"], tensors["box/upper"])
        seen = Witnesses(None, box)
        seen.points = tensors["points"]
        for name in _SEEN:
            setattr(seen, name, [tensors[f"{site}/{name}"] for site in sites])
        shares: dict[tuple[int, int, int], dict[int, Tensor]] = {}
        for key, share in tensors.items():
            if key.startswith("share/"):
                site, unit, sign, target = map(int, key.split("/")[1:])
                shares.setdefault((site, unit, sign), {})[target] = share
        trees: dict[tuple[int, int, int], Leaves] = {}
        for key, part in tensors.items():
            if key.startswith("tree/"):
                *where, target = map(int, key.split("/")[1:5])
                leaves = trees.setdefault(tuple(where), Leaves({}, {}, {}))
                getattr(leaves, key.rpartition("/")[2])[target] = part
        by_site = {name: [tensors[f"{site}/{name}"] for site in sites] for name in _BY_SITE}
        return cls(
            names=words["names"], shapes=[torch.Size(shape) for shape in words["shapes"]], box=box, **by_site,
            witnesses=seen, shares=shares, trees=trees, seconds=words["seconds"], method=words["method"],
            notes=words["notes"], fingerprint=words["fingerprint"],
        )  # fmt: skip


_PARTS = ("fixed", "share", "pull")
_BY_SITE = ("codes", "proofs", "lower", "upper", "when")
_SEEN = ("low", "high", "source")
