"""From options to the terms of every layer: the plan that an export carries out, or that `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.fit.shapes import low_rank_shape
from mpo_exporter.measure.cache import Tell, untold
from mpo_exporter.measure.expected import layer_loss
from mpo_exporter.measure.latency import keep_table, no_slower_than, open_table
from mpo_exporter.measure.sensitivity import Measured, measured_alone
from mpo_exporter.measure.survey import LADDER, Survey, stored_bytes
from mpo_exporter.measure.surveys import kept_survey
from mpo_exporter.plan.budget import allocated_layers, layers_within_loss, least_bytes
from mpo_exporter.plan.named import Options, matching, plan_layers
from mpo_exporter.progress import Progress, silent
from mpo_exporter.terms import GROUP, Candidate, integers, operator
from mpo_formats import ConfigError, LinearSpec, ModelSpec, PlanError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

# Measured over predicted loss of one layer is believed within these factors: beyond, the text was too short to tell.
LEAST_FACTOR, MOST_FACTOR = 1 / 8, 8.0
# What layers are measured as for `--sensitivity full`: coarse enough to show, fine enough for losses to add up.
PROBE_BITS, PROBE_GROUP = 3, 64


@dataclass(slots=True)
class Planner:
    """What plans are made from: the dense source, the walk over its calibration text, and what was measured with it."""

    source: Checkpoint
    text: TokenText | None
    walk: Calibration | None
    progress: Progress = silent
    tell: Tell = untold
    surveyed: Survey | None = None

    def survey(self) -> Survey:
        """The survey of the source, measured at most once.

        Raises:
            ConfigError: where there is no calibration text to measure on.
        """
        if self.surveyed is None:
            if self.walk is None or self.text is None:
                raise ConfigError(
                    "target, --top-k, --compression-ratio: such a plan is made on calibration text; "
                    "give one with --calib, and --calib-windows above 0"
                )
            self.surveyed = kept_survey(self.source, self.walk, self.text, progress=self.progress, tell=self.tell)
        return self.surveyed

    def layers(self, spec: ModelSpec, options: Options) -> tuple[LinearSpec, ...]:
        """The terms of every layer.

        Args:
            spec: of the file to write, with any terms: its header counts where a target is to be met.

        Raises:
            PlanError: for a plan that this model cannot have, such as a target below the smallest.
            ConfigError: where the plan needs calibration text and there is none.
        """
        if options.chooses:
            options = replace(options, layers=self.chosen(options))
        planned = plan_layers(self.source.spec, options)
        if not options.allocates:
            return planned
        return self.allocated(spec, options, planned)

    def chosen(self, options: Options) -> tuple[str, ...]:
        """The names of the least sensitive layers, as many as `--top-k` or `--compression-ratio` asks for.

        Each is judged by what the plan would make of it, alone.
        """
        spec = self.source.spec
        names = [
            linear.name
            for linear in spec.linears
            if linear.name in matching(spec, options) and linear.name not in (EMBEDDING, HEAD)
        ]
        every = replace(options, layers=tuple(names), top_k=None, share=None, pattern=None)
        planned = [linear for linear in plan_layers(spec, every) if linear.name in names]
        changed = [linear for linear in planned if linear != spec.linear(linear.name)]
        losses = self.sensitivities(changed, options)
        count = options.top_k if options.top_k is not None else max(1, round((options.share or 1) * len(changed)))
        if count > len(changed):
            raise PlanError(f"--top-k {count}: the plan {options.plan} can act on {len(changed)} layers of this model")
        return tuple(sorted(losses, key=lambda name: (losses[name], name))[:count])

    def sensitivities(self, planned: Sequence[LinearSpec], options: Options) -> Mapping[str, float]:
        """Nats a token lost when one layer alone becomes what is planned: expected (`fast`) or measured (`full`)."""
        if options.sensitivity == "full":
            return {row.layer: row.kl_mean for row in self.measured(planned)}
        surveyed = self.survey()
        return {linear.name: layer_loss(surveyed, linear) or 0.0 for linear in planned}

    def measured(self, planned: Sequence[LinearSpec]) -> Sequence[Measured]:
        """Layers measured alone on calibration text that nothing is fitted to."""
        if self.walk is None or self.text is None:
            raise ConfigError("--sensitivity full: layers are measured on calibration text; give one with --calib")
        return measured_alone(self.source, self.text, self.walk, planned, progress=self.progress, tell=self.tell)

    def allocated(self, spec: ModelSpec, options: Options, planned: tuple[LinearSpec, ...]) -> tuple[LinearSpec, ...]:
        """A choice among the survey's candidates within bytes or an expected loss."""
        rows = self.candidates(options, planned)
        if options.max_kl is not None:
            return layers_within_loss(spec, rows, options.max_kl)
        target = options.target_bytes or 0
        if target < least_bytes(spec, rows) and not options.for_speed:
            # Only where no integers are small enough may cores take their place: without healing they lose much.
            rows = {name: [*row, *self.cores_alone(name, options, row)] for name, row in rows.items()}
        return allocated_layers(spec, rows, target)

    def candidates(self, options: Options, planned: tuple[LinearSpec, ...]) -> dict[str, list[Candidate]]:
        """What each layer may become: pinned layers and those that the plan leaves alone, just one thing."""
        surveyed, pinned = self.survey(), {name for name, _ in options.pinned}
        acted_on = matching(self.source.spec, options)
        factors = self.factors() if options.sensitivity == "full" else {}
        rows = {}
        for linear in planned:
            if linear.name in pinned or linear.name not in acted_on:
                terms = linear.terms if linear.name in pinned else self.source.spec.linear(linear.name).terms
                only = replace(linear, terms=terms)
                rows[linear.name] = [Candidate(stored_bytes(only), layer_loss(surveyed, only) or 0.0, terms)]
                continue
            factor = factors.get(linear.name, 1.0)
            rows[linear.name] = [
                replace(one, loss=factor * one.loss)
                for one in surveyed.candidates[linear.name]
                if all(term.kind != "mpo" or max(term.bonds) <= options.chi for term in one.terms)
            ]
        return self.fast_enough(rows, planned, pinned) if options.for_speed else rows

    def factors(self) -> dict[str, float]:
        """Measured over expected loss of each layer in integers of 3 bits."""
        surveyed, rows = self.survey(), []
        for linear in self.source.spec.linears:
            terms = (integers(linear.in_features, PROBE_BITS, PROBE_GROUP),)
            rows.append(replace(linear, terms=terms))
        rows = [row for row in rows if row.terms[0].kind == "quantized"]
        found = {}
        for one in self.measured(rows):
            expected = layer_loss(surveyed, next(row for row in rows if row.name == one.layer))
            if expected:
                found[one.layer] = min(max(one.kl_mean / expected, LEAST_FACTOR), MOST_FACTOR)
        return found

    def fast_enough(
        self, rows: dict[str, list[Candidate]], planned: Sequence[LinearSpec], fixed: set[str]
    ) -> dict[str, list[Candidate]]:
        """The candidates that are no slower on this machine than plain int4."""
        table = open_table(self.source.spec, progress=self.progress, tell=self.tell)
        for linear in planned:
            if linear.name in fixed or len(rows[linear.name]) == 1:
                continue
            plain = replace(linear, terms=(integers(linear.in_features, 4, GROUP),))
            table.fill(replace(linear, terms=one.terms) for one in rows[linear.name])
            rows[linear.name] = no_slower_than(table, linear, rows[linear.name], plain)
        keep_table(table, self.tell)
        return rows

    def cores_alone(self, name: str, options: Options, row: Sequence[Candidate]) -> list[Candidate]:
        """int8 cores (O,1)×(1,I) of at most χ in the place of a matrix, where they are smaller than all else."""
        linear, least = self.source.spec.linear(name), min(one.bytes for one in row)
        if name not in self.survey().alone or len(row) == 1:
            return []
        found = []
        for chi in LADDER:
            if chi > min(options.chi, linear.out_features, linear.in_features):
                break
            shape = low_rank_shape(linear.out_features, linear.in_features)
            cores = replace(linear, terms=(operator(*shape, chi, "int8"),))
            if (size := stored_bytes(cores)) < least:
                found.append(Candidate(size, layer_loss(self.survey(), cores) or 0.0, cores.terms))
        return found
