// The open chat: what is stored arrives as `message`, what the agent is just saying as `chunk`.
// Texts are only ever set as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);
const log = byId("log"), form = byId("form"), text = byId("text"), send = byId("send");
const here = location.pathname;
const WHO = {user: "You", agent: "Agent", system: "Scheduled recall"};
const PATIENCE = 60000; // how long "answering" is believed without a sign of life, in ms
let waiting = null; // the person's message that the agent has not taken up yet
let open = null; // the answer that is being written
let trouble = ""; // why nothing works just now
let sign; // runs out where no sign of life comes

function add(role, words, at) {
  const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  byId("empty")?.remove();
  const article = document.createElement("article");
  const who = document.createElement("small");
  const what = document.createElement("p");
  article.className = role;
  who.textContent = at ? `${WHO[role]}, ${new Date(at).toLocaleTimeString()}` : WHO[role];
  what.textContent = words;
  article.append(who, what);
  // What still waits stays below what is stored.
  if (waiting) waiting.before(article); else log.append(article);
  if (follow) log.scrollTop = log.scrollHeight;
  return article;
}

function whole() {
  open?.remove();
  open = null;
}

function say(words) { byId("state").textContent = `${words} ${trouble}`.trim(); }

function answering(is) {
  clearTimeout(sign);
  log.classList.toggle("busy", is);
  if (!is) return say(waiting ? "The agent takes up your message…" : "");
  say(waiting ? "The agent is answering. Your message waits for its turn…"
    : "The agent is answering…");
  sign = setTimeout(() => say("No answer has come for a minute."), PATIENCE);
}

const source = new EventSource(`${here}/events`);
source.addEventListener("message", (event) => {
  const {role, text: words, at} = JSON.parse(event.data);
  whole();
  if (role === "user" && waiting?.lastChild.textContent === words) {
    waiting.remove();
    waiting = null;
  }
  add(role, role === "system" ? words.replace("[Scheduled recall] ", "") : words, at);
  answering(role !== "agent");
});
source.addEventListener("chunk", (event) => {
  open ??= add("agent", "", null);
  open.classList.add("open");
  open.lastChild.textContent += JSON.parse(event.data);
  log.scrollTop = log.scrollHeight;
  answering(true);
});
source.addEventListener("whole", whole);
source.addEventListener("open", () => { trouble = ""; say(""); });
source.addEventListener("error", () => { trouble = "The connection is lost; trying again…"; say(""); });

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const words = text.value.trim();
  if (!words || waiting) return;
  text.value = "";
  send.disabled = true;
  const busy = log.classList.contains("busy");
  const mine = add("user", words, null);
  mine.classList.add("waiting");
  waiting = mine;
  log.scrollTop = log.scrollHeight;
  answering(busy);
  let why = "The server does not answer. Your message was not sent.";
  try {
    const answer = await fetch(`${here}/messages`, {
      method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({text: words}),
    });
    why = answer.ok ? "" : (await answer.json()).message;
  } catch { /* why says it */ }
  send.disabled = false;
  if (why) {
    if (waiting === mine) { mine.remove(); waiting = null; }
    text.value ||= words;
    say(why);
  }
});

byId("ideas").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) {
    text.value = event.target.textContent;
    text.focus();
  }
});
