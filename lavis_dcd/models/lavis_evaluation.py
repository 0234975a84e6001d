"""LAVIS's evaluation hooks for any matcher that is a LAVIS model."""

from __future__ import annotations

from typing import Any

import numpy as np

from lavis_dcd.matching.scoring import score_dataset


class LavisEvaluation:
    """A mix-in: what LAVIS's own ``RetrievalTask`` and runners call on a model."""

    def before_evaluation(self, **kwargs: Any) -> None:
        """LAVIS's hook; nothing to prepare."""

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Image-to-text scores ``[I, T]`` and text-to-image scores ``[T, I]``, float32.

        Args:
            data_loader: over an evaluation data set (``.text``; samples with ``image``).
            task_cfg: LAVIS's ``run:`` section; ``k_test`` reranks that many of the joint space's best, without it
                every pair is matched.

        Raises:
            UserError: ``k_test`` for a model without a joint space.
        """
        k_test = task_cfg.get("k_test") if task_cfg is not None else None
        scores = score_dataset(self, data_loader.dataset, k_test=k_test, device=self.device)
        return scores[0].numpy(), scores[1].numpy()
