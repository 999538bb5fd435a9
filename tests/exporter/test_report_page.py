"""The page: well-formed, self-contained, and deaf to what names and generated texts try to make of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_exporter.report.facts import (
    Compression,
    Cost,
    Layer,
    Machine,
    Measured,
    Memory,
    Point,
    Predicted,
    Prompt,
    Ratios,
    Report,
    Sample,
    Sizes,
    Spectrum,
    Speed,
    Stage,
    Step,
    Subject,
    Term,
    Texts,
    WithoutCores,
)
from mpo_exporter.report.markup import change, compact, element
from mpo_exporter.report.page import page
from mpo_exporter.report.plots import Scale, linear_ticks, log_ticks

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp; \x00\x1b[31m\ud800 </pre></style> http://evil.example/x"
NAMES = ("self_attn.q_proj", "mlp.down_proj")


def layer(block: int, matrix: str, bits: int) -> Layer:
    chi = 4 if matrix == NAMES[0] else 0
    terms = [Term("quantized", f"int{bits}/32", bits, 32, 0, (), (), 600)]
    if chi:
        terms.append(Term("mpo", "mpo χ=4", 8, 16, chi, (64, 1), (1, 48), 300))
    spectrum = Spectrum(True, (1, 2, 4, 48), (1.0, 0.4, 0.1, 1e-5), 48, 3)
    name = f"model.layers.{block}.{matrix}"
    return Layer(name, block, matrix, 64, 48, tuple(terms), 900, bits + 0.5, 0.03 * bits, "activations", spectrum)


def sample(text: str) -> Sample:
    return Sample(text, 40, "length", 0.25, False)


@pytest.fixture
def report() -> Report:
    layers = tuple(layer(block, name, 2 + block) for block in range(3) for name in NAMES)
    table = Layer(
        "model.embed_tokens", None, "model.embed_tokens", 300, 48, layers[1].terms, 9000, 5.0, None, None, None
    )
    quality = Measured("held-out.txt", "0" * 64, 999, 512, 40.0, 3.0, 41.0, 3.1, 0.01, 0.2, 0.93, 0.999, 0.02)
    prompts = (Prompt("Once upon a time", False, sample("dense text"), sample("our text")),)
    return Report(
        format="mpo-report",
        version=1,
        made="2026-11-25T00:00:00+00:00",
        subject=Subject(
            "model",
            "model.mpo",
            "source",
            "1" * 64,
            None,
            "mpo-runtime 0.1.0",
            {"plan": "auto"},
            "granite",
            3,
            48,
            64,
            4,
            2,
            300,
            True,
        ),
        sizes=Sizes(30_000, 31_000, 60_000, 60_000, 20_000, 16.0, 5.33),
        ratios=Ratios(31 / 30, 1 / 3, 0.9, 1.5),
        quality=quality,
        speed=Speed((10.0, 11.0, 12.0), (15.0, 16.5, 17.0), 11.0, 16.5, 32, 16, False),
        memory=Memory(50_000_000, 45_000_000, 30_000_000, 30_000_000, 16),
        core_layers=3,
        layers=(table, *layers),
        calibrated=None,
        without_cores=WithoutCores(19_900, 40.5, 3.0, 0.008, 0.15, 0.94, 30.0),
        points=(
            Point("dense", "dense bf16", 60_000, 0.0, 40.0),
            Point("this file", "this file", 20_000, 0.01, 41.0),
            Point("without cores", "same bytes, no cores", 19_900, 0.008, 40.5),
            Point("prefix", "χ = 1", 18_000, 0.02, 42.0),
            Point("earlier", "earlier, 3.00 bits", 11_000, 0.2, 50.0),
        ),
        predicted=(Predicted(10_000, 0.3), Predicted(20_000, 0.009)),
        texts=Texts(0.7, 1, 96, 12, 0.1, 0.25, 0, 0, prompts),
        compression=Compression(
            60.0,
            (Stage("fitting", 0.0, 40.0, 6), Stage("measuring", 40.0, 60.0, 3)),
            tuple(Step(one.name, 6.0 * index, 5.0, 0.04) for index, one in enumerate(layers)),
        ),
        machine=Machine("a processor", 2, "native", "avx2", 2),
        costs=(Cost("quality", 3.0),),
        missing={},
    )


def tree(text: str) -> ElementTree.Element:
    """The page as XML: well-formed markup is a condition that browsers do not enforce, and that tests can."""
    start = "<!DOCTYPE html>\n"
    assert text.startswith(start)
    return ElementTree.fromstring(text.removeprefix(start))


def shown(root: ElementTree.Element) -> str:
    return "".join(root.itertext())


def bare(report: Report) -> Report:
    """The same file, of which nothing but its sizes was measured."""
    return dataclasses.replace(
        report,
        quality=None,
        speed=None,
        memory=None,
        texts=None,
        compression=None,
        without_cores=None,
        points=(),
        predicted=(),
        ratios=Ratios(1.0, 0.3, None, None),
        core_layers=0,
        layers=tuple(dataclasses.replace(one, error=None, norm=None, spectrum=None) for one in report.layers),
        missing={part: f"no {part} today" for part in ("quality", "speed", "memory", "texts", "compression")},
    )


def test_the_page_is_whole_and_says_the_figures(report: Report) -> None:
    root = tree(page(report))
    words = shown(root)
    for figure in (
        "41.00 ± 3.10",
        "40.00 ± 3.00",
        "+2.5 %",
        "93.0 %",
        "0.99900",
        "0.33×",
        "1.50×",
        "0.90×",
        "1.03×",
        "3 of 7 layers",
        "Cores do not pay here",
        "dense text",
        "our text",
        "11.0 → 16.5 tokens/s",
    ):
        assert figure in words, figure
    assert len(root.findall(".//svg")) > 5
    titles = [found.text for found in root.iter("h2")]
    assert titles == [
        "Quality",
        "Cores",
        "Decisions",
        "Spectra",
        "Progress of the compression",
        "Generated text",
        "How this was measured",
    ]


def test_what_was_not_measured_is_said(report: Report) -> None:
    words = shown(tree(page(bare(report))))
    for part in ("quality", "speed", "memory", "texts", "compression"):
        assert f"no {part} today" in words
    assert "No layer has tensor-network cores" in words


def test_a_slower_file_is_called_slower(report: Report) -> None:
    assert "more slowly" not in page(report)
    slow = dataclasses.replace(report, speed=Speed((10.0,), (5.0,), 10.0, 5.0, 32, 16, True))
    assert "This file decodes more slowly than the dense model on this machine: 5.0 against 10.0 tokens/s." in page(
        slow
    )


def test_cores_that_pay_are_said_to_pay(report: Report) -> None:
    assert report.without_cores is not None
    worse = dataclasses.replace(report.without_cores, kl_mean=0.5)
    assert "Cores pay here" in page(dataclasses.replace(report, without_cores=worse))


def test_nothing_is_loaded_from_anywhere(report: Report) -> None:
    text = page(report)
    root = tree(text)
    assert {found.tag for found in root.iter()}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "use"}
    )
    attributes = {name for found in root.iter() for name in found.attrib}
    assert attributes.isdisjoint({"href", "src", "srcset", "action", "data", "background", "poster"})
    assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|//", text)
    policy = root.find(".//meta[@http-equiv='Content-Security-Policy']")
    assert policy is not None and policy.attrib["content"].startswith("default-src 'none'")


def test_hostile_names_and_texts_stay_text(report: Report) -> None:
    words = {"name": HOSTILE, "file": HOSTILE, "source": HOSTILE, "revision": HOSTILE, "exporter": HOSTILE}
    assert report.quality is not None and report.texts is not None and report.compression is not None
    bad = dataclasses.replace(
        report,
        subject=dataclasses.replace(report.subject, **words, options={HOSTILE: HOSTILE}),
        quality=dataclasses.replace(report.quality, text=HOSTILE),
        texts=dataclasses.replace(report.texts, prompts=(Prompt(HOSTILE, True, sample(HOSTILE), sample(HOSTILE)),)),
        points=tuple(dataclasses.replace(point, label=HOSTILE) for point in report.points),
        layers=tuple(dataclasses.replace(one, name=HOSTILE) for one in report.layers),
        machine=dataclasses.replace(report.machine, processor=HOSTILE, kernels=HOSTILE),
        compression=Compression(9.0, (Stage(HOSTILE, 0.0, 9.0, 1),), (Step(HOSTILE, 1.0, 1.0, 0.1),)),
        missing={HOSTILE: HOSTILE},
    )
    text = page(bad)
    assert text.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    root = tree(text)
    assert {found.tag for found in root.iter()} <= {found.tag for found in tree(page(report)).iter()}
    assert root.find(".//h1").text == HOSTILE.translate({0: "�", 0x1B: "�", 0xD800: "�"})  # type: ignore[union-attr]


def test_elements_escape_what_is_not_markup() -> None:
    inner = element("b", "<&>")
    assert element("p", inner, "<", None, ["a", inner], class_='"x"', data_y=1.50) == (
        '<p class="&quot;x&quot;" data-y="1.5"><b>&lt;&amp;&gt;</b>&lt;a<b>&lt;&amp;&gt;</b></p>'
    )
    assert element("br") == "<br/>"


def test_labels_of_an_axis_do_not_touch(report: Report) -> None:
    """By a width of 6.2 units a character, which is more than that of digits."""
    for svg in tree(page(report)).iter("svg"):
        rows: dict[str, list[tuple[float, float]]] = {}
        for label in svg.iter("text"):
            if label.attrib["class"] == "label" and label.attrib["text-anchor"] == "middle":
                half = 3.1 * len(label.text or "")
                rows.setdefault(label.attrib["y"], []).append(
                    (float(label.attrib["x"]) - half, float(label.attrib["x"]) + half)
                )
        for row in rows.values():
            row.sort()
            assert all(left[1] <= right[0] for left, right in itertools.pairwise(row))


positive = st.floats(1e-6, 1e9)


@given(low=positive, factor=st.floats(1.01, 1e6), most=st.integers(3, 8))
def test_ticks_lie_within_the_scale(low: float, factor: float, most: int) -> None:
    high = low * factor
    for ticks in (log_ticks(low, high, most), linear_ticks(low, high, most)):
        assert ticks == sorted(ticks) and len(ticks) <= most + 1
        assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)
    scale = Scale(low, high, 10.0, 110.0, log=True)
    assert scale(low) == 10 and scale(high) == 110 and scale(low / 2) == 10 and scale(high * 2) == 110
    assert math.isclose(scale(math.sqrt(low) * math.sqrt(high)), 60, rel_tol=1e-6)


def test_wording() -> None:
    assert [compact(value) for value in (0, 0.13441, 0.0000123, 1.7959, 1234.5)] == [
        "0",
        "0.134",
        "0.0000123",
        "1.8",
        "1230",
    ]
    assert (change(53.45, 45.52), change(1.0, 2.0)) == ("+17.4 %", "−50.0 %")
