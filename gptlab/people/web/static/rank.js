// The ranking page: every reply gets a rank, by its buttons, by keys or on the board.
import { announce, element, rendered, toast } from "./common.js";
import { board } from "./board.js";
import { conversation, worker } from "./work.js";

const settings = document.getElementById("work").dataset;
const FLAGS = settings.flags.split(",");
const RATINGS = settings.ratings.split(",").map(Number);
const letter = (i) => String.fromCharCode(65 + i);

let cards = [];
let lanes = null;
let ranks = [];

const work = worker((task, place) => {
  ranks = task.replies.map(() => null);
  cards = task.replies.map((reply, i) => card(reply, i, task.replies.length));
  lanes = board({ names: task.replies.map((reply, i) => `${letter(i)}: ${reply.content.replace(/[*_`#>|]+/g, "").slice(0, 60)}`), letters: ranks.map((_, i) => letter(i)), move: setRank, key: onKey, focus: (i) => focusCard(i) });
  const form = element("form", { onsubmit: (event) => { event.preventDefault(); submit(); } },
    element("section.card", { "aria-labelledby": "conversation-title" }, element("h2", { id: "conversation-title" }, "The conversation"), ...conversation(task.prompt)),
    element("h2.sr-only", {}, "The replies"),
    element("div.rank-layout", {}, element("div.replies", {}, ...cards),
      element("div.board-column", {}, lanes.element,
        element("details.card.note-card", {}, element("summary", {}, "A note on this task"), element("label.sr-only", { for: "note" }, "Note"), element("textarea", { id: "note", rows: "3", maxlength: "10000" })),
        element("div.row.end.task-buttons", {}, element("button.button", { type: "button", onclick: work.skip }, "Skip"), element("button.button.primary.large", { id: "submit" }, "Send and go on")))));
  place.append(form);
  place.querySelector("h2").setAttribute("tabindex", "-1");
  announce(`A new task with ${ranks.length} replies to rank.`);
});

function card(reply, i, count) {
  const name = letter(i);
  const segment = (kind, value) => element("label", {}, element("input", { type: "radio", name: `${kind}-${i}`, value: String(value), onchange: () => (kind === "rank" ? setRank(i, value) : null) }), element("span", {}, String(value)));
  return element("section.card.reply", { tabindex: "-1", "aria-labelledby": `reply-${i}`, dataset: { reply: String(i) }, onkeydown: (event) => onKey(event, i) },
    element("h3", { id: `reply-${i}` }, `Reply ${name}`),
    rendered(reply.html),
    element("fieldset.inline", {}, element("legend", {}, "Rank", element("span.sr-only", {}, ` of ${name}, 1 is best`)),
      element("div.segments.ranks", {}, ...ranks.map((_, at) => segment("rank", at + 1))), element("span.tie.muted.small", { "aria-hidden": "true" })),
    element("fieldset.inline", {}, element("legend", {}, "Quality", element("span.sr-only", {}, ` of ${name}, from 1 very bad to 7 very good`)),
      element("span.muted.small", { "aria-hidden": "true" }, "bad"), element("div.segments.ratings", {}, ...RATINGS.map((value) => segment("rating", value))), element("span.muted.small", { "aria-hidden": "true" }, "good")),
    element("fieldset.inline.flags", {}, element("legend", {}, "Flags", element("span.sr-only", {}, ` of ${name}`)), ...FLAGS.map((kind) => flag(kind, i, name))));
}

function flag(kind, i, name) {
  const text = kind.replace("_", " ");
  const severity = element("select", { "aria-label": `How bad: ${text}, reply ${name}`, hidden: true }, element("option", { value: "1" }, "a little"), element("option", { value: "2", selected: true }, "bad"), element("option", { value: "3" }, "very bad"));
  const box = element("input", { type: "checkbox", name: `flag-${i}`, value: kind, onchange: () => { severity.hidden = !box.checked; } });
  return element("span.flag", {}, element("label.chip-check", {}, box, element("span", {}, text)), severity);
}

function setRank(i, rank) {
  ranks[i] = rank;
  lanes.place(i, rank);
  cards[i].querySelector(`input[name="rank-${i}"][value="${rank}"]`).checked = true;
  cards[i].classList.remove("missing");
  cards.forEach((one, at) => {
    const tied = ranks.map((own, j) => (j !== at && own !== null && own === ranks[at] ? letter(j) : "")).filter(Boolean);
    one.querySelector(".tie").textContent = tied.length ? `tied with ${tied.join(", ")}` : "";
    if (at === i) announce(`Reply ${letter(i)}: rank ${rank}${tied.length ? `, tied with ${tied.join(", ")}` : ""}`);
  });
}

function focusCard(i) {
  cards[i].focus({ preventScroll: true });
  cards[i].scrollIntoView({ block: "nearest" });
}

function onKey(event, i) {
  const typing = event.target.matches("textarea, select, input[type=text]");
  if (typing || event.ctrlKey || event.metaKey) return;
  const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
  // Digits are ranks everywhere but on the scale of quality, whose own they are there.
  if (digit && event.target.name?.startsWith("rating-")) {
    const own = document.querySelector(`input[name="rating-${i}"][value="${digit}"]`);
    if (own) Object.assign(own, { checked: true }).focus();
    event.preventDefault();
  } else if (digit && digit <= ranks.length) {
    setRank(i, digit);
    event.preventDefault();
  } else if (event.altKey && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
    const from = ranks[i] ?? (event.key === "ArrowUp" ? ranks.length + 1 : 0);
    setRank(i, Math.min(ranks.length, Math.max(1, from + (event.key === "ArrowUp" ? -1 : 1))));
    event.preventDefault();
  } else if ((event.key === "j" || event.key === "k") && !event.altKey) {
    focusCard((i + (event.key === "j" ? 1 : ranks.length - 1)) % ranks.length);
    event.preventDefault();
  }
}

function submit() {
  const missing = ranks.indexOf(null);
  if (missing >= 0) {
    ranks.forEach((rank, i) => cards[i].classList.toggle("missing", rank === null));
    toast(`Reply ${letter(missing)} has no rank yet`, "bad");
    announce(`Reply ${letter(missing)} has no rank yet`);
    focusCard(missing);
    return;
  }
  const rating = (i) => Number(document.querySelector(`input[name="rating-${i}"]:checked`)?.value) || null;
  const flags = cards.flatMap((one, i) => [...one.querySelectorAll(`input[name="flag-${i}"]:checked`)].map((box) => ({ reply: i, kind: box.value, severity: Number(box.closest(".flag").querySelector("select").value) })));
  work.answer("judge", { ranks, ratings: ranks.map((_, i) => rating(i)), flags, note: document.getElementById("note").value, seconds: work.seconds() }, "Kept. Thank you!");
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    document.getElementById("submit")?.click();
  } else if ((event.key === "j" || event.key === "k") && cards.length && !event.target.closest(".reply, .rank-chip, input, textarea, select, dialog")) {
    focusCard(0);
  }
});
document.getElementById("help-button").addEventListener("click", () => document.getElementById("help").showModal());
work.lease();
