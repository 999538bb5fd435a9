"""The page: one self-contained HTML document, no script, no external resource, light and dark, desktop and phone."""

from __future__ import annotations

import importlib.resources

from mpo_exporter.report.facts import Prompt, Report, Sample
from mpo_exporter.report.markup import Child, Markup, element, join
from mpo_exporter.report.plots import kind_legend, progress_plots, quality_plot, spectra
from mpo_exporter.report.tables import decision_table, heat_maps, layer_table, plain_table, quality_table, text_table
from mpo_exporter.report.wording import change, compact, percent, seconds, times
from mpo_runtime.cli.console import size_text

# Nothing may be loaded and nothing may run, whatever a name or a generated text holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The whole document."""
    style = (importlib.resources.files("mpo_exporter.report") / "page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", f"{report.subject.name}: report of the export"),
        element("style", Markup(style)),
    )
    sections = (quality_section, cores_section, decision_section, spectrum_section, progress_section, text_section)
    body = element(
        "body",
        page_header(report),
        element("main", [section(report) for section in sections], details_section(report)),
        element("footer", element("p", f"Made {report.made} by mpo-runtime. The same figures are in report.json.")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def page_header(report: Report) -> Markup:
    """Name, what it comes to, and the four ratios."""
    subject = report.subject
    shape = (
        f"{subject.model_type}, {subject.blocks} blocks, hidden {subject.hidden}, MLP {subject.inner}, "
        f"{subject.heads} heads, vocabulary {subject.vocabulary:,}"
    )
    slower = None
    if report.speed and report.speed.slower:
        slower = element(
            "p",
            f"This file decodes more slowly than the dense model on this machine: "
            f"{report.speed.median:.1f} against {report.speed.dense_median:.1f} tokens/s.",
            class_="plainly",
        )
    return element(
        "header",
        element("p", f"Report of the export · {subject.file}", class_="eyebrow"),
        element("h1", subject.name),
        element("p", verdict(report), class_="verdict"),
        slower,
        cards(report),
        element("p", shape, class_="eyebrow", style="margin-top:1rem"),
    )


def verdict(report: Report) -> str:
    """The outcome in two sentences."""
    sizes, found = report.sizes, report.quality
    first = (
        f"{size_text(sizes.file_bytes)} in the place of {size_text(sizes.dense_bytes)}: {sizes.bits_per_weight:.2f} "
        "bits for each weight of the dense model, embeddings and tokenizer included. "
    )
    if found is None:
        return first + "Quality was not measured: " + report.missing.get("quality", "") + "."
    return first + (
        f"On held-out text perplexity goes from {found.dense_perplexity:.2f} to {found.perplexity:.2f} "
        f"({change(found.perplexity, found.dense_perplexity)}), KL to the dense model is {compact(found.kl_mean)} nats a "
        f"token, and the most likely token is the same {percent(found.same_top1)} of the time."
    )


def cards(report: Report) -> Markup:
    """Parameters, bytes, memory, speed: always together."""
    sizes, ratios, speed, memory = report.sizes, report.ratios, report.speed, report.memory
    measured = report.machine
    return element(
        "div",
        card("Parameters stored", ratios.parameters, f"{sizes.dense_parameters:,} → {sizes.parameters:,}"),
        card("File size", ratios.bytes, f"{size_text(sizes.dense_bytes)} → {size_text(sizes.file_bytes)}"),
        card(
            "Peak memory",
            ratios.memory,
            f"{size_text(memory.dense_peak)} → {size_text(memory.peak)}, of which {size_text(memory.base)} before loading"
            if memory
            else report.missing.get("memory", ""),
        ),
        card(
            "Decoding speed",
            ratios.speed,
            f"{speed.dense_median:.1f} → {speed.median:.1f} tokens/s, {measured.backend} backend"
            + (", slower than dense" if speed.slower else "")
            if speed
            else report.missing.get("speed", ""),
            warn=speed is not None and speed.slower,
        ),
        class_="cards",
    )


def card(name: str, ratio: float | None, detail: str, *, warn: bool = False) -> Markup:
    """One ratio, compressed over dense."""
    if ratio is None:
        figure, meter = element("p", "not measured", class_="ratio none"), None
    else:
        figure = element("p", times(ratio), class_="ratio warn" if warn else "ratio")
        meter = element("p", element("i"), class_="meter", style=f"--v:{min(100 * ratio, 100):.1f}%")
    return element(
        "div", element("p", name, class_="name"), figure, meter, element("p", detail, class_="detail"), class_="card"
    )


def section(title: str, lead: Child, *content: Child) -> Markup:
    """A section with its heading and what it is about."""
    anchor = title.lower().replace(" ", "-")
    return element("section", element("h2", title), element("p", lead) if lead else None, *content, id=anchor)


def quality_section(report: Report) -> Markup | None:
    """The table of quality, and the plot against bytes."""
    found = report.quality
    if found is None:
        return section("Quality", f"Not measured: {report.missing.get('quality', '')}.")
    lead = (
        f"On the first {found.tokens:,} tokens of {found.text}, held-out text on which nothing was trained or "
        f"calibrated, in windows of {found.window} tokens. The two perplexities share their text, so their difference "
        "is far surer than either."
    )
    return section(
        "Quality",
        lead,
        element(
            "div", quality_table(found), element("div", quality_plot(report), points_details(report)), class_="pair"
        ),
    )


def points_details(report: Report) -> Markup:
    """The plotted points as text."""
    items = [
        element(
            "p", f"{point.label}: {point.bytes:,} bytes, KL {compact(point.kl_mean)}, perplexity {point.perplexity:.2f}"
        )
        for point in report.points
    ]
    return element("details", element("summary", "The points in figures"), items)


def cores_section(report: Report) -> Markup:
    """How many layers got cores, and what the same bytes give without."""
    count, layers = report.core_layers, len(report.layers)
    if not count:
        return section(
            "Cores", f"No layer has tensor-network cores: all {layers} are stored as integers or floats alone."
        )
    lead = f"{count} of {layers} layers have tensor-network cores."
    plain, found = report.without_cores, report.quality
    if plain is None or found is None:
        reason = report.missing.get("without_cores", "quality was not measured")
        return section("Cores", f"{lead} What the same bytes give without cores was not measured: {reason}.")
    better = plain.kl_mean < found.kl_mean
    outcome = (
        "Cores do not pay here: the same bytes in integers alone are closer to the dense model."
        if better
        else "Cores pay here: the same bytes in integers alone are farther from the dense model."
    )
    how = f"Fitted to the same kind of calibration text and measured on the same tokens, in {seconds(plain.seconds)}."
    return section(
        "Cores",
        f"{lead} {outcome} {how}",
        element("div", plain_table(found, plain, report.sizes.file_bytes), class_="pair"),
    )


def decision_section(report: Report) -> Markup:
    """What every matrix is stored as."""
    lead = "Bits per weight count scales, offsets and cores. " + error_words(report)
    return section(
        "Decisions",
        lead,
        heat_maps(report),
        element("details", element("summary", "Layers by decision"), decision_table(report), open=""),
        element("details", element("summary", f"All {len(report.layers)} layers"), layer_table(report)),
    )


def error_words(report: Report) -> str:
    """What the errors of layers mean in this report."""
    norms = {layer.norm for layer in report.layers if layer.norm}
    if not norms:
        return "The layers' errors were not measured: " + report.missing.get("calibrated", "") + "."
    if report.calibrated:
        return (
            f"The error is that of a layer's output relative to the output itself, with the activations of the dense "
            f"model on {report.calibrated.tokens:,} tokens of {report.calibrated.text}."
        )
    if norms == {"fit"}:
        return "The error is that of a layer's output in the norm that the layer was fitted in."
    return "The error is that of the weights, relative to the weights: without calibration text nothing tells which matter."


def spectrum_section(report: Report) -> Markup:
    """Singular values of the matrices."""
    panels = spectra(report)
    if not panels:
        return section("Spectra", "Not measured: the matrices are large for this machine.")
    spectrums = [layer.spectrum for layer in report.layers if layer.spectrum]
    whitened = any(spectrum.whitened for spectrum in spectrums)
    what = (
        "Singular values of W L, where L Lᵀ is the second moment of the layer's input: what a rank can keep of the output."
        if whitened
        else "Singular values of the weights."
    )
    measured = f" Of {len(spectrums)} of {len(report.layers)} layers." if len(spectrums) < len(report.layers) else ""
    lead = (
        f"{what} Relative to the largest, both axes logarithmic, one line a block. The steeper a line falls, the "
        f"cheaper cores are; beside each name, the rank that holds 90 % of the energy.{measured}"
    )
    ramp = element("p", "first block", element("i"), "last block", class_="ramp depth bits")
    return section("Spectra", lead, ramp, element("div", panels, class_="panels"))


def progress_section(report: Report) -> Markup:
    """How the compression went."""
    went = report.compression
    if went is None or not went.steps:
        return section(
            "Progress of the compression", f"Not known: {report.missing.get('compression', 'no layer was fitted')}."
        )
    errors, spent = progress_plots(went)
    total = sum(stage.end - stage.start for stage in went.stages) or 1.0
    count = max(len(went.stages) - 1, 1)
    shares = [(stage, f"--v:{100 - 75 * number / count:.0f}%") for number, stage in enumerate(went.stages)]
    bar = element(
        "div",
        [
            element(
                "i",
                title=f"{stage.name}: {seconds(stage.end - stage.start)}",
                style=f"{shade};--w:{(stage.end - stage.start) / total:.4f}",
            )
            for stage, shade in shares
        ],
        class_="stages",
    )
    keys = element(
        "ul",
        [
            element("li", element("i", class_="key", style=shade), f"{stage.name} {seconds(stage.end - stage.start)}")
            for stage, shade in shares
        ],
        class_="legend",
    )
    lead = (
        f"{seconds(went.seconds)} from the first step to the last. Each layer is fitted to what the compressed layers "
        "before it make of the calibration text, and the error is in that norm."
    )
    if report.calibrated is None:
        lead = f"{seconds(went.seconds)} from the first step to the last."
    return section(
        "Progress of the compression",
        lead,
        bar,
        keys,
        kind_legend(went),
        element("div", element("div", errors), element("div", spent), class_="pair"),
    )


def text_section(report: Report) -> Markup:
    """Generated text, unedited."""
    texts = report.texts
    if texts is None:
        return section("Generated text", f"Not measured: {report.missing.get('texts', '')}.")
    lead = (
        f"Fixed prompts, at most {texts.limit} tokens, temperature {texts.temperature:g}, seed {texts.seed}; nothing was "
        "chosen or edited. A high agreement of logits does not guarantee good text: read some."
    )
    habits = element("div", element("div", text_table(texts)), class_="pair")
    return section("Generated text", lead, habits, [prompt_block(prompt) for prompt in texts.prompts])


def prompt_block(prompt: Prompt) -> Markup:
    """A prompt and both continuations side by side."""
    kind = "chat" if prompt.chat else "continued"
    return element(
        "div",
        element("p", prompt.prompt, " ", element("span", kind)),
        element(
            "div",
            said("dense", prompt.dense) if prompt.dense else None,
            said("this file", prompt.compressed),
            class_="pair",
        ),
        class_="prompt",
    )


def said(name: str, sample: Sample) -> Markup:
    """One continuation."""
    words = sample.text.strip("\n")
    shown = element("pre", words) if words.strip() else element("pre", "(nothing)", class_="nothing")
    how = "ended by itself" if sample.finish == "stop" else "cut at the limit"
    early = ", early" if sample.early else ""
    facts = f"{name} · {sample.tokens} tokens, {how}{early} · {percent(sample.repeated)} repeated"
    return element("div", shown, element("p", facts), class_="said")


def details_section(report: Report) -> Markup:
    """What is needed to measure it again."""
    subject, machine = report.subject, report.machine
    rows = [
        ("Source", f"{subject.source}{' at ' + subject.revision if subject.revision else ''}"),
        ("SHA-256 of the source", subject.source_sha256),
        ("Exporter", subject.exporter),
        ("Options", ", ".join(f"{key} {value}" for key, value in subject.options.items())),
    ]
    if report.quality:
        rows.append(("Held-out text", f"{report.quality.text}, SHA-256 {report.quality.text_sha256}"))
    if report.calibrated:
        found = report.calibrated
        rows.append(
            (
                "Errors and spectra",
                f"{found.windows} windows, {found.tokens:,} tokens of {found.text}, SHA-256 "
                f"{found.text_sha256}; dense upstream",
            )
        )
    if report.speed:
        rounds = report.speed
        rows.append(
            (
                "Speed",
                f"medians of {len(rounds.dense)} rounds of {rounds.tokens} tokens after a prompt of "
                f"{rounds.prompt_tokens}, the two in turns; {spread(rounds.dense)} dense, "
                f"{spread(rounds.compressed)} this file",
            )
        )
    if report.memory:
        rows.append(
            (
                "Memory",
                f"largest resident size of a process that loads a model and decodes {report.memory.tokens} "
                "tokens, mapped pages of the file included",
            )
        )
    rows.append(
        (
            "Machine",
            f"{machine.processor}, {machine.cores} processors, {machine.threads} threads, "
            f"{machine.backend} backend ({machine.kernels})",
        )
    )
    rows.append(("This report took", ", ".join(f"{cost.part} {seconds(cost.seconds)}" for cost in report.costs)))
    rows += [("Not measured", f"{part.replace('_', ' ')}: {reason}") for part, reason in report.missing.items()]
    listed = element("dl", [join(element("dt", name), element("dd", words)) for name, words in rows])
    return section("How this was measured", None, listed)


def spread(rates: tuple[float, ...]) -> str:
    """The slowest and the fastest round."""
    return f"{min(rates):.1f} to {max(rates):.1f} tokens/s"
