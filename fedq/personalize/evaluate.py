"""Tests a client's model on its own classes.

A client's validation and test sets are the images of the classes that it holds, weighted so that each class counts as
much as among its training images: the accuracy that it would see on more of its own data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.data import Split, batches
from fedq.federated.evaluate import Evaluator, Scores


@dataclass(frozen=True)
class PersonalEvaluator:
    """How clients' models are evaluated, each on one rank.

    Args:
        evaluator: Evaluator, which gives arithmetic and batch size.
        label_counts: Number of training images of each client and class, int64 [clients, classes].
    """

    evaluator: Evaluator
    label_counts: Tensor

    def classes(self, client: int) -> list[int]:
        """Return the classes of which a client has training images."""
        return self.label_counts[client].nonzero().flatten().tolist()

    def class_means(self, model: nn.Module, split: Split, classes: list[int] | None = None) -> Tensor:
        """Return mean loss and accuracy on each class's images, float64 [classes, 2].

        Args:
            model: Model, which is put into eval mode.
            split: Images and labels.
            classes: Classes to evaluate; None: all. Of the others, and of those without an image, the means are NaN.
        """
        device, num_classes = next(model.parameters()).device, self.label_counts.shape[1]
        wanted = torch.arange(num_classes) if classes is None else torch.tensor(classes)
        chosen = torch.isin(split.labels, wanted.to(split.labels.device)).nonzero().flatten()
        sums = torch.zeros(num_classes, 3, dtype=torch.float64, device=device)
        model.eval()
        with torch.no_grad():
            for batch in batches(len(chosen), self.evaluator.batch_size):
                picked = chosen[batch.to(chosen.device)]
                labels = split.labels[picked].to(device)
                sums.index_add_(0, labels, self._examples(model, split.images[picked].to(device), labels))
        return (sums[:, :2] / sums[:, 2:]).cpu()

    def score(self, client: int, class_means: Tensor) -> Scores:
        """Return a client's scores on its own classes; NaN if there is no image of them.

        Args:
            client: Number of the client.
            class_means: Means of the client's model by class, from `class_means`.
        """
        counts = self.label_counts[client].double()
        known = (counts > 0) & ~class_means[:, 0].isnan()
        if not known.any():
            return Scores(math.nan, math.nan)
        shares = counts[known] / counts[known].sum()
        loss, accuracy = (shares @ class_means[known]).tolist()
        return Scores(loss, accuracy, float(class_means[known, 1].mean()))

    def _examples(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return loss, whether correct, and 1 of each image, float64 [N, 3]."""
        logits = self.evaluator.logits(model, images)
        loss = functional.cross_entropy(logits, labels, reduction="none")
        return torch.stack((loss, (logits.argmax(1) == labels), torch.ones_like(loss)), dim=1).double()
