// The panel about the model: what was measured of it, and its bits and cores, layer by layer.

import { element } from "/markdown.js";

const KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const SHORT = { q_proj: "q", k_proj: "k", v_proj: "v", o_proj: "o", gate_proj: "gate", up_proj: "up", down_proj: "down" };

const number = (value, digits = 2) => Number(value).toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const whole = (value) => Number(value).toLocaleString("en");

function bytes(count) {
  for (const unit of ["B", "kB", "MB"]) {
    if (count < 1000) return `${count.toPrecision(3)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(2)} GB`;
}

function rows(pairs) {
  const list = element("dl");
  for (const [name, value] of pairs) {
    if (value !== null && value !== undefined && value !== "") {
      list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    }
  }
  return list;
}

function certificate(props) {
  const nodes = [element("h3", { textContent: "Quality certificate" })];
  if (!props.quality.length) {
    nodes.push(element("p", { className: "note", textContent: "This model has none: only .mpo files carry what was measured when they were made." }));
  }
  for (const entry of props.quality) {
    const found = entry.quality;
    if (props.quality.length > 1) nodes.push(element("p", { className: "note", textContent: entry.chi === null ? "Whole file" : `With χ up to ${entry.chi}` }));
    nodes.push(
      rows([
        ["Perplexity", `${number(found.perplexity, 3)} ± ${number(found.perplexity_error, 3)}`],
        ["… of the original", number(found.dense_perplexity, 3)],
        ["KL divergence", `${number(found.kl_mean, 5)} nats`],
        ["Same most likely token", `${number(100 * found.same_top1, 1)} %`],
        ["Measured on", `${whole(found.tokens)} tokens of ${found.text}`],
      ]),
    );
  }
  return nodes;
}

// One of six shades, from few bits to many.
const shade = (bits) => `q${[2.6, 3.6, 4.6, 5.6, 8.6].filter((edge) => bits > edge).length + 1}`;

function cell(layer) {
  if (!layer) return element("td");
  const title = `${layer.name}: ${layer.terms.join(" + ")}, ${layer.shape.join("×")}`;
  const cores = layer.chi === null ? null : element("small", { textContent: `χ${layer.chi}` });
  return element("td", { className: shade(layer.bits), title }, number(layer.bits, 1), cores);
}

function heatMap(layers) {
  const blocks = new Map();
  const others = [];
  for (const layer of layers) {
    const match = /layers\.(\d+)\..*?(\w+)$/.exec(layer.name);
    if (!match || !KINDS.includes(match[2])) {
      others.push(layer);
      continue;
    }
    if (!blocks.has(match[1])) blocks.set(match[1], {});
    blocks.get(match[1])[match[2]] = layer;
  }
  const head = element("tr", {}, element("td"), ...KINDS.map((kind) => element("th", { scope: "col", textContent: SHORT[kind] })));
  const body = [...blocks].map(([block, kinds]) =>
    element("tr", {}, element("th", { scope: "row", textContent: block }), ...KINDS.map((kind) => cell(kinds[kind]))),
  );
  const caption = element("caption", { className: "hidden", textContent: "Bits for each weight, and bonds of cores, by block and layer" });
  const map = element("div", { className: "map", tabIndex: 0, role: "region", "aria-label": "Bits by layer" },
    element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...body)));
  const rest = rows(others.map((layer) => [layer.name.replace(/^model\.|\.weight$/g, ""), `${number(layer.bits, 1)} bits`]));
  const note = layers.some((layer) => layer.chi !== null)
    ? "Bits that each weight takes, by block and layer. χ marks layers with tensor-network cores, and their largest bond."
    : "Bits that each weight takes, by block and layer. This model has no tensor-network cores.";
  return [element("h3", { textContent: "Bits and cores by layer" }), map, rest, element("p", { className: "note", textContent: note })];
}

export function fill(place, props) {
  const source = props.provenance.exporter ? `${props.provenance.source}` : "";
  place.replaceChildren(
    rows([
      ["Parameters", whole(props.parameters)],
      ["Size", `${bytes(props.bytes)}, ${number(props.bits_per_weight)} bits a weight`],
      ["Context", `${whole(props.n_ctx)} of ${whole(props.n_ctx_train)} tokens`],
      ["Made from", source],
      ["Made by", props.provenance.exporter],
      ["Kernels", props.kernels.threads ? `${props.kernels.native}, ${props.kernels.threads} threads` : props.kernels.native],
    ]),
    ...certificate(props),
    ...(props.layers.length ? heatMap(props.layers) : []),
  );
}
