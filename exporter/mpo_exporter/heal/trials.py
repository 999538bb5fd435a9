"""What is tried before the first step of the whole model, so that only what helps this model is used.

On some models, really trained ones among them, the Fisher information overrates the errors of blocks so far that lowering
these raises the KL of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mpo_exporter.heal.student import Batch, Student
from mpo_exporter.heal.train import TRIAL_STEPS, Trainer

# Blocks are matched if a trial with that ends with at most so many times the KL of one without.
AS_GOOD = 1.01


@dataclass(frozen=True, slots=True)
class Trials:
    """A student before its training.

    Args:
        batches: of the first 2 · TRIAL_STEPS steps: half of them to train on, half to measure on.
        say: told what was found.
    """

    student: Student
    trainer: Trainer
    batches: Sequence[Sequence[Batch]]
    say: Callable[[str], None]

    def keep_blocks(self, learned: Mapping[str, Tensor]) -> None:
        """Takes over what blocks learned one by one, unless it raises the KL of the whole model."""
        parts, unseen = self.student.trainables, self.batches[TRIAL_STEPS:]
        before, untrained = (
            self.trainer.kl(unseen),
            {name: tensor.clone() for name, tensor in parts.state_dict().items()},
        )
        parts.load_state_dict(learned, strict=False)
        after = self.trainer.kl(unseen)
        self.say(f"KL {before:.4f}, {after:.4f} with single blocks trained")
        if after > before:
            parts.load_state_dict(untrained)

    def choose_matching(self, steps: float, *, given: bool) -> None:
        """Stops matching blocks where a trial without that ends at a lower KL; sets the rate of cores for what is chosen.

        Args:
            steps: the number of steps that the training will have.
            given: the user chose the weight of matched blocks: nothing is tried.
        """
        student, trainer = self.student, self.trainer
        choices = [student.matched, {}] if student.matched and not given else [student.matched]
        found = []
        for student.matched in choices:
            trainer.set_core_factor(1.0)
            trainer.tame(self.batches[0])
            kl = (
                trainer.trial(self.batches[:TRIAL_STEPS], self.batches[TRIAL_STEPS:], steps)
                if len(choices) == 2
                else 0.0
            )
            found.append((kl, trainer.core_factor))
        best = 0
        if len(choices) == 2:
            with_blocks, without = found[0][0], found[1][0]
            self.say(f"KL after a few steps {with_blocks:.4f} with blocks matched, {without:.4f} without")
            best = 0 if with_blocks <= AS_GOOD * without else 1
        student.matched = choices[best]
        trainer.set_core_factor(found[best][1])
        if trainer.core_factor < 1:
            self.say(f"cores learn at {trainer.core_factor:g} of their rate: more would raise the loss")
