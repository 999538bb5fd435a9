// Markdown to DOM nodes. Text only ever becomes text nodes: whatever a model writes, no markup of its own can run.

const INLINE =
  /(`+)([^`]|[^`][^]*?[^`])\1(?!`)|\*\*(?=\S)([^]+?)\*\*|__(?=\S)([^]+?)__|\*(?=[^\s*])([^*]+?)\*|(?<!\w)_(?=[^\s_])([^_]+?)_(?!\w)|!?\[([^\]\n]*)\]\(([^\s()<>]*)(?:\s+"[^"]*")?\)|(https?:\/\/[^\s<>()\]]*[^\s<>()\].,;:!?"'])|\\([\\`*_{}[\]()#+\-.!|>~])/g;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DEEPEST = 8;

export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// A link is only one to the web or to mail; anything else stays text.
function link(target, children) {
  let url = null;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return element("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" }, ...children);
}

export function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    const [all, , code, strong, strong2, emphasis, emphasis2, label, target, url, escaped] = match;
    if (code !== undefined) nodes.push(element("code", { textContent: code.trim() || code }));
    else if (strong ?? strong2) nodes.push(element("strong", {}, ...inline(strong ?? strong2, depth + 1)));
    else if (emphasis ?? emphasis2) nodes.push(element("em", {}, ...inline(emphasis ?? emphasis2, depth + 1)));
    else if (label !== undefined) nodes.push(link(target, [label || target]) ?? all);
    else if (url !== undefined) nodes.push(link(url, [url]) ?? all);
    else nodes.push(escaped ?? all);
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function lines(text) {
  return text.split("\n").flatMap((line, index) => [...(index ? [element("br")] : []), ...inline(line.trimEnd())]);
}

function codeBlock(language, text) {
  const copy = element("button", { type: "button", className: "icon copy-code", "aria-label": "Copy code" });
  return element(
    "div",
    { className: "code" },
    element("div", { className: "head" }, element("span", { textContent: language || "code" }), copy),
    element("pre", { tabIndex: 0 }, element("code", { textContent: text })),
  );
}

function cells(row) {
  return row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
}

function table(rows) {
  const head = element("tr", {}, ...cells(rows[0]).map((cell) => element("th", { scope: "col" }, ...inline(cell))));
  const body = rows.slice(2).map((row) => element("tr", {}, ...cells(row).map((cell) => element("td", {}, ...inline(cell)))));
  return element("table", { tabIndex: 0 }, element("thead", {}, head), element("tbody", {}, ...body));
}

// The items of a list; lines that are indented more belong to the item before them.
function list(source, depth) {
  const [, , mark] = ITEM.exec(source[0]);
  const node = element(/\d/.test(mark) ? "ol" : "ul");
  if (node.tagName === "OL") node.start = parseInt(mark, 10);
  const margin = /^\s*/.exec(source[0])[0].length;
  let item = [];
  const close = () => {
    if (!item.length) return;
    const first = item[0].replace(ITEM, "$3");
    const rest = item.slice(1).map((line) => line.replace(/^\s{1,4}/, ""));
    const box = /^\[([ xX])\]\s/.exec(first);
    const text = box ? `${box[1] === " " ? "☐" : "☑"} ${first.slice(box[0].length)}` : first;
    node.append(element("li", {}, ...inline(text), ...blocks(rest, depth + 1)));
    item = [];
  };
  for (const line of source) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= margin + 1) close();
    item.push(line);
  }
  close();
  return node;
}

function blocks(source, depth = 0) {
  const nodes = [];
  let at = 0;
  const take = (test) => {
    const start = at;
    while (at < source.length && test(source[at], at - start)) at += 1;
    return source.slice(start, at);
  };
  while (at < source.length) {
    const line = source[at];
    const fence = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      at += 1;
      const body = take((row) => !row.trim().startsWith(fence[1]));
      at += 1;
      nodes.push(codeBlock(fence[2], body.join("\n")));
    } else if (heading) {
      at += 1;
      nodes.push(element(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
    } else if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      at += 1;
      nodes.push(element("hr"));
    } else if (depth < DEEPEST && /^\s{0,3}>/.test(line)) {
      const body = take((row) => /^\s{0,3}>/.test(row)).map((row) => row.replace(/^\s{0,3}>\s?/, ""));
      nodes.push(element("blockquote", {}, ...blocks(body, depth + 1)));
    } else if (depth < DEEPEST && ITEM.test(line)) {
      const margin = /^\s*/.exec(line)[0].length;
      const body = take((row, index) => index === 0 || ITEM.test(row) || (row.trim() && row.search(/\S/) > margin));
      nodes.push(list(body, depth));
    } else if (line.includes("|") && /^\s*\|?[\s:|-]*-[\s:|-]*$/.test(source[at + 1] ?? "") && source[at + 1].includes("|")) {
      nodes.push(table(take((row) => row.includes("|"))));
    } else {
      const body = take((row, index) => index === 0 || (row.trim() && !/^\s{0,3}(```|~~~|#{1,6}\s|>)/.test(row) && !ITEM.test(row)));
      nodes.push(element("p", {}, ...lines(body.join("\n"))));
    }
  }
  return nodes;
}

export function render(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"));
}
