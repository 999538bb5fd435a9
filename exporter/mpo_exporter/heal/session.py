"""A healing under way: single blocks, then the whole model, then the bonds; resumable at every checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.heal.blocks import Stream, block_names
from mpo_exporter.heal.bonds import sort_bonds
from mpo_exporter.heal.checkpoint import (
    Record,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from mpo_exporter.heal.data import pack_windows, read_healing_text
from mpo_exporter.heal.distributed import Workers
from mpo_exporter.heal.ops import HealingOps, WindowOps
from mpo_exporter.heal.progress import Progress
from mpo_exporter.heal.settings import DEFAULT_TOKENS, Settings
from mpo_exporter.heal.student import Batch, BlockStudent, Student, fits
from mpo_exporter.heal.teacher import Lesson, TeacherFiles, check_teacher, matched_blocks
from mpo_exporter.heal.train import Clock, Extent, NotFinite, Trainer, chosen_chi, chosen_windows, share_of
from mpo_exporter.heal.trainable import Trainables
from mpo_formats import MpoFile
from mpo_runtime.loading import read_text_files
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

# Where minutes bound the training, the teacher may take this share of them, and blocks see so many batches of text.
TEACHER_SHARE = 0.25
TIMED_BATCHES = 16
# Seconds that the whole model is trained for at least, where teacher and blocks took all of the time on a busy machine.
SHORTEST = 1.0
# Integer cores are rounded onto new grids when bonds are sorted: after this share of the training, which heals that.
SORT_AT = 0.8
# Windows that errors of the blocks' outputs are weighed by.
FISHER_WINDOWS = 16
# Windows whose activations weigh the bonds.
SORT_WINDOWS = 16
MODEL = "model."


@dataclass(frozen=True, slots=True)
class Data:
    """What is learned from: windows [N, W] in a random order, the weights of their predictions [N, W − 1], digests.

    `sha256` is that of the text's source, `digest` that of the windows and weights that were made of it.
    """

    windows: NDArray[np.int64]
    counts: NDArray[np.float32]
    name: str
    sha256: str
    digest: str

    @property
    def span(self) -> int:
        """Tokens that a window feeds to the model."""
        return int(self.windows.shape[1]) - 1


class Session:
    """One healing of `file` against `source`, whose checkpoints lie in `folder`."""

    def __init__(
        self,
        file: MpoFile,
        source: Checkpoint,
        settings: Settings,
        text: Path | TokenText | None,
        folder: Path,
        workers: Workers,
        progress: Progress,
        *,
        others: bool = False,
    ) -> None:
        self.file, self.source, self.settings, self.folder = file, source, settings, folder
        self.workers, self.progress = workers, progress
        self.place = "its start"
        self.codes = settings.moves_codes(file.spec.architecture.parameters())
        tokenizer, template = read_text_files(file)
        check_teacher(
            source.folder.name,
            file.spec.architecture,
            source.spec.architecture,
            (tokenizer, read_text_files(source)[0]),
        )
        words = read_healing_text(text, tokenizer, template, assistant_only=settings.assistant_only)
        windows, counts = pack_windows(words, file.spec.architecture, settings.window, settings.batch)
        order = np.random.default_rng(settings.seed).permutation(len(windows))
        packed = hashlib.sha256(windows.tobytes() + counts.tobytes()).hexdigest()
        self.data = Data(windows[order], counts[order, 1:].astype(np.float32), words.name, words.sha256, packed)
        self.teacher_sha256 = source.sha256()
        contents = hashlib.sha256(file.array("mpo.checksums").tobytes()).hexdigest()
        digest = settings.digest(contents, self.teacher_sha256, packed)
        found = load_checkpoint(folder, digest, others=others)
        self.record, self.saved = found or (Record(digest), {})
        self.saved_step = None if found is None else self.record.step
        self.clock = Clock(self.record.seconds)
        self.matched = matched_blocks(
            file.spec.architecture.num_hidden_layers, 0 if settings.match_weight == 0 else settings.match_blocks
        )
        self.ops = HealingOps(file, workers.device)
        self.model = decoder_for(file.spec.architecture, self.ops)
        self.names = [linear.name for linear in file.spec.linears] + [vector.name for vector in file.spec.vectors]
        self.learned: dict[str, Tensor] = {
            name.removeprefix(MODEL): tensor for name, tensor in self.saved.items() if name.startswith(MODEL)
        }

    def run(self) -> Trainables:
        """Trains; returns what was learned.

        Raises:
            NotFinite: naming the step, and the checkpoint before it, which stays.
        """
        lesson = self._teach()
        try:
            self._heal_blocks(lesson.felt)
            return self._heal_whole(lesson)
        except NotFinite as error:
            raise NotFinite(
                f"{error}; {self._kept()}; give lower learning rates (--rate 0.3) or a lower --cross-entropy, "
                f"after removing {self.folder}: with other settings healing begins anew"
            ) from None

    def _kept(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, after step {self.saved_step}, is in {self.folder}"

    def _tokens(self) -> float | None:
        """Tokens to train on in all; None where time bounds the training."""
        if self.settings.minutes is not None:
            return None
        if self.settings.epochs is not None:
            return self.settings.epochs * len(self.data.windows) * self.data.span
        return self.settings.tokens or DEFAULT_TOKENS

    def _steps(self, share: float) -> int | None:
        tokens = self._tokens()
        return None if tokens is None else round(share * tokens / (self.settings.batch * self.data.span))

    def _whole_steps(self) -> int | None:
        steps = self._steps(1 - self.settings.block_share)
        return None if steps is None else max(steps, 1)

    def _seconds(self) -> float | None:
        return None if self.settings.minutes is None else 60 * self.settings.minutes

    def _teach(self) -> Lesson:
        """What the teacher says of the windows that will be used; drops the others."""
        self.place = "the teacher"
        steps, weighs = self._whole_steps(), bool(self.matched) or self.settings.block_share > 0
        weighed = self.data.windows[:FISHER_WINDOWS] if weighs else None  # whatever the length of the training
        if steps is not None:
            self._keep(
                min(
                    len(self.data.windows),
                    max(steps, self._steps(self.settings.block_share) or 0) * self.settings.batch,
                )
            )
        of = self.file.spec.architecture
        shape = (len(self.data.windows), self.data.span, min(self.settings.top_k, of.vocab_size))
        asked = (self.teacher_sha256, self.data.digest, self.settings.seed, *shape[1:], self.matched, weighs)
        key = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        files = TeacherFiles(self.folder, key, shape, of, self.matched)
        seconds = self._seconds()

        def enough() -> bool:
            return self.clock.seconds() > TEACHER_SHARE * (seconds or 0)

        done = 0
        if self.workers.first:
            done = files.write(
                self.source,
                self.data.windows,
                weighed,
                batch=self.settings.micro_batch,
                device=self.workers.device,
                progress=self.progress,
                enough=None if seconds is None else enough,
            )
        self._keep(int(self.workers.agree(done)))
        return files.open()

    def _keep(self, count: int) -> None:
        self.data = replace(self.data, windows=self.data.windows[:count], counts=self.data.counts[:count])

    def _heal_blocks(self, felt: Tensor) -> None:
        """Heals one block after the other; F [blocks, E] weighs the errors of their outputs."""
        blocks = self.file.spec.architecture.num_hidden_layers
        steps = self._steps(self.settings.block_share)
        if self.record.step or self.record.blocks == blocks or self.settings.block_share == 0 or steps == 0:
            return
        count = (TIMED_BATCHES if steps is None else steps) * self.settings.batch
        inputs = self.data.windows[:count, :-1]
        here = self.folder / f"process-{self.workers.rank}"
        here.mkdir(exist_ok=True)
        of, device = self.source.spec.architecture, self.workers.device
        # A CPU rebuilds matrices fast enough to save their memory; a GPU would wait for each.
        held = None if device.startswith("cuda") else False
        dense = decoder_for(of, WindowOps(self.source, held=held, device=device))
        ours, theirs = (
            Stream(model, inputs, here / name, self.settings.micro_batch, self.workers.device)
            for model, name in ((self.model, "healed.states"), (dense, "dense.states"))
        )
        seconds = self._seconds()
        each = None if seconds is None else seconds * self.settings.block_share / blocks
        self.ops.trainables = None
        felt = felt.to(self.workers.device)
        ours.embed()
        theirs.embed()
        for block in range(blocks):
            # Integers stay: trained on one block's output they raised the divergence of the whole model (docs/log.md).
            parts = Trainables(self.file, block_names(block, self.names), moving=False)
            parts.to(self.workers.device)
            self.ops.trainables, self.ops.chi = parts, None
            theirs.advance(block)
            if block < self.record.blocks:
                parts.load_state_dict(self.learned, strict=False)
            else:
                self._heal_block(block, parts, ours, theirs, Extent(steps, each), felt[block])
            self.ops.trainables = parts
            ours.advance(block)
        for name in ("healed.states", "dense.states"):
            (here / name).unlink()

    def _heal_block(
        self, block: int, parts: Trainables, ours: Stream, theirs: Stream, extent: Extent, felt: Tensor
    ) -> None:
        settings, device = self.settings, self.workers.device
        trainer = Trainer(BlockStudent(self.model, self.ops, parts, block), parts, settings, self.workers)
        weight = felt / (2 * settings.batch * ours.states.shape[1])
        begin, step, curve = self.clock.seconds(), 0, list[float]()
        while (done := self.workers.agree(extent.done(step, self.clock.seconds() - begin))) < 1:
            self.place = f"step {step + 1} of block {block}"
            rows = chosen_windows(ours.states.shape[0], settings.batch, step, settings.seed)
            batches = [
                (ours.read(part).to(device), theirs.read(part).to(device), weight)
                for part in share_of(rows, settings, self.workers)
            ]
            loss, _ = trainer.step(batches, done, None, self.place)
            curve.append(loss)
            step += 1
            self.progress(f"block {block}", done, f"expected KL {loss:.5f}")
        self.learned.update({name: tensor.detach() for name, tensor in parts.state_dict().items()})
        self.record.blocks = block + 1
        self.record.block_curves.append(curve)
        # A step of one block is its share of a step of the whole model.
        blocks = self.file.spec.architecture.num_hidden_layers
        self.record.tokens += round(step * settings.batch * self.data.span / blocks)
        self._save({MODEL + name: tensor for name, tensor in self.learned.items()})

    def _heal_whole(self, lesson: Lesson) -> Trainables:
        settings, record = self.settings, self.record
        everything = Trainables(self.file, self.names, moving=self.codes)
        everything.aim(self.source)
        everything.load_state_dict(self.learned, strict=False)
        everything.to(self.workers.device)
        recompute = settings.recompute
        if recompute is None:
            recompute = not fits(self.model.architecture, settings.micro_batch, self.data.span, self.workers.device)
        tokens = len(self.data.windows) * self.data.span
        share = settings.matching(self.file.spec.architecture.parameters(), tokens) / (2 * max(len(self.matched), 1))
        matched = {block: share * lesson.felt[block].to(self.workers.device) for block in self.matched}
        student = Student(
            self.model, self.ops, everything, cross_entropy=settings.cross_entropy, recompute=recompute, matched=matched
        )
        trainer = Trainer(student, everything, settings, self.workers, fixed=not recompute)
        if record.step:
            trainer.set_rates(record.rates)
            restore_optimizer(trainer.optimizer, self.saved)
        else:
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
            # Where time bounds the training, its steps are guessed by those behind.
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
        self.place = "the sorting of bonds"
        self._sort(everything, exact=True)
        record.seconds = self.clock.seconds()
        return everything

    def _sort(self, trainables: Trainables, *, exact: bool) -> None:
        if self.file.spec.largest_bond():
            inputs = self.data.windows[:SORT_WINDOWS, :-1]
            sort_bonds(self.model, self.ops, trainables, inputs, exact=exact)
            self.workers.copy(trainables)

    def _batches(self, step: int, lesson: Lesson) -> list[Batch]:
        settings, device = self.settings, self.workers.device
        rows = chosen_windows(len(self.data.windows), settings.batch, step, settings.seed)
        total = float(self.data.counts[rows].sum())
        batches = []
        for part in share_of(rows, settings, self.workers):
            ids = torch.from_numpy(self.data.windows[part]).to(device)
            weight = torch.from_numpy(self.data.counts[part] / total).to(device)
            top = torch.from_numpy(lesson.scores[part].astype(np.float32)).to(device)
            tokens = torch.from_numpy(lesson.chosen[part].astype(np.int64)).to(device)
            states = torch.from_numpy(lesson.states[part]).view(torch.bfloat16).to(device) if self.matched else None
            batches.append(Batch(ids[:, :-1], ids[:, 1:], weight, top, tokens, states))
        return batches

    def _save(self, tensors: dict[str, Tensor]) -> None:
        self.record.seconds = self.clock.seconds()
        if self.workers.first:
            save_checkpoint(self.folder, self.record, tensors)
        self.saved_step = self.record.step

    def facts(self) -> dict[str, str]:
        """What the file's provenance says about its healing."""
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
        return facts
