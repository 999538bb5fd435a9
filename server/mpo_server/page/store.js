// Conversations and settings, kept in this browser.

const CONVERSATIONS = "mpo.conversations";
const SETTINGS = "mpo.settings";
const KEY = "mpo.key";
const MOST = 100;

export const DEFAULTS = {
  system: "", temperature: "0.7", top_p: "", top_k: "", min_p: "", max_tokens: "", seed: "", theme: "auto",
};

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
  } catch {
    // storage is full or forbidden: the conversation goes on without
  }
}

function sound(conversation) {
  return typeof conversation?.id === "string" && Array.isArray(conversation.messages);
}

export function loadConversations() {
  const found = read(localStorage, CONVERSATIONS, []);
  return Array.isArray(found) ? found.filter(sound) : [];
}

export const saveConversations = (conversations) =>
  write(localStorage, CONVERSATIONS, conversations.filter((one) => one.messages.length).slice(0, MOST));

export const loadSettings = () => ({ ...DEFAULTS, ...read(localStorage, SETTINGS, {}) });
export const saveSettings = (settings) => write(localStorage, SETTINGS, settings);
export const loadKey = () => read(sessionStorage, KEY, "");
export const saveKey = (key) => write(sessionStorage, KEY, key);
