"""Scores that tell of trouble before the recalls do: warnings in a training job's log."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

DEAD_SPREAD = 1e-6  # of the largest score
STEPS_TO_JUDGE = 5  # fewer say nothing
CHANCE = 0.5  # the share of the other candidates that stand above a match placed at random


class ScoreWatch:
    """Warns once, in plain words, of a student without opinions and of a teacher without knowledge."""

    def __init__(self) -> None:
        self._dead_steps = 0
        self._rank, self._rank_steps = 0.0, 0
        self._told: set[str] = set()

    def see(self, means: Mapping[str, float], steps: int) -> None:
        """The means of `steps` further steps: of "student_spread" and "teacher_match_rank", where there are such."""
        if "student_spread" in means:
            self._dead_steps = self._dead_steps + steps if means["student_spread"] < DEAD_SPREAD else 0
            if self._dead_steps >= STEPS_TO_JUDGE:
                self._tell(
                    "student",
                    f"the student scores all candidates of a query alike ({self._dead_steps} steps now): it learns "
                    "nothing; look at its weights, at run.init_lr, and at whether its inputs differ at all",
                )
        if "teacher_match_rank" in means:
            self._rank += means["teacher_match_rank"] * steps
            self._rank_steps += steps
            if self._rank_steps >= STEPS_TO_JUDGE:
                self._judge_teacher(self._rank / self._rank_steps)
                self._rank, self._rank_steps = 0.0, 0

    def _judge_teacher(self, rank: float) -> None:
        if rank > CHANCE:
            self._tell(
                "teacher",
                f"the teacher is worse than chance: {100 * rank:.0f} % of the other candidates stand above the match, "
                "50 % would at random; look at its weights, its processors, and whether captions and pictures belong "
                "together",
            )

    def _tell(self, who: str, words: str) -> None:
        if who not in self._told:
            self._told.add(who)
            logger.warning("%s", words)
