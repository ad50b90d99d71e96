// Lanes, one a rank, onto which replies are dragged by mouse, pen or finger. Two in one lane tie.
import { element, icon } from "./common.js";

const FAR = 6; // pixels from which a press is a drag

export function board({ names, letters, move, key, focus }) {
  const count = names.length;
  let draggedAt = -Infinity;
  const lane = (rank) => element("div.lane", { dataset: { rank: String(rank) } },
    element("span.lane-name", {}, rank ? `${rank}` : "?", element("span.lane-hint", {}, rank === 0 ? "not ranked" : rank === 1 ? "best" : rank === count ? "worst" : "")),
    element("div.lane-chips"));
  const lanes = [lane(0), ...names.map((_, i) => lane(i + 1))];
  const chips = names.map((name, i) => element("button.rank-chip", {
    type: "button", dataset: { chip: String(i) }, "aria-label": `Reply ${letters[i]}: press a number for its rank, Enter to read it`,
    onkeydown: (event) => key(event, i), onpointerdown: (event) => press(event, i),
    onclick: () => performance.now() - draggedAt > 100 && focus(i), // not the click that ends a drag
  }, icon("grip"), element("span.chip-letter", {}, letters[i]), element("span.chip-text", {}, name.slice(3))));
  lanes[0].lastChild.append(...chips);
  const made = element("section.card.board", { "aria-labelledby": "board-title" }, element("h2", { id: "board-title" }, "Ranking"), element("p.muted.small", {}, "Drag a reply to its rank. Two on one rank are tied."), ...lanes.slice(1), lanes[0]);

  function place(i, rank) {
    lanes[rank].lastChild.append(chips[i]);
    lanes[0].classList.toggle("done", !lanes[0].lastChild.childElementCount);
  }

  function laneAt(x, y) {
    return document.elementFromPoint(x, y)?.closest(".lane") ?? null;
  }

  function press(event, i) {
    if (event.button !== 0) return;
    const chip = chips[i];
    const from = { x: event.clientX, y: event.clientY };
    let dragged = false;
    let over = null;
    chip.setPointerCapture(event.pointerId); // at once: a quick mouse has left it by the first move
    const moved = (to) => {
      const [x, y] = [to.clientX - from.x, to.clientY - from.y];
      if (!dragged && Math.hypot(x, y) < FAR) return;
      if (!dragged) {
        dragged = true;
        chip.classList.add("dragging");
      }
      chip.style.transform = `translate(${x}px, ${y}px)`;
      over?.classList.remove("over");
      over = laneAt(to.clientX, to.clientY);
      over?.classList.add("over");
      if (to.clientY < 60) scrollBy(0, -12);
      else if (to.clientY > innerHeight - 60) scrollBy(0, 12);
    };
    const end = (to) => {
      for (const [kind, listener] of listeners) chip.removeEventListener(kind, listener);
      chip.classList.remove("dragging");
      chip.style.transform = "";
      over?.classList.remove("over");
      if (!dragged) return;
      draggedAt = performance.now();
      if (to.type === "pointerup" && over && over !== lanes[0]) {
        const rank = Number(over.dataset.rank);
        move(i, rank);
        chip.focus({ preventScroll: true });
      }
    };
    const listeners = [["pointermove", moved], ["pointerup", end], ["pointercancel", end]];
    for (const [kind, listener] of listeners) chip.addEventListener(kind, listener);
  }

  return { element: made, place };
}
