// The demonstration page: both sides of a conversation, with a model's suggestions at hand.
import { announce, complain, element, Failure, follow, icon, rendered, toast } from "./common.js";
import { conversation, worker } from "./work.js";

let task = null;
let turns = [];

const keep = () => {
  try {
    sessionStorage.setItem("draft", JSON.stringify({ lease: task.lease, turns }));
  } catch {
    // Then a reload loses it.
  }
};

function kept(lease) {
  try {
    const draft = JSON.parse(sessionStorage.getItem("draft"));
    return draft?.lease === lease ? draft.turns : [];
  } catch {
    return [];
  }
}

const work = worker((next, place) => {
  task = next;
  turns = kept(task.lease);
  draw(place);
});

function nextRole() {
  const last = turns.at(-1)?.role ?? task.prompt.at(-1)?.role ?? "assistant";
  return last === "user" ? "assistant" : "user";
}

// `begun`: a turn to go on with, as it was added before.
function draw(place = document.getElementById("work"), begun = null) {
  const role = nextRole();
  const parts = [];
  if (task.topic) parts.push(element("section.card.topic", { "aria-labelledby": "topic-title" }, element("h2", { id: "topic-title" }, "Write a conversation about"), element("p.plain-text", {}, task.topic)));
  parts.push(element("section.card", { "aria-labelledby": "conversation-title" }, element("h2", { id: "conversation-title" }, "The conversation"),
    ...conversation(task.prompt), ...turns.map(written),
    turns.length || task.prompt.length ? null : element("p.muted", {}, "You begin as the user.")));
  parts.push(writer(role, begun));
  const complete = turns.length > 0 && role === "user";
  parts.push(element("div.row.end.task-buttons", {},
    element("button.button", { type: "button", onclick: work.skip }, "Skip"),
    element("button.button.primary.large", { type: "button", id: "submit", disabled: !complete, onclick: finish }, "Finish and go on")));
  place.replaceChildren(...parts);
}

function written(turn, i) {
  const made = element(`div.turn.${turn.role}`, {}, element("p.turn-role", {}, turn.role, turn.origin === "written" ? null : element("span.badge", {}, turn.origin === "taken" ? "suggestion" : "edited suggestion")), turn.html ? rendered(turn.html) : element("p.plain-text", {}, turn.content));
  if (i === turns.length - 1) {
    made.append(element("button.text-button", {
      type: "button",
      onclick() {
        turns.pop();
        keep();
        draw(undefined, turn);
        document.getElementById("turn").focus();
      },
    }, icon("pen"), "Change this turn"));
  }
  return made;
}

function writer(role, begun) {
  let suggestion = begun?.suggestion ?? null; // where the text came from, if a model wrote it
  const area = element("textarea", { id: "turn", rows: "5", maxlength: "200000" });
  area.value = begun?.content ?? "";
  const place = element("div.suggestion", { hidden: true, "aria-live": "polite" });
  const add = (turn) => {
    turns.push(turn);
    keep();
    draw();
    announce(`The ${turn.role}'s turn is added. Now the ${nextRole()}'s.`);
    document.getElementById("turn").focus();
  };
  const form = element("form.card.stack.tight", {
    onsubmit(event) {
      event.preventDefault();
      const content = area.value;
      if (!content.trim()) return toast("Write the turn first", "bad");
      const origin = !suggestion ? "written" : content === suggestion.content ? "taken" : "edited";
      return add({ role, content, origin, policy: suggestion?.policy ?? null, html: null, suggestion });
    },
    onkeydown(event) {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    },
  }, element("h2", {}, role === "user" ? "The user's turn" : "The assistant's turn"),
  element("label.sr-only", { for: "turn" }, `The ${role}'s turn`), area, place);
  const buttons = element("div.row.end");
  if (role === "assistant") {
    const model = element("select", { "aria-label": "Model that suggests" });
    model.append(document.getElementById("models").content.cloneNode(true));
    buttons.append(model, element("button.button", { type: "button", onclick: (event) => suggest(event.target, model.value, place, (found, edit) => {
      if (!edit) return add({ role, content: found.content, origin: "taken", policy: found.policy, html: found.html, suggestion: found });
      suggestion = found;
      area.value = found.content;
      place.hidden = true;
      return area.focus();
    }) }, "Suggest a reply"));
  }
  buttons.append(element("button.button.primary", {}, "Add the turn"));
  form.append(buttons);
  return form;
}

async function suggest(button, model, place, use) {
  const mine = task.lease;
  button.disabled = true;
  const settled = element("div");
  const tail = element("div");
  const text = element("div.prose", {}, settled, tail);
  const bar = element("div.row.end");
  place.hidden = false;
  place.replaceChildren(element("p.choice-name", {}, "Suggestion"), text, bar);
  try {
    let found = null;
    await follow(`/api/leases/${task.lease}/suggest`, { model: model || null, turns: turns.map(({ role, content, origin, policy }) => ({ role, content, origin, policy })) }, (name, data) => {
      if (name === "text") {
        if (data.settled) settled.insertAdjacentHTML("beforeend", data.settled);
        tail.innerHTML = data.tail;
      } else if (name === "done") {
        found = data.message;
      } else if (name === "failed") {
        throw new Failure(data.message);
      }
    });
    if (mine !== task?.lease) return;
    if (!found?.content.trim()) throw new Failure("The model has no suggestion.");
    text.replaceChildren(rendered(found.html));
    bar.append(
      element("button.button.small", { type: "button", onclick: () => { place.hidden = true; } }, "Ignore"),
      element("button.button.small", { type: "button", onclick: () => use(found, true) }, "Edit"),
      element("button.button.primary.small", { type: "button", onclick: () => use(found, false) }, "Take as it is"));
  } catch (error) {
    complain(error);
    place.hidden = true;
  } finally {
    button.disabled = false;
  }
}

async function finish() {
  const unsent = document.getElementById("turn").value.trim();
  if (unsent) {
    toast("Add or clear the turn that you began first", "bad");
    document.getElementById("turn").focus();
    return;
  }
  await work.answer("demonstrate", { turns: turns.map(({ role, content, origin, policy }) => ({ role, content, origin, policy })), seconds: work.seconds() }, "Kept. Thank you!");
}

work.lease();
