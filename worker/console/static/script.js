"use strict";
// Shows the overview's main part anew every five seconds while somebody can see it. Without this script, "Refresh" does.
(() => {
  const live = document.getElementById("live");
  const words = document.getElementById("words");
  const fresh = document.getElementById("fresh");
  if (!live || !words || !fresh) return;
  const EVERY = 5000;
  let asking = false;

  // What a reader has opened, scrolled to or stands on is so again afterwards.
  const show = (html) => {
    const open = [...live.querySelectorAll("details[open]")].map((one) => one.id);
    const scrolled = [...live.querySelectorAll(".wide")].map((one) => one.scrollLeft);
    const inside = live.contains(document.activeElement) ? place(document.activeElement) : -1;
    live.innerHTML = html;
    open.forEach((id) => { const one = document.getElementById(id); if (one) one.open = true; });
    live.querySelectorAll(".wide").forEach((one, i) => { one.scrollLeft = scrolled[i] || 0; });
    const again = live.querySelectorAll("a, summary, [tabindex]")[inside];
    if (again) again.focus({ preventScroll: true });
  };
  const place = (element) => [...live.querySelectorAll("a, summary, [tabindex]")].indexOf(element);

  // A viewer has neither.
  const hide = (id, wanted) => { const one = document.getElementById(id); if (one) one.hidden = wanted; };

  const refresh = async () => {
    if (asking || document.hidden) return;
    // A text that somebody is selecting stays.
    const selection = document.getSelection();
    if (selection && !selection.isCollapsed && live.contains(selection.anchorNode)) return;
    asking = true;
    try {
      const answer = await fetch(live.dataset.source, { headers: { Accept: "text/html" }, redirect: "error" });
      if (answer.status === 401 || answer.status === 403) {
        window.location.reload();
        return;
      }
      show(await answer.text());
      const about = live.querySelector("[data-words]");
      if (about) {
        // Only what has changed is read out.
        if (words.textContent !== about.dataset.words) words.textContent = about.dataset.words;
        document.getElementById("state").className = `line ${about.dataset.state}`;
        hide("resume", about.dataset.state === "open");
        hide("pause", about.dataset.paused === "1");
        fresh.textContent = `As of ${about.dataset.at.slice(0, 19).replace("T", " ")} UTC, and every 5 s.`;
      } else {
        fresh.textContent = "Not up to date: see below.";
      }
    } catch {
      fresh.textContent = "Not up to date: the console does not answer.";
    } finally {
      asking = false;
    }
  };
  setInterval(refresh, EVERY);
  document.addEventListener("visibilitychange", refresh);
})();
