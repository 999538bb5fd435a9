"""Handcrafted hostile files: each breaks one rule of SPEC.md and must give exactly its line of messages.txt.

    python -m tests.hostile.cases FOLDER

writes them all into a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.sample import Sample, frame, valid_file

EMBED = "model.embed_tokens.0.weight"
QUERY = "model.layers.0.self_attn.q_proj"
KEY = "model.layers.0.self_attn.k_proj"
VALUE = "model.layers.0.self_attn.v_proj"
OUT = "model.layers.0.self_attn.o_proj"
GATE = "model.layers.0.mlp.gate_proj"
NORM = "model.norm.weight"
# A stored transform of the 32 inputs of q and k.
TURN = {
    "name": QUERY,
    "block": 16,
    "count": 1,
    "term": {"kind": "quantized", "bits": 4, "group": 16, "zeros": False},
}


LINES = Path(__file__).with_name("messages.txt").read_text(encoding="utf-8").splitlines()
MESSAGES = dict(line.split(": ", 1) for line in LINES)


@dataclass(frozen=True, slots=True)
class Case:
    """A damaged file: the rule it breaks, and how it is made."""

    name: str
    rule: str
    build: Callable[[Sample], bytes]

    @property
    def message(self) -> str:
        """The error that it must give, without the file's name in front."""
        return MESSAGES[self.name]


def padding(sample: Sample) -> str:
    """The name of the first padding tensor."""
    return next(name for name in sample.table if name.startswith("mpo.padding."))


CONTAINER = [
    Case("empty", "R1", lambda s: b""),
    Case("seven-bytes", "R1", lambda s: valid_file()[:7]),
    Case("length-over-limit", "R2", lambda s: (4 * 2**20 + 56).to_bytes(8, "little") + valid_file()[8:]),
    Case("length-all-ones", "R2", lambda s: b"\xff" * 8 + valid_file()[8:]),
    Case("cut-inside-header", "R3", lambda s: valid_file()[:2000]),
    Case("length-unaligned", "R4", lambda s: (4001).to_bytes(8, "little") + valid_file()[8:]),
    Case("length-zero", "R4", lambda s: bytes(8) + valid_file()[8:]),
    Case("leading-space", "R5", lambda s: frame(b" " + s.bytes()[8:3000], b"")),
    Case("byte-order-mark", "R5", lambda s: frame(b"\xef\xbb\xbf{}", b"")),
    Case("pickle", "R5", lambda s: frame(b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"")),
]

TEXTS = [
    Case("header-latin-1", "R6", lambda s: frame(b'{"caf\xe9": 1}', b"")),
    Case("overlong-utf-8", "R6", lambda s: frame(b'{"\xc0\xaf": 1}', b"")),
    Case("surrogate-in-record", "R6", lambda s: s.replace('"tiny"', '"\ud800"', "provenance")),
    Case("many-lists", "R7", lambda s: frame(b'{"a":[' + b"[]," * 140_000 + b"0]}", b"")),
    Case("many-objects", "R7", lambda s: frame(b'{"a":[' + b"{}," * 1_390_000 + b"0]}", b"")),
    Case("deep-header", "R8", lambda s: frame(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")),
    Case("deep-record", "R8", lambda s: s.replace('"bonds":[6]', '"bonds":' + "[" * 9 + "]" * 9, "layers")),
    Case("no-closing-brace", "R8", lambda s: frame(b'{"__metadata__": {"format": "mpo"}', b"")),
    Case("no-value", "R9", lambda s: frame(b'{"a": }', b"")),
    Case("text-after-header", "R9", lambda s: frame(b"{} x", b"")),
    Case("unterminated-string", "R8", lambda s: frame(b'{"a' + b'\\"' * 500_000, b"")),
    Case("empty-record", "R9", lambda s: (s.metadata.update(files=""), s.bytes())[1]),
    Case("number-of-5000-digits", "R9", lambda s: s.replace('"shape":[8,32]', f'"shape":[{"9" * 5000},32]')),
    Case("same-tensor-twice", "R10", lambda s: s.replace(f'"{NORM}"', f'"{EMBED}"')),
    Case("metadata-twice", "R10", lambda s: s.replace(f'"{NORM}":{{', '"__metadata__":{')),
    Case("metadata-key-twice", "R10", lambda s: s.replace('"version":', '"format":')),
    Case("dtype-twice", "R10", lambda s: s.replace('"dtype":"BF16"', '"dtype":"BF16","dtype":"F16"')),
    Case("record-key-twice", "R10", lambda s: s.replace('"head_dim":', '"hidden_size":', "architecture")),
    Case("nan-in-record", "R11", lambda s: s.replace("10000.0", "NaN", "architecture")),
    Case("infinity-in-shape", "R11", lambda s: s.replace('"shape":[8,32]', '"shape":[-Infinity,32]')),
]

METADATA = [
    Case("no-metadata", "R12", lambda s: (s.table.pop("__metadata__"), s.bytes())[1]),
    Case("metadata-list", "R12", lambda s: (s.table.update(__metadata__=["mpo"]), s.bytes())[1]),
    Case("number-in-metadata", "R13", lambda s: (s.metadata.update(version=0.1), s.bytes())[1]),
    Case("nested-metadata", "R13", lambda s: (s.metadata.update(files=[]), s.bytes())[1]),
    Case("other-format", "R14", lambda s: (s.metadata.update(format="pt"), s.bytes())[1]),
    Case("no-format", "R14", lambda s: (s.metadata.pop("format"), s.bytes())[1]),
    Case("major-from-the-future", "R15", lambda s: (s.metadata.update(version="1.0"), s.bytes())[1]),
    Case("minor-from-the-future", "R15", lambda s: (s.metadata.update(version="0.6"), s.bytes())[1]),
    Case("version-with-escapes", "R15", lambda s: (s.metadata.update(version="\x1b[2J" * 50), s.bytes())[1]),
    Case("no-version", "R15", lambda s: (s.metadata.pop("version"), s.bytes())[1]),
    Case(
        "future-comes-first", "R15", lambda s: (s.metadata.update(version="7.0", extra=""), s.row(EMBED, dtype="F4"))[1]
    ),
    Case("unknown-metadata", "R16", lambda s: (s.metadata.update(plugin="evil"), s.bytes())[1]),
    Case("no-layers", "R17", lambda s: (s.metadata.pop("layers"), s.bytes())[1]),
]

RECORDS = [
    Case("layers-object", "R18", lambda s: s.change("layers", (), {})),
    Case("dims-number", "R18", lambda s: s.change("layers", (1, "terms", 1, "out_dims"), 16)),
    Case("many-end-tokens", "R19", lambda s: s.change("architecture", ("eos_token_ids",), [0] * 40_000)),
    Case("architecture-list", "R20", lambda s: s.change("architecture", (), [])),
    Case("rope-null", "R20", lambda s: s.change("architecture", ("rope",), None)),
    Case("layer-string", "R20", lambda s: s.change("layers", (0,), "x")),
    Case("unknown-field", "R21", lambda s: s.change("layers", (1, "terms", 0, "lattice"), True)),
    Case("unknown-setting", "R21", lambda s: s.change("architecture", ("sliding_window",), 4)),
    Case("missing-field", "R22", lambda s: s.remove("architecture", ("rope", "theta"))),
    Case("missing-bonds", "R22", lambda s: s.remove("layers", (1, "terms", 1, "bonds"))),
    Case("size-string", "R23", lambda s: s.change("architecture", ("vocab_size",), "8")),
    Case("size-fraction", "R23", lambda s: s.change("architecture", ("hidden_size",), 32.0)),
    Case("size-true", "R23", lambda s: s.change("layers", (1, "terms", 1, "bonds"), [True])),
    Case("flag-number", "R23", lambda s: s.change("architecture", ("mlp_bias",), 0)),
    Case("name-number", "R23", lambda s: s.change("layers", (2, "name"), 7)),
    Case("number-beyond-float", "R23", lambda s: s.replace("10000.0", "1e999", "architecture")),
    Case("option-number", "R23", lambda s: s.change("provenance", ("options", "chi"), 6)),
    Case("core-type", "R24", lambda s: s.change("layers", (1, "terms", 1, "dtype"), "f8")),
    Case("seven-bits", "R24", lambda s: s.change("layers", (1, "terms", 0, "bits"), 7)),
    Case("negative-bits", "R24", lambda s: s.change("layers", (1, "terms", 0, "bits"), -4)),
    Case("group-zero", "R24", lambda s: s.change("layers", (1, "terms", 0, "group"), 0)),
    Case("path-as-file", "R24", lambda s: s.change("files", (0, "name"), "../../.bashrc")),
    Case("other-layout", "R24", lambda s: s.change("layouts", ("cores",), "left-out-in-right")),
    Case("other-bond-order", "R24", lambda s: s.change("layouts", ("bond_order",), "ascending")),
    Case("other-model", "R24", lambda s: s.change("architecture", ("model_type",), "mamba")),
    Case("unknown-term", "R25", lambda s: s.change("layers", (1, "terms", 0), {"kind": "lora"})),
    Case("term-without-kind", "R25", lambda s: s.remove("layers", (1, "terms", 0, "kind"))),
    Case("vocabulary-zero", "R26", lambda s: s.change("architecture", ("vocab_size",), 0)),
    Case("negative-dims", "R26", lambda s: s.change("layers", (1, "terms", 1, "out_dims"), [-4, -4])),
    Case("bond-zero", "R26", lambda s: s.change("layers", (1, "terms", 1, "bonds"), [0])),
    Case("dims-that-overflow", "R26", lambda s: s.change("layers", (1, "terms", 1, "in_dims"), [2**32 + 8, 4])),
    Case("size-of-30-digits", "R26", lambda s: s.change("architecture", ("hidden_size",), 10**30)),
    Case("end-token-outside", "R26", lambda s: s.change("architecture", ("eos_token_ids",), [8])),
    Case("blocks-without-end", "R26", lambda s: s.change("architecture", ("num_hidden_layers",), 2**31 - 1)),
    Case("escape-sequence", "R27", lambda s: s.change("provenance", ("source",), "\x1b[2Jgranite")),
    Case("lone-surrogate", "R27", lambda s: s.change("provenance", ("revision",), "\ud800")),
    Case("endless-option", "R27", lambda s: s.change("provenance", ("options", "chi"), "x" * 5000)),
    Case("upper-case-digest", "R28", lambda s: s.change("provenance", ("source_sha256",), "AB" * 32)),
    Case("empty-layer-name", "R29", lambda s: s.change("layers", (1, "name"), "")),
    Case("newline-in-name", "R29", lambda s: s.change("vectors", (0, "name"), "a\nb")),
    Case("negative-theta", "R30", lambda s: s.change("architecture", ("rope", "theta"), -1)),
    Case("epsilon-one", "R30", lambda s: s.change("architecture", ("rms_norm_eps",), 1)),
    Case("many-options", "R31", lambda s: s.change("provenance", ("options",), {str(n): "" for n in range(257)})),
    Case("three-hundred-end-tokens", "R31", lambda s: s.change("architecture", ("eos_token_ids",), [0] * 300)),
    Case("windows-in-0.2", "R21", lambda s: s.change("architecture", ("windows",), [4])),
    Case("qwen-in-0.2", "R24", lambda s: s.change("architecture", ("model_type",), "qwen2")),
    Case("yarn-in-0.2", "R24", lambda s: s.change("architecture", ("rope", "scaling"), "yarn")),
    Case("no-windows", "R22", lambda s: s.later().remove("architecture", ("windows",))),
    Case("window-number", "R18", lambda s: s.later().change("architecture", ("windows",), 4096)),
    Case("window-below-zero", "R26", lambda s: s.later().change("architecture", ("windows",), [0, -1])),
    Case("model-type-of-tomorrow", "R24", lambda s: s.later().change("architecture", ("model_type",), "mamba")),
    Case("attention-factor-zero", "R30", lambda s: s.later().change("architecture", ("rope", "attention_factor"), 0)),
]

ARCHITECTURE = [
    Case("odd-heads", "R32", lambda s: s.change("architecture", ("num_key_value_heads",), 3)),
    Case("odd-head-size", "R33", lambda s: s.change("architecture", ("head_dim",), 7)),
    Case("division-by-zero", "R34", lambda s: s.change("architecture", ("logits_scaling",), 0)),
    Case("rope-factors", "R35", lambda s: s.change("architecture", ("rope", "scaling"), "llama3")),
    Case("rope-factor-unused", "R36", lambda s: s.change("architecture", ("rope", "factor"), 8)),
    Case("rope-length-unused", "R36", lambda s: s.change("architecture", ("rope", "high_freq_factor"), 4)),
    Case("yarn-factors", "R35", lambda s: s.later().change("architecture", ("rope", "scaling"), "yarn")),
    Case("yarn-unused", "R36", lambda s: s.later().change("architecture", ("rope", "attention_factor"), 2)),
]

LAYERS = [
    Case("no-terms", "R37", lambda s: s.change("layers", (1, "terms"), [])),
    Case("nine-terms", "R37", lambda s: s.change("layers", (0, "terms"), [{"kind": "dense", "dtype": "f32"}] * 9)),
    Case("group-that-does-not-divide", "R38", lambda s: s.change("layers", (1, "terms", 0, "group"), 64)),
    Case("blocks-that-do-not-divide", "R38", lambda s: s.later().change("layers", (1, "hadamard"), 64)),
    Case("hadamard-of-48", "R24", lambda s: s.later().change("layers", (1, "hadamard"), 48)),
    Case("hadamard-true", "R23", lambda s: s.later().change("layers", (1, "hadamard"), True)),
    Case("no-hadamard", "R22", lambda s: s.later().remove("layers", (1, "hadamard"))),
    Case("hadamard-before-its-time", "R21", lambda s: s.change("layers", (1, "hadamard"), 16)),
    Case("no-transform", "R22", lambda s: s.later().remove("layers", (1, "transform"))),
    Case("transform-before-its-time", "R21", lambda s: s.change("layers", (1, "transform"), None)),
    Case("transform-of-48", "R24", lambda s: s.later(TURN).change("layers", (1, "transform", "block"), 48)),
    Case(
        "transform-of-cores", "R25", lambda s: s.later(TURN).change("layers", (1, "transform", "term", "kind"), "mpo")
    ),
    Case("transform-of-no-matrices", "R26", lambda s: s.later(TURN).change("layers", (1, "transform", "count"), 0)),
    Case("group-over-a-block", "R38", lambda s: s.later(TURN).change("layers", (1, "transform", "term", "group"), 32)),
    Case("transform-over-the-inputs", "R38", lambda s: s.later(TURN).change("layers", (1, "transform", "block"), 64)),
    Case("too-many-matrices", "R38", lambda s: s.later(TURN).change("layers", (1, "transform", "count"), 3)),
    Case("two-transforms", "R38", lambda s: s.later(TURN).change("layers", (1, "hadamard"), 16)),
    Case("transform-of-no-layer", "R38", lambda s: s.later(TURN).change("layers", (1, "transform", "name"), "here")),
    Case("transform-of-two-forms", "R38", lambda s: s.later(TURN).change("layers", (2, "transform", "count"), 2)),
    Case("transform-without-tensors", "R56", lambda s: s.later(TURN).bytes()),
    Case("seventeen-cores", "R39", lambda s: s.change("layers", (1, "terms", 1, "out_dims"), [1] * 17)),
    Case("one-core", "R39", lambda s: s.change("layers", (1, "terms", 1, "out_dims"), [16])),
    Case("fewer-in-dims", "R39", lambda s: s.change("layers", (1, "terms", 1, "in_dims"), [32])),
    Case("a-bond-too-many", "R39", lambda s: s.change("layers", (1, "terms", 1, "bonds"), [6, 6])),
    Case("dims-that-do-not-multiply", "R40", lambda s: s.change("layers", (1, "terms", 1, "out_dims"), [4, 5])),
    Case("dims-beyond-64-bits", "R40", lambda s: s.change("layers", (2, "terms", 1, "in_dims"), [2**31 - 1] * 3)),
    Case("bond-beyond-full-rank", "R41", lambda s: s.change("layers", (1, "terms", 1, "bonds"), [17])),
    Case("huge-bond", "R41", lambda s: s.change("layers", (1, "terms", 1, "bonds"), [2**31 - 1])),
    Case("group-of-float-cores", "R42", lambda s: s.change("layers", (1, "terms", 1, "group"), 16)),
    Case("group-beyond-core", "R42", lambda s: s.change("layers", (5, "terms", 0, "group"), 32)),
    Case("fewer-layers", "R43", lambda s: s.remove("layers", (7,))),
    Case("more-blocks", "R43", lambda s: s.change("architecture", ("num_hidden_layers",), 4096)),
    Case("foreign-layer", "R43", lambda s: s.change("layers", (1, "name"), "model.layers.1.self_attn.q_proj")),
    Case("layer-of-another-size", "R43", lambda s: s.change("architecture", ("head_dim",), 16)),
    Case("surprising-bias", "R43", lambda s: s.change("layers", (3, "bias"), "f32")),
    Case("fewer-vectors", "R44", lambda s: s.remove("vectors", (2,))),
    Case("no-head-norms", "R44", lambda s: s.later().change("architecture", ("model_type",), "qwen3")),
    Case("a-gate-too-many", "R43", lambda s: s.later().change("architecture", ("model_type",), "gpt_neo")),
    Case("vector-of-another-size", "R44", lambda s: s.change("vectors", (2, "size"), 31)),
    Case("file-twice", "R45", lambda s: s.change("files", (), [{"name": "tokenizer.json", "size": 24}] * 2)),
]

PLACES = [
    Case("row-with-extra-key", "R46", lambda s: s.row(EMBED, strides=[1])),
    Case("row-list", "R46", lambda s: (s.table.update({EMBED: []}), s.bytes())[1]),
    Case("row-without-shape", "R46", lambda s: (s.table[EMBED].pop("shape"), s.bytes())[1]),
    Case("unknown-type", "R47", lambda s: s.row(EMBED, dtype="F8_E4M3")),
    Case("type-list", "R47", lambda s: s.row(EMBED, dtype=["BF16"])),
    Case("negative-size", "R48", lambda s: s.row(EMBED, shape=[-8, -32])),
    Case("zero-size", "R48", lambda s: s.row(EMBED, shape=[0, 32])),
    Case("huge-size", "R48", lambda s: s.row(EMBED, shape=[2**63, 2**63])),
    Case("no-dimensions", "R48", lambda s: s.row(EMBED, shape=[])),
    Case("five-dimensions", "R48", lambda s: s.row(EMBED, shape=[1, 1, 1, 8, 32])),
    Case("fraction-in-shape", "R48", lambda s: s.row(EMBED, shape=[8.0, 32])),
    Case("truth-in-shape", "R48", lambda s: s.row(EMBED, shape=[True, 256])),
    Case("negative-offset", "R49", lambda s: s.row(EMBED, data_offsets=[-512, 0])),
    Case("huge-offset", "R49", lambda s: s.row(EMBED, data_offsets=[2**64, 2**64 + 512])),
    Case("three-offsets", "R49", lambda s: s.row(EMBED, data_offsets=[0, 512, 512])),
    Case("end-outside-the-file", "R50", lambda s: s.row(EMBED, data_offsets=[0, 2**40], shape=[2**34, 32])),
    Case("end-before-begin", "R50", lambda s: s.row(EMBED, data_offsets=[512, 0])),
    Case("cut-inside-tensors", "R50", lambda s: valid_file()[:-4000]),
    Case("cut-by-one-byte", "R50", lambda s: valid_file()[:-1]),
    Case("shape-larger-than-bytes", "R51", lambda s: s.row(EMBED, shape=[8, 33])),
    Case("product-beyond-64-bits", "R51", lambda s: s.row(EMBED, shape=[2**33, 2**32, 1, 256])),
    Case("overlap", "R52", lambda s: s.row(f"{QUERY}.0.q4", data_offsets=[256, 512])),
    Case("two-names-for-one-place", "R52", lambda s: s.row(NORM, data_offsets=[0, 64])),
    Case("hole", "R53", lambda s: s.drop(f"{QUERY}.0.q4", bytes_too=False)),
    Case("hole-at-the-start", "R53", lambda s: s.drop(EMBED, bytes_too=False)),
    Case("misaligned", "R54", lambda s: s.drop(padding(s), bytes_too=True)),
    Case("appended-bytes", "R55", lambda s: valid_file() + b"PK\x03\x04 a second archive"),
]

LIST = [
    Case("missing-tensor", "R56", lambda s: s.drop(f"{QUERY}.0.q4", bytes_too=True)),
    Case("missing-checksums", "R56", lambda s: s.drop("mpo.checksums", bytes_too=True)),
    Case("renamed-tensor", "R56", lambda s: s.replace(f'"{NORM}"', '"model.norm.bias"')),
    Case("unlisted-file", "R57", lambda s: s.change("files", (), [])),
    Case("smuggled-tensor", "R57", lambda s: smuggled(s)),
    Case("other-type", "R58", lambda s: s.row(EMBED, dtype="F16")),
    Case("transposed", "R58", lambda s: s.row(EMBED, shape=[32, 8])),
    Case("bond-of-one-core", "R58", lambda s: s.row(f"{QUERY}.1.core0", shape=[3, 2, 4, 8])),
    Case("bonds-that-differ", "R58", lambda s: s.row(f"{KEY}.1.core1", shape=[1, 1, 4, 20])),
    Case("bond-of-the-table", "R58", lambda s: s.change("layers", (1, "terms", 1, "bonds"), [5])),
    Case("swapped-tensors", "R58", lambda s: s.reordered(f"{QUERY}.0.scale", f"{QUERY}.0.zero")),
    Case("swapped-layers", "R58", lambda s: s.reordered(f"{OUT}.0.weight", f"{VALUE}.0.weight")),
]

VERIFIED = [
    Case("flipped-bit", "R59", lambda s: s.poke(EMBED, b"\x01", 300, sign=False)),
    Case("changed-header", "R59", lambda s: s.change("provenance", ("source",), "ymir")),
    Case("wrong-checksum", "R59", lambda s: s.poke("mpo.checksums", b"\0" * 32, 64, sign=False)),
    Case("message-in-padding", "R60", lambda s: s.poke(padding(s), b"hidden")),
    Case("nan-scale", "R61", lambda s: s.poke(f"{QUERY}.0.scale", b"\x00\x7e", 6)),
    Case("infinite-core-scale", "R61", lambda s: s.poke(f"{GATE}.0.core1.scale", b"\x00\xfc", 2)),
    Case("infinite-zero", "R61", lambda s: s.poke(f"{QUERY}.0.zero", b"\x00\x7c")),
    Case("nan-in-f32-core", "R61", lambda s: s.poke(f"{KEY}.1.core2", b"\x00\x00\xc0\x7f")),
    Case("infinite-bf16", "R61", lambda s: s.poke(NORM, b"\x80\x7f", 10)),
    Case("nan-bf16", "R61", lambda s: s.poke(NORM, b"\x81\xff", 12)),
    Case("certificate-twice", "R62", lambda s: s.certificate(lambda r: r["entries"].append(r["entries"][0]))),
    Case("certificate-of-nothing", "R9", lambda s: s.certificate(text=" ")),
    Case("certificate-null-bytes", "R9", lambda s: s.poke("mpo.certificate", bytes(16384))),
    Case("certificate-with-more", "R21", lambda s: s.certificate(lambda r: r.update(signed=True))),
    Case("certificate-nan", "R11", lambda s: s.certificate(text='{"entries": NaN}')),
    Case("perfect-agreement", "R30", lambda s: s.certificate(lambda r: r["entries"][0]["quality"].update(same_top1=2))),
    Case("certificate-prefix-zero", "R26", lambda s: s.certificate(lambda r: r["entries"][0].update(chi=0))),
]


def smuggled(sample: Sample) -> bytes:
    """A tensor that no layer asks for, in front of the certificate, with everything else consistent."""
    begin, _ = sample.span("mpo.certificate")
    sample.data[begin:begin] = bytes(64)
    sample.shift(begin, 64)
    rows = list(sample.table.items())
    extra = ("payload", {"dtype": "U8", "shape": [64], "data_offsets": [begin, begin + 64]})
    sample.table = dict([*rows[:-2], extra, *rows[-2:]])
    return sample.bytes()


CASES = [*CONTAINER, *TEXTS, *METADATA, *RECORDS, *ARCHITECTURE, *LAYERS, *PLACES, *LIST, *VERIFIED]


def main(folder: Path) -> None:
    """Writes every case into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        (folder / f"{case.name}.mpo").write_bytes(case.build(Sample()))
    print(f"{len(CASES)} hostile files written to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
