// The page: conversations with the model.

import { answer, props } from "/api.js";
import { icon } from "/icons.js";
import { element, render } from "/markdown.js";
import { fill } from "/panel.js";
import * as store from "/store.js";

const at = (id) => document.getElementById(id);
const messages = at("messages");
const field = at("message");

let settings = store.loadSettings();
let key = store.loadKey();
let conversations = store.loadConversations();
let current = conversations[0] ?? fresh();
let running = null; // the AbortController of the answer that is being written
let modelName = "the model";

function fresh() {
  const conversation = { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [] };
  conversations.unshift(conversation);
  return conversation;
}

function button(name, label, action) {
  const node = element("button", { type: "button", className: "icon", "aria-label": label, title: label }, icon(name));
  node.addEventListener("click", action);
  return node;
}

function announce(text) {
  at("status").textContent = text;
}

// ---- conversations

function showConversations() {
  const rows = conversations
    .filter((one) => one.messages.length || one === current)
    .map((one) => {
      const open = element("button", { type: "button", className: "open", textContent: one.title || "New conversation" });
      open.addEventListener("click", () => openConversation(one));
      if (one === current) open.setAttribute("aria-current", "true");
      const remove = button("remove", `Delete ${one.title || "this conversation"}`, () => removeConversation(one));
      remove.classList.add("remove");
      return element("li", { className: one === current ? "current" : "" }, open, remove);
    });
  at("conversations").replaceChildren(...rows);
}

function openConversation(conversation) {
  running?.abort();
  current = conversation;
  toggleSidebar(false);
  showAll();
  field.focus();
}

function removeConversation(conversation) {
  if (conversation === current) running?.abort();
  conversations = conversations.filter((one) => one !== conversation);
  if (conversation === current) current = conversations[0] ?? fresh();
  store.saveConversations(conversations);
  showAll();
  at("new").focus();
}

function newConversation() {
  const empty = conversations.find((one) => !one.messages.length);
  openConversation(empty ?? fresh());
}

// ---- messages

function showAll() {
  showConversations();
  if (current.messages.length) {
    messages.replaceChildren(...current.messages.map(turn));
  } else {
    messages.replaceChildren(
      element("div", { className: "empty" },
        element("h2", { textContent: `Talk to ${modelName}` }),
        element("p", { textContent: "It runs on this machine. Nothing you write leaves it for the internet." })),
    );
  }
  messages.scrollTop = messages.scrollHeight;
}

function turn(message, index) {
  const last = index === current.messages.length - 1;
  const node = element("article", { className: `turn ${message.role}${message.error ? " error" : ""}${last ? " last" : ""}` });
  const body = element("div", { className: "body" });
  node.append(element("h2", { className: "who hidden", textContent: message.role === "user" ? "You" : "Model" }), body, actions(message, index, last));
  fillBody(body, message);
  return node;
}

function fillBody(body, message) {
  if (message.role === "user") {
    body.textContent = message.content;
    return;
  }
  const parts = [];
  if (message.reasoning) {
    const thoughts = element("details", { className: "thoughts" }, element("summary", { textContent: "Thoughts" }), ...render(message.reasoning));
    thoughts.open = !message.content;
    parts.push(thoughts);
  }
  const text = element("div", { className: "md" }, ...render(message.error ?? message.content));
  for (const copy of text.querySelectorAll(".copy-code")) {
    copy.append(icon("copy"));
    copy.addEventListener("click", () => copyText(copy.closest(".code").querySelector("code").textContent, copy));
  }
  parts.push(text);
  body.replaceChildren(...parts);
}

function actions(message, index, last) {
  const row = element("div", { className: "actions" });
  row.append(button("copy", "Copy", (event) => copyText(message.content, event.currentTarget)));
  if (message.role === "user") row.append(button("edit", "Edit", (event) => edit(event.currentTarget.closest(".turn"), index)));
  if (message.role === "assistant" && last) row.append(button("again", "Write again", () => regenerate(index)));
  if (message.facts) row.append(element("span", { className: "count", textContent: message.facts }));
  return row;
}

async function copyText(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { value: text, className: "hidden" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  node.replaceChildren(icon("done"));
  announce("Copied");
  setTimeout(() => node.replaceChildren(icon("copy")), 1200);
}

function edit(node, index) {
  if (running) return;
  const area = element("textarea", { value: current.messages[index].content, "aria-label": "Edit the message" });
  const save = element("button", { type: "button", className: "primary", textContent: "Send" });
  const cancel = element("button", { type: "button", textContent: "Cancel" });
  cancel.addEventListener("click", () => node.replaceWith(turn(current.messages[index], index)));
  save.addEventListener("click", () => {
    if (!area.value.trim()) return;
    current.messages = current.messages.slice(0, index);
    send(area.value);
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel.click();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save.click();
    }
  });
  node.replaceChildren(element("div", { className: "editor" }, area, element("div", { className: "row" }, cancel, save)));
  area.focus();
}

function regenerate(index) {
  if (running) return;
  current.messages = current.messages.slice(0, index);
  write();
}

function send(text) {
  if (running || !text.trim()) return;
  current.messages.push({ role: "user", content: text.trim() });
  current.title ||= text.trim().split("\n")[0].slice(0, 60);
  write();
}

// ---- answers

function request() {
  const history = current.messages.filter((one) => !one.error).map(({ role, content }) => ({ role, content }));
  const body = { messages: settings.system.trim() ? [{ role: "system", content: settings.system }, ...history] : history };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) {
    if (String(settings[name]).trim() !== "") body[name] = Number(settings[name]);
  }
  return body;
}

async function write() {
  const conversation = current;
  const body = request();
  const message = { role: "assistant", content: "", reasoning: "" };
  conversation.messages.push(message);
  store.saveConversations(conversations);
  showAll();
  const node = messages.lastElementChild;
  const place = node.querySelector(".body");
  node.classList.add("waiting");
  running = new AbortController();
  const { signal } = running;
  setRunning(true);
  announce("The model is writing");
  const meter = { start: 0, count: 0 };
  let drawn = 0;
  let saved = performance.now();
  const draw = () => {
    drawn = 0;
    if (conversation !== current) return;
    const low = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 80;
    fillBody(place, message);
    if (low) messages.scrollTop = messages.scrollHeight;
  };
  try {
    for await (const chunk of answer(body, key, signal)) {
      take(chunk, message, meter);
      if (performance.now() - saved > 1000) {
        saved = performance.now();
        store.saveConversations(conversations);
      }
      drawn ||= requestAnimationFrame(draw);
    }
    announce("The answer is complete");
  } catch (error) {
    if (signal.aborted) {
      announce("Stopped");
    } else {
      message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
      announce(message.error);
    }
  } finally {
    cancelAnimationFrame(drawn);
    running = null;
    setRunning(false);
    if (!message.content && !message.error && !message.reasoning) conversation.messages.pop();
    store.saveConversations(conversations);
    if (conversation === current) showAll();
    else showConversations();
  }
}

function take(chunk, message, meter) {
  const delta = chunk.choices[0]?.delta ?? {};
  message.content += delta.content ?? "";
  message.reasoning += delta.reasoning_content ?? "";
  if (delta.content || delta.reasoning_content) {
    meter.start ||= performance.now();
    meter.count += 1;
    const seconds = (performance.now() - meter.start) / 1000;
    if (seconds > 0.3) at("speed").textContent = `${((meter.count - 1) / seconds).toFixed(1)} tokens/s`;
  }
  if (chunk.usage && chunk.timings) {
    const speed = `${chunk.timings.predicted_per_second.toFixed(1)} tokens/s`;
    if (chunk.timings.predicted_n > 1) at("speed").textContent = speed;
    message.facts = `${chunk.usage.completion_tokens} tokens, ${speed}`;
  }
}

function setRunning(on) {
  at("send").hidden = on;
  at("stop").hidden = !on;
  messages.setAttribute("aria-busy", String(on));
}

// ---- panels and settings

function toggleSidebar(open) {
  at("sidebar").classList.toggle("open", open);
  at("open-sidebar").setAttribute("aria-expanded", String(open));
  if (open) at("close-sidebar").focus();
}

function togglePanel(open) {
  at("panel").hidden = !open;
  at("open-panel").setAttribute("aria-expanded", String(open));
  if (open) at("close-panel").focus();
  else at("open-panel").focus();
}

function setTheme() {
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
}

function openSettings() {
  for (const name of Object.keys(store.DEFAULTS)) at(name).value = settings[name];
  at("key").value = key;
  at("settings").showModal();
}

function keepSettings() {
  for (const name of Object.keys(store.DEFAULTS)) settings[name] = at(name).value;
  const other = at("key").value !== key;
  key = at("key").value;
  store.saveSettings(settings);
  store.saveKey(key);
  setTheme();
  if (other) showModel();
}

async function showModel() {
  try {
    const found = await props(key);
    modelName = found.model;
    at("model").textContent = found.model;
    document.title = found.model;
    fill(at("facts"), found);
    const title = messages.querySelector(".empty h2");
    if (title) title.textContent = `Talk to ${modelName}`;
  } catch (error) {
    at("facts").replaceChildren(element("p", { className: "note", textContent: error.message }));
  }
}

function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function wire() {
  const icons = {
    "open-sidebar": "menu", "close-sidebar": "close", "open-settings": "settings", "open-panel": "panel",
    "close-panel": "close", "close-settings": "close", send: "send", stop: "stop",
  };
  for (const [id, name] of Object.entries(icons)) at(id).append(icon(name));
  at("new").addEventListener("click", newConversation);
  at("open-sidebar").addEventListener("click", () => toggleSidebar(true));
  at("close-sidebar").addEventListener("click", () => {
    toggleSidebar(false);
    at("open-sidebar").focus();
  });
  at("open-panel").addEventListener("click", () => togglePanel(at("panel").hidden));
  at("close-panel").addEventListener("click", () => togglePanel(false));
  at("open-settings").addEventListener("click", openSettings);
  at("settings").addEventListener("close", keepSettings);
  at("stop").addEventListener("click", () => {
    running?.abort();
    field.focus();
  });
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !field.value.trim()) return;
    send(field.value);
    field.value = "";
    grow();
    field.focus();
  });
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      at("composer").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || at("settings").open) return;
    if (at("sidebar").classList.contains("open")) at("close-sidebar").click();
    else running?.abort();
  });
}

setTheme();
wire();
showAll();
showModel();
