// What the pages do besides what the server has drawn: keys, times that go on, selection, the
// reader's time zone. Every page can be read without it.
"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const body = document.body;

  // The reader's zone: told once, then the server writes all times in it.
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (zone && !/recall_zone=/.test(document.cookie) && zone !== body.dataset.zone && $("main")) {
    const path = body.dataset.base.replace(/\/$/, "") || "/";
    document.cookie = `recall_zone=${zone}; path=${path}; max-age=31536000; samesite=strict`;
    if (/recall_zone=/.test(document.cookie) && !$("form[method=post] input:focus")) location.reload();
  }

  // Times relative to now. `skew`: how far this clock is from the server's, by the page's age.
  const relative = (seconds) => {
    const size = Math.abs(seconds);
    for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
      if (size >= length * (unit === "s" ? 1 : 1.5)) {
        const text = `${Math.round(size / length)} ${unit}`;
        return seconds > 0 ? `in ${text}` : `${text} ago`;
      }
    }
    return "now";
  };
  const two = (number) => String(number).padStart(2, "0");
  const lasting = (seconds) => {
    const whole = Math.max(0, Math.floor(seconds));
    if (whole >= 86400) return `${Math.floor(whole / 86400)} d ${two(Math.floor((whole % 86400) / 3600))} h`;
    if (whole >= 3600) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
    return whole >= 60 ? `${Math.floor(whole / 60)} min ${two(whole % 60)} s` : `${whole} s`;
  };
  const tick = () => {
    const now = Date.now();
    for (const element of $$('time[data-counts]:not([data-counts=""])')) {
      const seconds = (Date.parse(element.dateTime) - now) / 1000;
      if (Number.isNaN(seconds)) continue;
      const text = element.dataset.counts === "relative" ? relative(seconds) : lasting(-seconds);
      if (element.textContent !== text) element.textContent = text;
    }
  };
  setInterval(tick, 1000);

  // What a person has selected, or is at with the keys, is not moved under their hand: a list that
  // is read says instead that it has changed.
  document.addEventListener("htmx:sseBeforeMessage", (event) => {
    const live = event.target;
    if (live.id !== "live") return;
    const chosen = getSelection();
    const selects = chosen && !chosen.isCollapsed && live.contains(chosen.anchorNode);
    const reads = "read" in live.dataset && live.contains(document.activeElement);
    $("#held").hidden = !(selects || reads);
    if (selects || reads) event.preventDefault();
  });
  document.addEventListener("htmx:afterSwap", () => { tick(); mark(); });

  // Keys.
  let at = -1;
  let going = 0;
  const rows = () => $$("main table.rows tbody tr").filter((row) => $("a.id", row));
  const mark = () => {
    rows().forEach((row, number) => row.classList.toggle("at", number === at));
  };
  const move = (by) => {
    const all = rows();
    if (!all.length) return;
    at = Math.min(all.length - 1, Math.max(0, at + by));
    mark();
    const link = $("a.id", all[at]);
    link.focus({ preventScroll: true });
    all[at].scrollIntoView({ block: "nearest" });
  };
  const pages = { n: "", a: "agenda", r: "recalls", f: "failures", q: "queues", w: "workers", s: "settings" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input:not([type=checkbox]), textarea, select, dialog")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (going && Date.now() - going < 1500 && event.key in pages) {
      location.href = body.dataset.base + pages[event.key];
      return;
    }
    going = 0;
    if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "x" && at >= 0) { const box = $("input[type=checkbox]", rows()[at]); if (box) box.click(); }
    else if (event.key === "g") going = Date.now();
    else if (event.key === "/") { event.preventDefault(); const jump = $("#jump"); if (jump) jump.focus(); }
    else if (event.key === "?") { const keys = $("#keys"); if (!keys.open) keys.showModal(); }
  });
  document.addEventListener("click", (event) => {
    if (event.target.matches("[data-close]")) event.target.closest("dialog").close();
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-all]")) {
      for (const box of $$("input[name=id][type=checkbox]")) box.checked = event.target.checked;
    }
  });

  // A live page that hears nothing is as old as what it heard last, and says so. The server is
  // heard at least each BEAT seconds (app.py), whatever happens.
  const QUIET = 40_000;
  const stream = $("[sse-connect]");
  if (stream) {
    const lost = document.createElement("p");
    Object.assign(lost, { id: "lost", className: "alert", hidden: true });
    lost.setAttribute("role", "alert");
    stream.before(lost);
    let heard = Date.now();
    let opened = false;
    const hear = () => { heard = Date.now(); lost.hidden = true; };
    const miss = () => {
      if (!lost.hidden) return;
      const at = new Date(heard).toTimeString().slice(0, 8);
      lost.textContent = `The console was last heard of at ${at}: what you see is as old as that. This page goes on by itself when the console is back.`;
      lost.hidden = false;
    };
    document.addEventListener("htmx:sseOpen", (event) => {
      const source = event.detail.source;
      for (const name of ["alive", "page", "link", "changed", "watched"]) source.addEventListener(name, hear);
      hear();
      // What has changed meanwhile was told to nobody: it is asked for now, and again when the server watches the recall, as
      // it tells only what changes from then on.
      const catchUp = () => source.dispatchEvent(new MessageEvent("changed"));
      if (opened) {
        setTimeout(catchUp);
        source.addEventListener("watched", catchUp);
      }
      opened = true;
    });
    document.addEventListener("htmx:sseError", miss);
    // What has changed is asked for until it is there.
    for (const name of ["htmx:responseError", "htmx:sendError"]) {
      document.addEventListener(name, ({ detail: { elt } }) => {
        if (stream.contains(elt)) setTimeout(() => htmx.trigger(elt, "sse:changed"), 5000);
      });
    }
    setInterval(() => { if (Date.now() - heard > QUIET) miss(); }, 1000);
  }
})();
