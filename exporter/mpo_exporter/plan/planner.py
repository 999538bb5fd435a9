"""From options to the terms of every layer: the plan that an export carries out, or that `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mpo_exporter.basis import PLAIN, Bases
from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.store import Store
from mpo_exporter.effort import Care
from mpo_exporter.fit.shapes import low_rank_shape
from mpo_exporter.measure.blind import blind_survey
from mpo_exporter.measure.candidates import GRIDS, LADDER, fitted
from mpo_exporter.measure.latency import no_slower_than, open_table, save_table
from mpo_exporter.measure.sensitivity import LayerSensitivity, cached_sensitivities
from mpo_exporter.measure.survey import Survey, cached_survey
from mpo_exporter.plan.budget import allocated_layers, default_size, file_bytes, layers_within_loss, least_bytes
from mpo_exporter.plan.named import acted_on, demanded, plan_layers
from mpo_exporter.plan.options import Choice, Options, Target
from mpo_exporter.progress import Log, Progress, no_log, silent
from mpo_exporter.terms import GROUP, Candidate, Transforms, hadamard_block, integers, operator, stored_bytes
from mpo_formats import ConfigError, Dense, LinearSpec, ModelSpec, Mpo, PlanError, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import DenseWeights

# The measured loss of a layer over the expected one, limited to this range: beyond it the text was too short to tell.
LEAST_FACTOR, MOST_FACTOR = 1 / 8, 8.0
# What layers are measured as for `--sensitivity full`: coarse enough for a clear loss, fine enough for losses to add up.
PROBE_BITS, PROBE_GROUP = 3, 64


@dataclass(slots=True)
class Planner:
    """Makes plans for a dense model, from its calibration text and what was measured with it.

    Args:
        text, walk: the calibration text; None plans from the weights alone.
        surveyed: a survey of this model and text, in the place of the cached one or a new one.
        care: how carefully a new survey judges layers.
        store: keeps what a new survey has measured so far.
        blind: without calibration text, judges layers by their weights.
        transforms: that layers may take of their input, where that lowers their loss.
    """

    source: DenseWeights
    text: TokenText | None = None
    walk: Calibration | None = None
    progress: Progress = silent
    log: Log = no_log
    surveyed: Survey | None = None
    care: Care = field(default_factory=Care)
    store: Store | None = None
    blind: bool = False
    transforms: Transforms = "hadamard"

    def survey(self, *, complete: bool = True) -> Survey:
        """The survey of the model, measured at most once; again if a complete one is asked for later.

        Args:
            complete: with cores everywhere, for plans that demand them; else only where they may pay.

        Raises:
            ConfigError: if there is no calibration text to measure on.
        """
        if self.surveyed is None or (complete and not self.surveyed.complete and not self.blind):
            if self.blind:
                self.surveyed = blind_survey(self.source, hadamard=self.transforms != "none", progress=self.progress)
                return self.surveyed
            if self.walk is None or self.text is None:
                raise ConfigError(
                    "target, --top-k, --compression-ratio: such a plan is made on calibration text; "
                    "give one with --calib, and --calib-windows above 0"
                )
            self.surveyed = cached_survey(
                self.source,
                self.walk,
                self.text,
                transforms=self.transforms,
                care=self.care,
                complete=complete,
                store=self.store,
                progress=self.progress,
                log=self.log,
            )
        return self.surveyed

    def bases(self, spec: ModelSpec) -> Bases:
        """The stored transforms that the layers of a planned file take, by their names.

        Raises:
            PlanError: naming the layer whose transform this model's survey on this text did not fit.
        """
        if not spec.transforms():
            return {}
        found = self.survey(complete=False).bases
        for linear in spec.linears:
            if linear.transform and found.get(linear.transform.name, PLAIN).transform != linear.transform:
                raise PlanError(
                    f"{linear.name}: the plan gives it the stored transform of {linear.transform.name}, which was not fitted to "
                    "this model on this calibration text; leave out transform, or give the text that the plan was made with"
                )
        return found

    def layers(self, spec: ModelSpec, options: Options) -> tuple[LinearSpec, ...]:
        """The terms of every layer.

        Args:
            spec: of the file to write, with any terms: the size of its header counts towards a target.

        Raises:
            PlanError: for a plan that this model cannot have, such as a target below the smallest file.
            ConfigError: if the plan needs calibration text and there is none.
        """
        if options.choice.by_sensitivity:
            chosen = self.least_sensitive(options)
            options = replace(options, choice=replace(options.choice, names=chosen, top_k=None, share=None))
        planned = plan_layers(self.source.spec, options)
        return self.allocated(spec, options, planned) if options.allocates else planned

    def least_sensitive(self, options: Options) -> tuple[str, ...]:
        """The names of the least sensitive layers, as many as `--top-k` or `--compression-ratio` asks for.

        Each layer is judged by what the plan would make of it, alone.
        """
        spec, choice = self.source.spec, options.choice
        inside = acted_on(spec, options)
        names = [one.name for one in spec.linears if one.name in inside and one.name not in (EMBEDDING, HEAD)]
        every = replace(options, choice=Choice(names=tuple(names)))
        planned = [linear for linear in plan_layers(spec, every) if linear.name in names]
        changed = [linear for linear in planned if linear != spec.linear(linear.name)]
        losses = self.losses(changed, choice.sensitivity)
        count = choice.top_k if choice.top_k is not None else max(1, round((choice.share or 1) * len(changed)))
        if count > len(changed):
            raise PlanError(f"--top-k {count}: the plan {options.plan} can act on {len(changed)} layers of this model")
        return tuple(sorted(losses, key=lambda name: (losses[name], name))[:count])

    def losses(self, planned: Sequence[LinearSpec], sensitivity: str) -> Mapping[str, float]:
        """Nats per token lost when one layer alone is stored as planned: expected (`fast`) or measured (`full`)."""
        if sensitivity == "full":
            return {row.layer: row.kl_mean for row in self.measured(planned)}
        surveyed = self.survey()
        return {linear.name: surveyed.loss(linear) or 0.0 for linear in planned}

    def measured(self, planned: Sequence[LinearSpec]) -> Sequence[LayerSensitivity]:
        """Layers measured alone, on calibration text that nothing is fitted to."""
        if self.walk is None or self.text is None:
            raise ConfigError("--sensitivity full: layers are measured on calibration text; give one with --calib")
        return cached_sensitivities(self.source, self.text, self.walk, planned, progress=self.progress, log=self.log)

    def allocated(self, spec: ModelSpec, options: Options, planned: tuple[LinearSpec, ...]) -> tuple[LinearSpec, ...]:
        """A choice among the survey's candidates within bytes or within an expected loss."""
        target = options.target.bytes_of(self.source.spec)
        if options.demands_cores and target is not None:
            self.require_room(spec, options, target)
        rows = self.candidates(options, planned)
        if options.target.max_kl is not None:
            return layers_within_loss(spec, rows, options.target.max_kl)
        if target is None:
            target = default_size(spec, self.source.spec, rows).size
        if target < least_bytes(spec, rows) and not options.for_speed and not options.demands_cores:
            # Cores replace matrices only if no integers are small enough: without healing they lose much.
            rows = {name: [*row, *self.cores_alone(name, options, row)] for name, row in rows.items()}
        return allocated_layers(spec, rows, target)

    def sized(self, spec: ModelSpec, options: Options) -> Options:
        """The options with a size in the place of the default target; says which size that is."""
        rows = self.candidates(options, plan_layers(self.source.spec, options))
        found = default_size(spec, self.source.spec, rows)
        self.log(found.in_words())
        return replace(options, target=Target(size=found.size))

    def require_room(self, spec: ModelSpec, options: Options, target: int) -> None:
        """Raises PlanError if the cores that were demanded do not fit into a target in bytes, before anything is measured."""
        least = self.least_with_cores(spec, options)
        if least <= target:
            return
        fitting, above = 0, options.largest_chi
        while above - fitting > 1:
            middle = (fitting + above) // 2
            fits = self.least_with_cores(spec, replace(options, chi=middle)) <= target
            fitting, above = (middle, above) if fits else (fitting, middle)
        smaller = f"or --chi {fitting}, the largest that fits" if fitting else "since not even --chi 1 fits"
        raise PlanError(
            f"target: {target:,} bytes are too few for cores of --chi {options.largest_chi} in every attention and MLP "
            f"matrix, the smallest such file takes {least:,}; give a larger target, {smaller}"
        )

    def least_with_cores(self, spec: ModelSpec, options: Options) -> int:
        """Bytes of the smallest file with the cores that were demanded; nothing is measured for it."""
        pinned, inside = options.pinned(self.source.spec), acted_on(self.source.spec, options)

        def smallest(linear: LinearSpec) -> LinearSpec:
            if linear.name in pinned:
                return pinned[linear.name]
            if linear.name not in inside:
                return linear
            grids = fitted(GRIDS, linear.in_features)
            if not grids:
                return min((linear, replace(linear, terms=(Dense("bf16"),))), key=stored_bytes)
            cores = () if linear.name in (EMBEDDING, HEAD) else (demanded(linear, options),)
            stored = (Quantized(grid.bits, grid.group, grid.zeros) for grid in grids)
            block = (
                hadamard_block(linear.in_features) if self.transforms != "none" else 0
            )  # which the header says in some bytes
            return min((replace(linear, terms=(base, *cores), hadamard=block) for base in stored), key=stored_bytes)

        return file_bytes(replace(spec, linears=tuple(map(smallest, self.source.spec.linears))))

    def candidates(self, options: Options, planned: tuple[LinearSpec, ...]) -> dict[str, list[Candidate]]:
        """The candidates of every layer; only one for the layers of a plan file and those that the plan leaves alone."""
        source = self.source.spec
        pinned, inside = options.pinned(source), acted_on(source, options)
        surveyed = self.survey(complete=options.demands_cores or bool(pinned))
        factors = self.factors() if options.choice.sensitivity == "full" else {}
        rows = {}
        for linear in planned:
            if linear.name in pinned or linear.name not in inside:
                only = linear if linear.name in pinned else source.linear(linear.name)
                loss = surveyed.loss(only) or 0.0
                rows[linear.name] = [Candidate(stored_bytes(only), loss, only.terms, only.hadamard, only.transform)]
                continue
            factor = factors.get(linear.name, 1.0)
            row = surveyed.candidates[linear.name]
            if options.demands_cores:
                kept = self.with_cores(source.linear(linear.name), row, options)
            else:
                kept = [one for one in row if not any(largest_bond(term) > options.largest_chi for term in one.terms)]
            rows[linear.name] = [replace(one, loss=factor * one.loss) for one in kept]
        return self.fast_enough(rows, planned, pinned) if options.for_speed else rows

    def with_cores(self, linear: LinearSpec, row: Sequence[Candidate], options: Options) -> list[Candidate]:
        """Every integer candidate of an attention or MLP matrix with the cores that were demanded beside it.

        Embedding, head and rows that no integers can store keep the candidates that they have.
        """
        bases = [one for one in row if len(one.terms) == 1 and isinstance(one.terms[0], Quantized)]
        if linear.name in (EMBEDDING, HEAD) or not bases:
            return list(row)
        cores = demanded(linear, options)
        layers = [replace(base.stored(linear), terms=(*base.terms, cores)) for base in bases]
        return [
            Candidate(stored_bytes(one), self.survey().loss(one) or 0.0, one.terms, one.hadamard, one.transform)
            for one in layers
        ]

    def factors(self) -> dict[str, float]:
        """The measured loss over the expected one, for each layer in integers of 3 bits."""
        surveyed = self.survey(complete=False)
        probes = [
            replace(linear, terms=(integers(linear.in_features, PROBE_BITS, PROBE_GROUP),))
            for linear in self.source.spec.linears
        ]
        probes = [linear for linear in probes if linear.terms[0].kind == "quantized"]
        expected = {linear.name: surveyed.loss(linear) for linear in probes}
        return {
            one.layer: min(max(one.kl_mean / loss, LEAST_FACTOR), MOST_FACTOR)
            for one in self.measured(probes)
            if (loss := expected[one.layer])
        }

    def fast_enough(
        self, rows: dict[str, list[Candidate]], planned: Sequence[LinearSpec], fixed: Mapping[str, object]
    ) -> dict[str, list[Candidate]]:
        """The candidates that are no slower on this machine than int4; layers in `fixed` keep theirs."""
        table = open_table(self.source.spec, progress=self.progress, log=self.log)
        for linear in planned:
            if linear.name in fixed or len(rows[linear.name]) == 1:
                continue
            plain = replace(linear, terms=(integers(linear.in_features, 4, GROUP),))
            table.fill(one.stored(linear) for one in rows[linear.name])
            rows[linear.name] = no_slower_than(table, linear, rows[linear.name], plain)
        save_table(table, self.log)
        return rows

    def cores_alone(self, name: str, options: Options, row: Sequence[Candidate]) -> list[Candidate]:
        """int8 cores (O,1)×(1,I) of at most χ in the place of a matrix, if they are smaller than all other candidates."""
        linear, least = self.source.spec.linear(name), min(one.bytes for one in row)
        if name not in self.survey().alone or len(row) == 1:
            return []
        found = []
        for chi in LADDER:
            if chi > min(options.largest_chi, linear.out_features, linear.in_features):
                break
            shape = low_rank_shape(linear.out_features, linear.in_features)
            cores = replace(linear, terms=(operator(*shape, chi, "int8"),))
            if (size := stored_bytes(cores)) < least:
                found.append(Candidate(size, self.survey().loss(cores) or 0.0, cores.terms))
        return found


def with_default_target(options: Options) -> Options:
    """The options with the default target, if the plan can have one and none was given."""
    if not options.named.allocates or options.allocates:
        return options
    return replace(options, target=Target(default=True))


def largest_bond(term: Term) -> int:
    """The largest bond of an operator, 0 of any other term."""
    return max(term.bonds) if isinstance(term, Mpo) else 0
