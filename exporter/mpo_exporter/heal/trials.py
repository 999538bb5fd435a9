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
# What the rates of integers and scales are multiplied by, one after the other, while a trial raises the KL.
WALKING_FACTORS = (0.3, 0.1, 0.03)


@dataclass(frozen=True, slots=True)
class Trials:
    """A student before its training.

    Args:
        batches: of the first 2 · TRIAL_STEPS steps: half of them to train on, half to measure on. `keep_blocks` and `tame` are
            content with one.
        say: told what was found.
    """

    student: Student
    trainer: Trainer
    batches: Sequence[Sequence[Batch]]
    say: Callable[[str], None]

    def keep_blocks(self, learned: Mapping[str, Tensor]) -> None:
        """Takes over what blocks learned one by one, unless it raises the KL of the whole model."""
        parts, unseen = self.student.trainables, self.batches[TRIAL_STEPS:] or self.batches
        before = self.trainer.kl(unseen)
        untrained = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
        parts.load_state_dict(learned, strict=False)
        after = self.trainer.kl(unseen)
        self.say(f"KL {before:.4f}, {after:.4f} with single blocks trained")
        if after > before:
            parts.load_state_dict(untrained)

    def tame(self) -> None:
        """Lowers the rate of cores until a first step does not raise the loss."""
        self.trainer.tame(self.batches[0])
        self._say_core_factor()

    def choose(self, steps: float, *, given: bool) -> None:
        """Stops matching blocks where a trial without that ends at a lower KL; lowers rates that raise the KL.

        Args:
            steps: the number of steps that the training will have.
            given: the user chose the weight of matched blocks: they stay.
        """
        student, trainer, unseen = self.student, self.trainer, self.batches[TRIAL_STEPS:]
        before = trainer.kl(unseen)
        choices = [student.matched, {}] if student.matched and not given else [student.matched]
        found = []
        for student.matched in choices:
            trainer.set_core_factor(1.0)
            trainer.tame(self.batches[0])
            found.append((self._trial(steps), trainer.core_factor))
        best = 0 if found[0][0] <= AS_GOOD * found[-1][0] else 1
        if len(found) == 2:
            self.say(f"KL after a few steps {found[0][0]:.4f} with blocks matched, {found[1][0]:.4f} without")
        student.matched, kl = choices[best], found[best][0]
        trainer.set_core_factor(found[best][1])
        self._say_core_factor()
        for factor in WALKING_FACTORS:
            if kl <= before:
                break
            trainer.walking_factor = factor
            self.say(f"integers learn at {factor:g} of their rate: more raised the KL from {before:.4f} to {kl:.4f}")
            kl = self._trial(steps)

    def _say_core_factor(self) -> None:
        if (factor := self.trainer.core_factor) < 1:
            self.say(f"cores learn at {factor:g} of their rate: more would raise the loss")

    def _trial(self, steps: float) -> float:
        return self.trainer.trial(self.batches[:TRIAL_STEPS], self.batches[TRIAL_STEPS:], steps)
