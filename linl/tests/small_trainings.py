"""A training of seconds, and whether two of them gave the same figures."""

import pandas as pd
import torch

import linl

SMALL = {"epochs": 3, "batch_size": 32, "lr": 0.05, "unit_lr": 5e-3, "schedule": "onecycle"}


def setting(name="mlp", **data):
    digits = linl.data.load("digits", limit=128, **data)
    torch.manual_seed(0)
    return linl.linearize(linl.models.create(name, 10, digits.input_size, width=0.125), "linlu"), digits


def same(a, b):
    columns = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"]
    pd.testing.assert_frame_equal(a[columns], b[columns], check_exact=True)
