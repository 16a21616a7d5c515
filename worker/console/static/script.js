"use strict";
// Refreshes the overview every five seconds while somebody can see it. Without this script, "Refresh" does.
(() => {
  const parts = ["live-needs", "live-rest"].map((id) => document.getElementById(id));
  const words = document.getElementById("words");
  const fresh = document.getElementById("fresh");
  const state = document.getElementById("state");
  if (!parts.every(Boolean) || !words || !fresh) return;
  const EVERY = 5000;
  let asking = false;

  const stops = (part) => [...part.querySelectorAll("a, summary, [tabindex]")];

  // Keeps what a reader has opened, scrolled to or focused.
  const show = (part, html) => {
    const open = [...part.querySelectorAll("details[open]")].map((one) => one.id);
    const scrolled = [...part.querySelectorAll(".wide")].map((one) => one.scrollLeft);
    const stands = stops(part).indexOf(document.activeElement);
    part.innerHTML = html;
    open.forEach((id) => { const one = document.getElementById(id); if (one) one.open = true; });
    part.querySelectorAll(".wide").forEach((one, i) => { one.scrollLeft = scrolled[i] || 0; });
    const again = stops(part)[stands];
    if (again) again.focus({ preventScroll: true });
  };

  // A viewer has neither of the two forms.
  const hide = (id, wanted) => { const one = document.getElementById(id); if (one) one.hidden = wanted; };

  const refresh = async () => {
    if (asking || document.hidden) return;
    // Leave text alone that somebody is selecting.
    const selection = document.getSelection();
    if (selection && !selection.isCollapsed && parts.some((part) => part.contains(selection.anchorNode))) return;
    asking = true;
    try {
      const answer = await fetch(parts[1].dataset.source, { headers: { Accept: "text/html" }, redirect: "error" });
      if (answer.status === 401 || answer.status === 403) {
        // No longer logged in: the page itself says what to do.
        window.location.reload();
        return;
      }
      const found = document.createElement("template");
      found.innerHTML = await answer.text();
      for (const part of parts) {
        const now = found.content.getElementById(part.id);
        if (now) show(part, now.innerHTML);
      }
      const about = found.content.querySelector("[data-words]");
      if (about) {
        words.textContent = about.dataset.words;
        // The sentence counts seconds; it is read out only when the state changes.
        if (state.dataset.state !== about.dataset.state) document.getElementById("said").textContent = about.dataset.words;
        state.dataset.state = about.dataset.state;
        state.className = `line ${about.dataset.state}`;
        hide("resume", about.dataset.state === "open");
        hide("pause", about.dataset.paused === "1");
        fresh.textContent = `As of ${about.dataset.at.slice(0, 19).replace("T", " ")} UTC, and every 5 s.`;
        fresh.className = "";
        fresh.removeAttribute("role");
      } else {
        stale(answer.status === 503 ? "Redis does not answer" : "the console failed");
      }
    } catch {
      stale("the console does not answer");
    } finally {
      asking = false;
    }
  };
  const stale = (why) => {
    fresh.textContent = `Not up to date, ${why}.`;
    fresh.className = "bad";
    fresh.setAttribute("role", "alert");
  };
  setInterval(refresh, EVERY);
  document.addEventListener("visibilitychange", refresh);
})();
