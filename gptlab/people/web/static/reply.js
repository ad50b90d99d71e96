// What stands under a message: feedback, other tries, a better version, editing.
import { call, complain, element, icon, rendered, toast } from "./common.js";

function button(name, label, onclick, extra = {}) {
  return element("button.icon-button.small", { type: "button", "aria-label": label, title: label, onclick, ...extra }, icon(name));
}

function copier(message) {
  return button("copy", "Copy", async () => {
    try {
      await navigator.clipboard.writeText(message.content);
      toast("Copied");
    } catch {
      toast("This browser doesn't allow copying", "bad");
    }
  });
}

export function ownActions(message, handlers) {
  return element("div.actions", {}, button("pen", "Edit and send again", () => handlers.edit(message)), copier(message));
}

export function actions(message, feedback, handlers) {
  if (message.improves || message.refusal) {
    return element("div.actions", {}, copier(message), button("again", "Another try", () => handlers.regenerate(message)));
  }
  const thumb = feedback.find((given) => given.kind === "thumb");
  const bar = element("div.actions", {});
  const give = async (up) => {
    try {
      handlers.feedback(await call("POST", `/api/messages/${message.id}/thumb`, { up }));
      pressed(up ? 1 : -1);
      bar.parentElement.querySelector(".reasons")?.remove();
      const form = reasons(message, up, handlers);
      bar.after(form);
      form.querySelector("input, textarea").focus({ preventScroll: true });
      form.scrollIntoView({ block: "nearest" });
    } catch (error) {
      complain(error);
    }
  };
  const up = button("up", "Good reply", () => give(true));
  const down = button("down", "Bad reply", () => give(false));
  const pressed = (value) => {
    up.setAttribute("aria-pressed", String(value === 1));
    down.setAttribute("aria-pressed", String(value === -1));
  };
  pressed(thumb?.value);
  bar.append(up, down,
    button("again", "Another try", () => handlers.regenerate(message)),
    copier(message),
    element("button.text-button", { type: "button", onclick: () => handlers.another(message) }, icon("columns"), "Show me another"),
    element("button.text-button", { type: "button", onclick: () => handlers.better(message) }, icon("pen"), "Write a better reply"));
  return bar;
}

// After a thumb: why. Sending it is a second thumb, which takes the first one's place.
function reasons(message, up, handlers) {
  const form = element("form.reasons.stack.tight");
  const close = () => form.remove();
  if (!up) {
    const boxes = [...document.getElementById("reasons").content.children].map((option) =>
      element("label.check", {}, element("input", { type: "checkbox", name: "reason", value: option.value, "data-flag": option.hasAttribute("data-flag") }), element("span", {}, option.value)));
    const severity = element("label.field.inline-field", { hidden: true }, "How bad? ",
      element("select", { name: "severity" }, element("option", { value: "1" }, "a little"), element("option", { value: "2", selected: true }, "bad"), element("option", { value: "3" }, "very bad")));
    form.append(element("fieldset.row", {}, element("legend", {}, "What is wrong with it?"), ...boxes), severity);
    form.addEventListener("change", () => {
      severity.hidden = !form.querySelector("[data-flag]:checked");
      form.scrollIntoView({ block: "nearest" });
    });
  }
  form.append(
    element("label.field", {}, up ? "What is good about it?" : "In your words", element("textarea", { name: "note", rows: "2", maxlength: "10000" })),
    element("div.row.end", {}, element("button.button.small", { type: "button", onclick: close }, "Close"), element("button.button.primary.small", {}, "Send")));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const data = new FormData(form);
    const flagged = form.querySelector("[data-flag]:checked");
    const body = { up, reasons: data.getAll("reason"), note: data.get("note"), severity: flagged ? Number(data.get("severity")) : null };
    try {
      handlers.feedback(await call("POST", `/api/messages/${message.id}/thumb`, body));
      toast("Thank you for saying why");
      const bar = form.previousElementSibling;
      close();
      bar?.querySelector('[aria-pressed="true"]')?.focus();
    } catch (error) {
      complain(error);
    }
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    }
  });
  return form;
}

// Two replies side by side; `choose` offers the choice once the second one is there.
export function comparison(message) {
  const place = element("div.prose", { "aria-busy": "true" });
  const row = element("div.choice-row.row");
  const article = element("article.comparison", { "aria-label": "Two replies to choose from" },
    element("section.choice", { "aria-label": "First reply" }, element("p.choice-name", {}, "First"), rendered(message.html)),
    element("section.choice", { "aria-label": "Second reply" }, element("p.choice-name", {}, "Second"), place),
    row);
  function choose(other, done) {
    const pick = (value, text) => element("button.button", {
      type: "button",
      async onclick() {
        try {
          await done(value);
        } catch (error) {
          complain(error);
        }
      },
    }, text);
    row.append(pick(1, "First is better"), pick(0, "Neither"), pick(-1, "Second is better"));
    place.removeAttribute("aria-busy");
    row.firstChild.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }
  return { article, place, choose };
}

// A text to be changed, with its context if it has one.
export function editor({ label, text, context, submit, save, close }) {
  const area = element("textarea", { name: "text", rows: String(Math.min(14, Math.max(3, text.split("\n").length + 1))), maxlength: "200000", required: true });
  area.value = text;
  const more = element("textarea", { name: "context", rows: "3", maxlength: "200000" });
  more.value = context ?? "";
  const form = element("form.editor.stack.tight", {}, element("label.field", {}, label, area),
    context !== undefined && context !== "" ? element("label.field", {}, "Additional context", more) : null,
    element("div.row.end", {}, element("button.button.small", { type: "button", onclick: close }, "Cancel"), element("button.button.primary.small", {}, submit)));
  const act = async () => {
    const press = form.querySelector(".primary");
    press.disabled = true;
    try {
      await save(area.value, more.value);
    } catch (error) {
      complain(error);
      press.disabled = false;
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      form.requestSubmit();
    }
  });
  return form;
}
