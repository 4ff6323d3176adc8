"""Weights and checkpoints as files: written whole or not at all, read without running code, never mistaken.

What a file belongs to stands in it, as its "identity": settings, seed and data of the training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from linl.files import atomic, first_line
from linl.identities import refuse_other


def save_weights(net: nn.Module, path: Path, training: dict | None = None) -> None:
    """The state_dict as safetensors; how it was trained goes into the file's metadata."""
    from safetensors.torch import save_file

    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in net.state_dict().items()
    }
    with atomic(path) as part:
        save_file(tensors, part, {"training": json.dumps(training or {})})


def read_weights(path: Path, identity: dict) -> dict[str, torch.Tensor]:
    """The state_dict in a file of `save_weights`.

    Raises:
        ValueError: it can't be read, or is of another training than this one.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            training = json.loads((file.metadata() or {}).get("training", "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"{path} can't be read ({first_line(error)}): delete it to start anew") from error
    refuse_other(path, training, identity)
    return state


def read_checkpoint(path: Path, identity: dict) -> dict:
    """What a checkpoint file holds.

    Raises:
        ValueError: it can't be read, or its own "identity" is another than this one.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} can't be read ({first_line(error)}): delete it to start anew"
        ) from error
    found = saved.get("identity") if isinstance(saved, dict) else None
    refuse_other(path, found if isinstance(found, dict) else {}, identity)
    return saved


def plain_numbers(numbers_by_name: Mapping) -> dict:
    """Numbers as Python's own, which a checkpoint holds without running code."""
    return {str(k): v.item() if hasattr(v, "item") else v for k, v in numbers_by_name.items()}


def load_state(path: Path, net: nn.Module, state: dict) -> None:
    """Loads a state_dict.

    Raises:
        ValueError: it is of another network.
    """
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} belongs to another network ({' '.join(str(error).split()[:30])}): use another folder, or "
            "delete it to start anew"
        ) from error
