"""A model to begin with: put yours in its place."""

import torch


def classifier() -> torch.nn.Module:
    """Four numbers to the probabilities of three classes; with weights of yours it would load them here."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3), torch.nn.Softmax(dim=1)]
    return torch.nn.Sequential(*layers)
