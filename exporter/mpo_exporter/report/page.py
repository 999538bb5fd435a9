"""The page of a report: one HTML document without scripts or external resources, for light and dark, desktop and phone."""

from __future__ import annotations

import importlib.resources

from mpo_exporter.report.facts import Prompt, Report, Sample
from mpo_exporter.report.markup import Child, Markup, change, compact, element, join, percent, seconds, times
from mpo_exporter.report.plots import kind_legend, progress_plots, quality_plot, spectra
from mpo_exporter.report.tables import decision_table, heat_maps, layer_table, plain_table, quality_table, text_table
from mpo_runtime.cli.console import size_text

# The browser may load nothing and run nothing, whatever a name or a generated text contains.
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
    """The file's name, the outcome in words, and the four ratios."""
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
        f"This file takes {size_text(sizes.file_bytes)}, the dense model {size_text(sizes.dense_bytes)}: that is "
        f"{sizes.bits_per_weight:.2f} bits for each weight of the dense model, embeddings and tokenizer included. "
    )
    if found is None:
        return first + "Quality was not measured: " + report.missing.get("quality", "") + "."
    return first + (
        f"On held-out text the perplexity changes from {found.dense_perplexity:.2f} to {found.perplexity:.2f} "
        f"({change(found.perplexity, found.dense_perplexity)}), the KL divergence from the dense model is "
        f"{compact(found.kl_mean)} nats per token, and both models have the same most likely token in "
        f"{percent(found.same_top1)} of all positions."
    )


def cards(report: Report) -> Markup:
    """The four ratios, which are always shown together: parameters, bytes, memory, speed."""
    sizes, ratios, speed, memory = report.sizes, report.ratios, report.speed, report.memory
    measured = report.machine
    return element(
        "div",
        card("Parameters stored", ratios.parameters, f"{sizes.dense_parameters:,} → {sizes.parameters:,}"),
        card("File size", ratios.bytes, f"{size_text(sizes.dense_bytes)} → {size_text(sizes.file_bytes)}"),
        card(
            "Peak memory",
            ratios.memory,
            f"{size_text(memory.dense_peak)} → {size_text(memory.peak)}, of which Python takes {size_text(memory.base)}"
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
    """One ratio, compressed over dense, with its two figures."""
    if ratio is None:
        figure, meter = element("p", "not measured", class_="ratio none"), None
    else:
        figure = element("p", times(ratio), class_="ratio warn" if warn else "ratio")
        meter = element("p", element("i"), class_="meter", style=f"--v:{min(100 * ratio, 100):.1f}%")
    return element(
        "div", element("p", name, class_="name"), figure, meter, element("p", detail, class_="detail"), class_="card"
    )


def section(title: str, lead: Child, *content: Child) -> Markup:
    """A section with its heading and an introduction."""
    anchor = title.lower().replace(" ", "-")
    return element("section", element("h2", title), element("p", lead) if lead else None, *content, id=anchor)


def quality_section(report: Report) -> Markup | None:
    """The table of quality, and the plot of quality against bytes."""
    found = report.quality
    if found is None:
        return section("Quality", f"Not measured: {report.missing.get('quality', '')}.")
    lead = (
        f"Measured on the first {found.tokens:,} tokens of {found.text}, held-out text on which nothing was trained or "
        f"calibrated, in windows of {found.window} tokens. Perplexity says how well a model predicts the text (lower is "
        "better). The KL divergence says how far this file's next-token probabilities are from the dense model's (0 if "
        "they are equal). Both perplexities are measured on the same text, so their difference is much more certain than "
        "their standard errors suggest."
    )
    return section(
        "Quality",
        lead,
        element(
            "div",
            quality_table(found, report.accuracy),
            element("div", quality_plot(report), points_details(report)),
            class_="pair",
        ),
    )


def points_details(report: Report) -> Markup:
    """The points of the plot as text."""
    items = [
        element(
            "p", f"{point.label}: {point.bytes:,} bytes, KL {compact(point.kl_mean)}, perplexity {point.perplexity:.2f}"
        )
        for point in report.points
    ]
    return element("details", element("summary", "The points of the plot as text"), items)


def cores_section(report: Report) -> Markup:
    """How many layers have cores, and what a file of the same size without cores would give."""
    count, layers = report.core_layers, len(report.layers)
    if not count:
        return section(
            "Cores", f"No layer has tensor-network cores: all {layers} are stored only as integers or floats."
        )
    lead = (
        f"{count} of {layers} layers have tensor-network cores: small tensors whose product is the layer's matrix, or a "
        "correction of it."
    )
    plain, found = report.without_cores, report.quality
    if plain is None or found is None:
        reason = report.missing.get("without_cores", "quality was not measured")
        return section("Cores", f"{lead} A file of the same size without cores was not measured: {reason}.")
    better = plain.kl_mean < found.kl_mean
    outcome = (
        "Cores do not pay here: a file of the same size with integers alone is closer to the dense model."
        if better
        else "Cores pay here: a file of the same size with integers alone is farther from the dense model."
    )
    how = (
        f"That file was fitted to the calibration text and measured on the same tokens as this one, in "
        f"{seconds(plain.seconds)}."
    )
    return section(
        "Cores",
        f"{lead} {outcome} {how}",
        element("div", plain_table(found, plain, report.sizes.file_bytes), class_="pair"),
    )


def decision_section(report: Report) -> Markup:
    """What every matrix is stored as, and with what error."""
    lead = (
        "What each matrix is stored as. int4/32 means integers of 4 bits, of which 32 share a scale; χ is the bond "
        "dimension of cores, their size; of H128: the layer takes the Hadamard transform of every 128 inputs, which spreads "
        "large ones, of T64 a stored transform of every 64. Bits per weight include scales, offsets and cores. "
    ) + error_words(report)
    return section(
        "Decisions",
        lead,
        heat_maps(report),
        element("details", element("summary", "Layers by decision"), decision_table(report), open=""),
        element("details", element("summary", f"All {len(report.layers)} layers"), layer_table(report)),
    )


def error_words(report: Report) -> str:
    """A sentence on what the layers' errors in this report are."""
    norms = {layer.norm for layer in report.layers if layer.norm}
    if not norms:
        return "The layers' errors were not measured: " + report.missing.get("calibrated", "") + "."
    if report.calibrated:
        return (
            f"The error of a layer is the root mean square error of its output, relative to the output, for the inputs "
            f"that it has in the dense model on {report.calibrated.tokens:,} tokens of {report.calibrated.text}."
        )
    if norms == {"fit"}:
        return "The error of a layer is relative, in the norm in which the layer was fitted."
    return (
        "The error of a layer is that of its weights, relative to the weights: without calibration text it is not known "
        "which weights matter more."
    )


def spectrum_section(report: Report) -> Markup:
    """The singular values of the matrices."""
    panels = spectra(report)
    if not panels:
        return section("Spectra", "Not measured: the matrices are too large for this machine.")
    spectrums = [layer.spectrum for layer in report.layers if layer.spectrum]
    whitened = any(spectrum.whitened for spectrum in spectrums)
    what = (
        "Singular values of W L, where W is the layer's matrix and L Lᵀ the second moment of its input. They say how much "
        "of the layer's output a matrix of a given rank can reproduce."
        if whitened
        else "Singular values of the layers' matrices."
    )
    measured = (
        f" Measured for {len(spectrums)} of {len(report.layers)} layers." if len(spectrums) < len(report.layers) else ""
    )
    lead = (
        f"{what} They are relative to the largest; both axes are logarithmic; each line is a block. The steeper a line "
        f"falls, the smaller the cores that are needed. Beside each name: how many singular values hold 90 % of the "
        f"energy (the sum of their squares).{measured}"
    )
    ramp = element("p", "first block", element("i"), "last block", class_="ramp depth bits")
    return section("Spectra", lead, ramp, element("div", panels, class_="panels"))


def progress_section(report: Report) -> Markup:
    """The stages of the export, and the fit of each layer."""
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
        f"{seconds(went.seconds)} from the first step to the last. Each layer is fitted to the inputs that it gets from the "
        "compressed layers before it on the calibration text, and its error is measured for these inputs."
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
    """What both models generated, unedited."""
    texts = report.texts
    if texts is None:
        return section("Generated text", f"Not measured: {report.missing.get('texts', '')}.")
    lead = (
        f"Continuations of fixed prompts: at most {texts.limit} tokens, temperature {texts.temperature:g}, seed "
        f"{texts.seed}; nothing was selected or edited. Close logits do not guarantee good text, so read some."
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
    """One continuation and its figures."""
    words = sample.text.strip("\n")
    shown = element("pre", words) if words.strip() else element("pre", "(nothing)", class_="nothing")
    how = "ended by the model" if sample.finish == "stop" else "cut at the limit"
    early = ", early" if sample.early else ""
    facts = f"{name} · {sample.tokens} tokens, {how}{early} · {percent(sample.repeated)} repeated"
    return element("div", shown, element("p", facts), class_="said")


def details_section(report: Report) -> Markup:
    """Everything that is needed to repeat the measurements."""
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
                f"{found.text_sha256}; layers' inputs as in the dense model",
            )
        )
    if report.speed:
        rounds = report.speed
        rows.append(
            (
                "Speed",
                f"medians of {len(rounds.dense)} rounds, in which both models take turns to decode {rounds.tokens} tokens "
                f"after a prompt of {rounds.prompt_tokens}; {spread(rounds.dense)} dense, "
                f"{spread(rounds.compressed)} this file",
            )
        )
    if report.memory:
        rows.append(
            (
                "Memory",
                f"largest resident memory of a process that loads a model and decodes {report.memory.tokens} "
                "tokens, including the pages of the mapped file",
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
    """The range of the rounds' speeds."""
    return f"{min(rates):.1f} to {max(rates):.1f} tokens/s"
