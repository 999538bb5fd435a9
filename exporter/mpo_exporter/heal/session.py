"""A healing in progress: the teacher, then single blocks, then the whole model and its bonds; resumed from checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mpo_exporter.heal.bonds import sort_bonds
from mpo_exporter.heal.checkpoint import (
    Record,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from mpo_exporter.heal.data import healing_data
from mpo_exporter.heal.ops import HealingOps, WindowOps
from mpo_exporter.heal.settings import BLOCK_SHARE, DEFAULT_TOKENS, FEWEST_STEPS, HealJob
from mpo_exporter.heal.student import Batch, BlockStudent, Stream, Student, fits
from mpo_exporter.heal.teacher import Lesson, TeacherFiles, check_teacher, matched_blocks
from mpo_exporter.heal.train import (
    FULL_RATE_STEPS,
    TRIAL_STEPS,
    Clock,
    Extent,
    NotFinite,
    Trainer,
    chosen_chi,
    chosen_windows,
    share_of,
)
from mpo_exporter.heal.trainable import Trainables
from mpo_exporter.heal.trials import Trials
from mpo_exporter.heal.workers import Progress, Workers
from mpo_exporter.source import Source
from mpo_formats import MpoFile
from mpo_runtime.loading import read_text_files
from mpo_runtime.models.registry import decoder_for

# Where minutes limit the training, the teacher may take this share of them, and single blocks see this many batches.
TEACHER_SHARE = 0.25
TIMED_BATCHES = 16
# The whole model is trained for at least this many seconds, even if teacher and blocks took all of the time.
SHORTEST = 1.0
# Integer cores are rounded onto new grids when bonds are sorted: after this share of the training, whose rest heals that.
SORT_AT = 0.8
# Windows on which the dependence of the loss on each block's output is measured (see output_fisher).
FISHER_WINDOWS = 16
# Windows whose activations weight the bonds when they are sorted.
SORT_WINDOWS = 16
# Of the teacher's outputs on disk; changed when what they mean changes.
MEANING = "relative errors"
# Before the names of parameters in a checkpoint, beside the optimizer's tensors.
MODEL = "model."


class Session:
    """One healing, with its open file and teacher.

    Args:
        job: what to heal and how.
        file: the opened file.
        source: the dense model, its teacher.
        workers: this process among those that share the work.

    Raises:
        CheckpointError: for a teacher of another architecture or vocabulary.
        ConfigError: for a text that cannot be read or is too short, or a checkpoint that is damaged or of another healing.
    """

    def __init__(self, job: HealJob, file: MpoFile, source: Source, workers: Workers, progress: Progress) -> None:
        self.job, self.file, self.source = job, file, source
        self.workers, self.progress = workers, progress
        self.settings, self.folder = job.settings, job.folder
        self.architecture = file.spec.architecture
        self.place = "the start"  # what is being done, for messages
        self.codes = self.settings.moves_codes(self.architecture.parameters())
        readers = read_text_files(file)
        check_teacher(source, self.architecture, readers[0])
        self.data = healing_data(job.text, readers, self.architecture, self.settings)
        self.text_tokens = len(self.data.windows) * self.data.span  # `_teach` drops windows that are not used
        self.teacher_sha256 = source.weights.sha256()
        contents = hashlib.sha256(file.array("mpo.checksums").tobytes()).hexdigest()
        digest = self.settings.digest(contents, self.teacher_sha256, self.data.digest)
        found = load_checkpoint(self.folder, digest, discard_other=job.discard_other)
        self.record, self.saved = found or (Record(digest), {})
        self.saved_step = None if found is None else self.record.step
        self.clock = Clock(self.record.seconds)
        steps, share, weight = self._steps(1.0), self.settings.block_share, self.settings.match_weight
        self.short = steps is not None and steps < FEWEST_STEPS
        self.block_share = (0.0 if self.short else BLOCK_SHARE) if share is None else share
        alone = weight == 0 or (weight is None and self.short)
        count = 0 if alone else self.settings.match_blocks
        self.matched = matched_blocks(self.architecture.num_hidden_layers, count)
        self.ops = HealingOps(file, workers.device)
        self.model = decoder_for(self.architecture, self.ops)
        self.names = [linear.name for linear in file.spec.linears] + [vector.name for vector in file.spec.vectors]
        self.learned: dict[str, Tensor] = {
            name.removeprefix(MODEL): tensor for name, tensor in self.saved.items() if name.startswith(MODEL)
        }

    def run(self) -> Trainables:
        """Trains; returns the trained layers and vectors.

        Raises:
            NotFinite: naming the step, and the last checkpoint before it, which is kept.
        """
        lesson = self._teach()
        try:
            self._heal_blocks(lesson.fisher)
            return self._heal_whole(lesson)
        except NotFinite as error:
            raise NotFinite(
                f"{error}; {self._kept()}; give lower learning rates (--rate 0.3) or a lower --cross-entropy, "
                f"after removing {self.folder}: with other settings healing begins anew"
            ) from None

    def _kept(self) -> str:
        """Where the last checkpoint is, in words."""
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, after step {self.saved_step}, is in {self.folder}"

    def _tokens(self) -> float | None:
        """Tokens to train on in total; None where time limits the training."""
        if self.settings.minutes is not None:
            return None
        if self.settings.epochs is not None:
            return self.settings.epochs * self.text_tokens
        return self.settings.tokens or DEFAULT_TOKENS

    def _steps(self, share: float) -> int | None:
        """Optimizer steps that a share of the tokens makes; None where time limits the training."""
        tokens = self._tokens()
        return None if tokens is None else round(share * tokens / (self.settings.batch * self.data.span))

    def _whole_steps(self) -> int | None:
        steps = self._steps(1 - self.block_share)
        return None if steps is None else max(steps, 1)

    def _seconds(self) -> float | None:
        return None if self.settings.minutes is None else 60 * self.settings.minutes

    def _teach(self) -> Lesson:
        """Runs the teacher on the windows that will be used, and drops the other windows."""
        self.place = "the teacher"
        steps, weighs = self._whole_steps(), bool(self.matched) or self.block_share > 0
        weighed = self.data.windows[:FISHER_WINDOWS] if weighs else None  # independent of the training's length
        if steps is not None:
            used = max(steps, self._steps(self.block_share) or 0) * self.settings.batch
            self.data = self.data.first(used)
        shape = (len(self.data.windows), self.data.span, min(self.settings.top_k, self.architecture.vocab_size))
        asked = (MEANING, self.teacher_sha256, self.data.digest, self.settings.seed, *shape[1:], self.matched, weighs)
        key = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        files = TeacherFiles(self.folder, key, shape, self.architecture, self.matched)
        seconds = self._seconds()

        def enough() -> bool:
            return self.clock.seconds() > TEACHER_SHARE * (seconds or 0)

        done = 0
        if self.workers.first:
            done = files.write(
                self.source.weights,
                self.data.windows,
                weighed,
                batch=self.settings.micro_batch,
                device=self.workers.device,
                progress=self.progress,
                enough=None if seconds is None else enough,
            )
        self.data = self.data.first(int(self.workers.agree(done)))
        return files.open()

    def _heal_blocks(self, fisher: Tensor) -> None:
        """Trains each block alone to reproduce the dense model's block output, given the healed blocks before it.

        Args:
            fisher: F [blocks, E]; the loss ½ Σ F e² is the KL that an output's relative errors e are expected to cause.
        """
        blocks = self.architecture.num_hidden_layers
        steps = self._steps(self.block_share)
        if self.record.step or self.record.blocks == blocks or self.block_share == 0 or steps == 0:
            return
        count = (TIMED_BATCHES if steps is None else steps) * self.settings.batch
        inputs = self.data.windows[:count, :-1]
        here = self.folder / f"process-{self.workers.rank}"
        here.mkdir(exist_ok=True)
        device = self.workers.device
        # On a CPU the dense matrices are rebuilt for each use, which saves memory; a GPU would have to wait for that.
        held = None if device.startswith("cuda") else False
        dense = decoder_for(self.source.architecture, WindowOps(self.source.weights, held=held, device=device))
        ours, theirs = (
            Stream(model, inputs, here / name, self.settings.micro_batch, device)
            for model, name in ((self.model, "healed.states"), (dense, "dense.states"))
        )
        seconds = self._seconds()
        each = None if seconds is None else seconds * self.block_share / blocks
        self.ops.trainables = None
        fisher = fisher.to(device)
        ours.embed()
        theirs.embed()
        for block in range(blocks):
            names = [name for name in self.names if name.startswith(f"model.layers.{block}.")]
            # Codes are frozen here: trained on a single block's output, they raised the KL of the whole model (docs/log.md).
            parts = Trainables(self.file, names, moving=False)
            parts.to(device)
            self.ops.trainables, self.ops.chi = parts, None
            theirs.advance(block)
            if block < self.record.blocks:
                parts.load_state_dict(self.learned, strict=False)
            else:
                student = BlockStudent(self.model, self.ops, parts, block)
                self._heal_block(student, (ours, theirs), Extent(steps, each), fisher[block])
            self.ops.trainables = parts
            ours.advance(block)
        for name in ("healed.states", "dense.states"):
            (here / name).unlink()

    def _heal_block(
        self, student: BlockStudent, streams: tuple[Stream, Stream], extent: Extent, fisher: Tensor
    ) -> None:
        """Trains one block; `streams` are its inputs in the healed model and its outputs in the dense one."""
        settings, device, block = self.settings, self.workers.device, student.block
        ours, theirs = streams
        trainer = Trainer(student, student.trainables, settings, self.workers)
        weight = fisher / (2 * settings.batch * ours.states.shape[1])

        def batches(step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
            rows = chosen_windows(ours.states.shape[0], settings.batch, step, settings.seed)
            return [
                (ours.read(part).to(device), theirs.read(part).to(device), weight)
                for part in share_of(rows, settings, self.workers)
            ]

        begin, step, curve = self.clock.seconds(), 0, list[float]()
        trainer.tame(batches(0))
        while (done := self.workers.agree(extent.done(step, self.clock.seconds() - begin))) < 1:
            self.place = f"step {step + 1} of block {block}"
            loss, _ = trainer.step(batches(step), done, None, self.place)
            curve.append(loss)
            step += 1
            self.progress(f"block {block}", done, f"expected KL {loss:.5f}")
        self.learned.update({name: tensor.detach() for name, tensor in student.trainables.state_dict().items()})
        self.record.blocks = block + 1
        self.record.block_curves.append(curve)
        # A step of one block counts as its share of a step of the whole model.
        blocks = self.architecture.num_hidden_layers
        self.record.tokens += round(step * settings.batch * self.data.span / blocks)
        self._save({MODEL + name: tensor for name, tensor in self.learned.items()})

    def _heal_whole(self, lesson: Lesson) -> Trainables:
        """Trains all layers and vectors together on the teacher's outputs, and puts the bonds in order."""
        settings, record = self.settings, self.record
        everything = Trainables(self.file, self.names, moving=self.codes)
        everything.aim(self.source.weights)
        everything.to(self.workers.device)
        student = self._student(everything, lesson.fisher)
        trainer = Trainer(student, everything, settings, self.workers, fixed=not student.recompute)
        if record.step:
            everything.load_state_dict(self.learned, strict=False)
            if not record.matches:
                student.matched = {}
            trainer.set_core_factor(record.core_factor)
            trainer.walking_factor = record.walking_factor
            trainer.set_rates(record.rates)
            restore_optimizer(trainer.optimizer, self.saved)
        else:
            short = self.short or self._time_is_short(trainer, self._batches(0, lesson))
            batches = [self._batches(step, lesson) for step in range(2 if short else 2 * TRIAL_STEPS)]
            trials = Trials(student, trainer, batches, lambda words: self.progress("healing", 0, words))
            if self.learned:
                trials.keep_blocks(self.learned)
            if short:
                if settings.match_weight is None:
                    student.matched = {}
                trials.tame()
            else:
                trials.choose(self._whole_steps() or FULL_RATE_STEPS, given=settings.match_weight is not None)
            record.matches = bool(student.matched)
            record.core_factor, record.walking_factor = trainer.core_factor, trainer.walking_factor
            record.began = self.clock.seconds()
        self.saved = {}
        seconds = self._seconds()
        left = None if seconds is None else max(seconds - record.began, SHORTEST)
        extent = Extent(self._whole_steps(), left)
        largest = self.file.spec.largest_bond()
        begin, first = self.clock.seconds(), record.step
        while (done := self.workers.agree(extent.done(record.step, self.clock.seconds() - record.began))) < 1:
            if done >= SORT_AT and not record.ordered:
                self._sort(everything, exact=False)
                trainer.restart()
                record.ordered = True
            self.place = f"step {record.step + 1}"
            chi = chosen_chi(settings, largest, record.step)
            # Where time limits the training, its number of steps is estimated from the speed so far.
            steps = extent.steps or record.step / max(done, 1e-9)
            loss, kl = trainer.step(self._batches(record.step, lesson), done, chi, self.place, steps)
            record.curve.append(loss)
            record.step += 1
            record.tokens += settings.batch * self.data.span
            speed = (record.step - first) * settings.batch * self.data.span / max(self.clock.seconds() - begin, 1e-9)
            self.progress("healing", done, f"step {record.step}  loss {loss:.4f}  KL {kl:.4f}  {speed:,.0f} tokens/s")
            if record.step % settings.checkpoint_steps == 0:
                record.rates = trainer.rates()
                tensors = {MODEL + name: tensor for name, tensor in everything.state_dict().items()}
                self._save({**tensors, **optimizer_tensors(trainer.optimizer)})
        self.place = "sorting the bonds"
        self._sort(everything, exact=True)
        record.seconds = self.clock.seconds()
        return everything

    def _time_is_short(self, trainer: Trainer, batch: Sequence[Batch]) -> bool:
        """Whether time limits the training to about less than FEWEST_STEPS steps, each of three forward passes' time."""
        if (seconds := self._seconds()) is None:
            return False
        begin = self.clock.seconds()
        trainer.kl([batch])
        now = self.clock.seconds()
        return bool(self.workers.agree(seconds - now < FEWEST_STEPS * 3 * (now - begin)))

    def _student(self, everything: Trainables, fisher: Tensor) -> Student:
        """The whole model with its loss; F [blocks, E] weights the errors of the matched blocks' outputs."""
        settings, device = self.settings, self.workers.device
        recompute = settings.recompute
        if recompute is None:
            recompute = not fits(self.architecture, settings.micro_batch, self.data.span, device)
        tokens = len(self.data.windows) * self.data.span
        share = settings.matching(self.architecture.parameters(), tokens) / (2 * max(len(self.matched), 1))
        matched = {block: share * fisher[block].to(device) for block in self.matched}
        return Student(
            self.model, self.ops, everything, cross_entropy=settings.cross_entropy, recompute=recompute, matched=matched
        )

    def _sort(self, trainables: Trainables, *, exact: bool) -> None:
        if self.file.spec.largest_bond():
            inputs = self.data.windows[:SORT_WINDOWS, :-1]
            sort_bonds(self.model, self.ops, trainables, inputs, exact=exact)
            self.workers.copy(trainables)

    def _batches(self, step: int, lesson: Lesson) -> list[Batch]:
        """This process's share of a step's windows, in micro-batches."""
        settings, device = self.settings, self.workers.device
        rows = chosen_windows(len(self.data.windows), settings.batch, step, settings.seed)
        total = float(self.data.counts[rows].sum())
        matches = bool(self.matched) and self.record.matches
        batches = []
        for part in share_of(rows, settings, self.workers):
            ids = torch.from_numpy(self.data.windows[part]).to(device)
            weight = torch.from_numpy(self.data.counts[part] / total).to(device)
            top = torch.from_numpy(lesson.scores[part].astype(np.float32)).to(device)
            tokens = torch.from_numpy(lesson.chosen[part].astype(np.int64)).to(device)
            states = torch.from_numpy(lesson.states[part]).view(torch.bfloat16).to(device) if matches else None
            batches.append(Batch(ids[:, :-1], ids[:, 1:], weight, top, tokens, states))
        return batches

    def _save(self, tensors: dict[str, Tensor]) -> None:
        self.record.seconds = self.clock.seconds()
        if self.workers.first:
            save_checkpoint(self.folder, self.record, tensors)
        self.saved_step = self.record.step

    def facts(self) -> dict[str, str]:
        """What the healed file's provenance says about the healing."""
        settings, record = self.settings, self.record
        facts = {
            "healed_tokens": str(record.tokens),
            "healed_minutes": f"{record.seconds / 60:.1f}",
            "healed_teacher_sha256": self.teacher_sha256,
            "healed_text": self.data.name,
            "healed_text_sha256": self.data.sha256,
            "healed_codes": "trained" if self.codes else "frozen",
        }
        if settings.chi_dropout:
            facts["healed_chi_dropout"] = str(settings.chi_dropout)
        if settings.cores_first:
            facts["healed_cores_first"] = str(settings.cores_first)
        return facts
