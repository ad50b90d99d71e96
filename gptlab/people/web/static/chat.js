// The chat page: the conversation as a tree of which one path is shown, the list, the composer.
import { announce, call, complain, element, Failure, follow, icon, rendered, toast } from "./common.js";
import { actions, comparison, editor, ownActions } from "./reply.js";
import { conversationList } from "./sidebar.js";

const $ = (id) => document.getElementById(id);
const root = $("chat");
const state = {
  conversation: null, // {id, title}
  messages: new Map(), // by id, in order
  chosen: new Map(), // parent id or "" -> the child that is shown
  feedback: [],
  running: null, // {token, gone}: until the reply begins, it has no token to stop it by
  view: 0, // counts what was opened: a stream that ends after another one was opened shows nothing
};
const list = conversationList({ open, renamed, deleted });

const childrenOf = (parent) => [...state.messages.values()].filter((message) => (message.parent ?? "") === parent);

function path() {
  const shown = [];
  let at = "";
  for (;;) {
    const siblings = childrenOf(at);
    if (!siblings.length) return shown;
    const next = siblings.find((message) => message.id === state.chosen.get(at)) ?? siblings.at(-1);
    shown.push({ message: next, siblings });
    at = next.id;
  }
}

function feedbackOn(message) {
  return state.feedback.filter((given) => given.message === message.id);
}

function show() {
  const thread = $("thread");
  const shown = path();
  thread.replaceChildren(...shown.map(turn));
  if (!shown.length) thread.append(empty());
  $("system-toggle").hidden = shown.length > 0;
  if (shown.length) $("system-row").hidden = true;
  const title = state.conversation?.title || "New chat";
  $("chat-title").textContent = title;
  document.title = document.title.replace(/^.*(?= · )/, title);
}

function empty() {
  return element("div.empty-chat", {}, element("p.empty-title", {}, "What can I help with?"), element("p.muted", {}, "Ask, or give a text as context and say what to do with it."));
}

function turn({ message, siblings }) {
  const made = element(`article.turn.${message.role}`, { dataset: { id: message.id }, "aria-label": { user: "You", assistant: "Reply", system: "System prompt" }[message.role] });
  if (message.role === "system") {
    made.append(element("details.system", {}, element("summary", {}, "System prompt"), element("p.plain-text", {}, message.content)));
    return made;
  }
  if (message.context) made.append(element("details.context", {}, element("summary", {}, icon("paper"), "Additional context"), element("p.plain-text", { tabindex: "0" }, message.context)));
  if (message.role === "user") {
    made.append(element("p.bubble.plain-text", {}, message.content));
  } else {
    if (message.improves) made.append(element("p.badge-row", {}, element("span.badge", {}, "your version")));
    made.append(message.refusal ? element("p.note", {}, "This was not answered: ", message.refusal, ".") : rendered(message.html));
    if (!message.finished && !message.refusal) made.append(element("p.muted.small", {}, "Stopped or cut off here."));
  }
  const bar = message.role === "user" ? ownActions(message, handlers) : actions(message, feedbackOn(message), handlers);
  if (siblings.length > 1) bar.prepend(switcher(message, siblings));
  made.append(bar);
  return made;
}

function switcher(message, siblings) {
  const at = siblings.indexOf(message);
  const step = (by) => {
    const next = siblings[at + by];
    state.chosen.set(next.parent ?? "", next.id);
    show();
    announce(`Version ${at + by + 1} of ${siblings.length}`);
    document.querySelector(`[data-id="${CSS.escape(next.id)}"] .switcher button:not([disabled])`)?.focus();
  };
  return element("span.switcher", { role: "group", "aria-label": "Versions" },
    element("button.icon-button.small", { type: "button", "aria-label": "Previous version", disabled: at === 0, onclick: () => step(-1) }, icon("left")),
    element("span", {}, `${at + 1}/${siblings.length}`),
    element("button.icon-button.small", { type: "button", "aria-label": "Next version", disabled: at === siblings.length - 1, onclick: () => step(1) }, icon("right")));
}

function add(message) {
  state.messages.set(message.id, message);
  state.chosen.set(message.parent ?? "", message.id);
}

// One reply, streamed into `place`. Returns the message that was kept, or null, as when it is stopped before it begins.
async function stream(parent, place) {
  const settled = element("div");
  const tail = element("div");
  const waiting = element("p.waiting", { "aria-label": "The reply is being written" }, element("span"), element("span"), element("span"));
  place.replaceChildren(waiting, settled, tail);
  const running = { token: null, gone: new AbortController() };
  state.running = running;
  busy(true);
  let kept = null;
  let failure = null;
  try {
    await follow(`/api/messages/${parent.id}/reply`, { model: $("model").value || null }, (name, data) => {
      const near = atEnd();
      if (name === "start") {
        running.token = data.token;
      } else if (name === "text") {
        waiting.remove();
        if (data.settled) settled.insertAdjacentHTML("beforeend", data.settled);
        tail.innerHTML = data.tail;
      } else if (name === "done") {
        kept = data.message;
        if (data.notice) toast(data.notice);
      } else {
        failure = new Failure(data.message);
      }
      if (near) toEnd();
    }, running.gone.signal);
    if (failure) throw failure;
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    state.running = null;
    busy(false);
  }
  return kept;
}

async function reply(parent, place = null) {
  if (state.running) return;
  const article = element("article.turn.assistant", { "aria-label": "Reply", "aria-busy": "true" });
  const body = element("div.prose");
  article.append(body);
  if (!place) {
    $("thread").append(article);
    toEnd();
  } else {
    place.replaceWith(article);
  }
  const { view } = state;
  try {
    const message = await stream(parent, body);
    if (view !== state.view) return;
    if (message) {
      add(message);
      announce(message.finished ? `Reply: ${message.content.slice(0, 400)}` : "The reply was stopped");
    }
    show();
    if (!message) {
      announce("No reply was written");
      offer(parent, "No reply was written.", "p.note");
    }
    list.refresh(state.conversation?.id);
  } catch (error) {
    if (view !== state.view) return;
    show();
    retry(parent, error);
  }
}

function retry(parent, error) {
  complain(error);
  offer(parent, error.message, "p.note.bad");
}

function offer(parent, why, what) {
  if (childrenOf(parent.id).length) return;
  $("thread").append(element(what, {}, why, " ", element("button.button.small", { type: "button", onclick: (event) => reply(parent, event.target.closest("p")) }, "Try again")));
}

function stop() {
  const { running } = state;
  if (!running) return;
  if (running.token) call("POST", `/api/replies/${running.token}/stop`).catch(complain);
  else running.gone.abort();
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  root.classList.toggle("busy", on);
}

const handlers = {
  feedback(given) {
    state.feedback = state.feedback.filter((one) => one.message !== given.message || one.kind !== given.kind);
    state.feedback.push(given);
  },
  show,
  async regenerate(message) {
    if (state.running) return;
    await reply(state.messages.get(message.parent), document.querySelector(`[data-id="${CSS.escape(message.id)}"]`));
  },
  async another(message) {
    if (state.running) return;
    const article = document.querySelector(`[data-id="${CSS.escape(message.id)}"]`);
    const side = comparison(message);
    article.replaceWith(side.article);
    side.article.scrollIntoView({ block: "nearest" });
    const { view } = state;
    try {
      const other = await stream(state.messages.get(message.parent), side.place);
      if (view !== state.view) return;
      if (!other?.content.trim()) throw new Failure("No other reply came.");
      add(other);
      side.place.replaceChildren(rendered(other.html));
      announce("The second reply is complete. Choose the better one.");
      side.choose(other, async (value) => {
        await call("POST", `/api/messages/${message.id}/choose`, { other: other.id, value });
        state.chosen.set(message.parent ?? "", value < 0 ? other.id : message.id);
        toast("Thank you: your choice is kept");
        show();
      });
    } catch (error) {
      complain(error);
      show();
    }
  },
  better(message) {
    const article = document.querySelector(`[data-id="${CSS.escape(message.id)}"]`);
    const form = editor({
      label: "Your better reply", text: message.content, submit: "Save as a better reply", close: show,
      async save(content) {
        const made = await call("POST", `/api/messages/${message.id}/improve`, { content });
        handlers.feedback(made.feedback);
        add(made.message);
        toast("Thank you: the conversation goes on from your version");
        show();
      },
    });
    article.append(form);
    form.querySelector("textarea").focus({ preventScroll: true });
    form.scrollIntoView({ block: "nearest" });
  },
  edit(message) {
    if (state.running) return;
    const article = document.querySelector(`[data-id="${CSS.escape(message.id)}"]`);
    const form = editor({
      label: "Edit your message", text: message.content, context: message.context ?? "", submit: "Send", close: show,
      async save(content, context) {
        const parent = message.parent && state.messages.get(message.parent)?.role !== "system" ? message.parent : null;
        const made = await call("POST", `/api/conversations/${state.conversation.id}/messages`, { content, parent, context: context || null });
        add(made);
        show();
        await reply(made);
      },
    });
    article.replaceChildren(form);
    form.querySelector("textarea").focus();
  },
};

async function submit() {
  const content = $("message").value;
  if (!content.trim() || state.running || root.classList.contains("sending")) return;
  root.classList.add("sending");
  const context = $("context").value.trim() || null;
  try {
    let message;
    if (state.conversation) {
      const last = path().at(-1)?.message ?? null;
      if (last?.role === "user") throw new Failure("Let the last message be answered first: try again, or edit it.");
      message = await call("POST", `/api/conversations/${state.conversation.id}/messages`, { content, context, parent: last?.role === "assistant" ? last.id : null });
    } else {
      const begun = await call("POST", "/api/conversations", { content, context, system: $("system").value });
      history.pushState({}, "", `/chat/${begun.conversation.id}`);
      await load(begun.conversation.id);
      message = begun.message;
    }
    for (const name of ["message", "context", "system"]) $(name).value = "";
    grow();
    toggle("context", false);
    add(message);
    show();
    root.classList.remove("sending");
    await reply(message);
  } catch (error) {
    complain(error);
  } finally {
    root.classList.remove("sending");
  }
}

async function load(id) {
  const found = await call("GET", `/api/conversations/${id}`);
  state.conversation = found.conversation;
  state.messages = new Map(found.messages.map((message) => [message.id, message]));
  state.feedback = found.feedback;
  state.chosen.clear();
  await list.refresh(id);
}

async function open(id) {
  if (state.running) stop();
  state.view += 1;
  try {
    if (id) {
      await load(id);
    } else {
      Object.assign(state, { conversation: null, messages: new Map(), feedback: [] });
      state.chosen.clear();
      list.mark(null);
    }
    show();
    toEnd();
    sidebar(false);
    if (matchMedia("(min-width: 800px)").matches) $("message").focus();
  } catch (error) {
    complain(error);
  }
}

function renamed(conversation) {
  if (state.conversation?.id === conversation.id) {
    state.conversation = conversation;
    show();
  }
}

function deleted(id) {
  if (state.conversation?.id !== id) return;
  history.replaceState({}, "", "/chat");
  open(null);
}

function atEnd() {
  const page = document.scrollingElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < 120;
}

function toEnd() {
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}

function grow() {
  const area = $("message");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight * 0.4)}px`;
}

function toggle(name, on = $(`${name}-row`).hidden) {
  $(`${name}-row`).hidden = !on;
  $(`${name}-toggle`).setAttribute("aria-expanded", String(on));
  if (on) $(name).focus();
}

function sidebar(on) {
  document.body.classList.toggle("sidebar-open", on);
  $("sidebar-toggle").setAttribute("aria-expanded", String(on));
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("message").addEventListener("input", grow);
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
$("stop").addEventListener("click", stop);
$("context-toggle").addEventListener("click", () => toggle("context"));
$("system-toggle").addEventListener("click", () => toggle("system"));
$("help-button").addEventListener("click", () => $("help").showModal());
$("sidebar-toggle").addEventListener("click", () => sidebar(!document.body.classList.contains("sidebar-open")));
$("main").addEventListener("click", () => sidebar(false));
const fresh = () => {
  history.pushState({}, "", "/chat");
  open(null);
  $("message").focus();
};
$("new-chat").addEventListener("click", fresh);
addEventListener("popstate", () => open(location.pathname.split("/")[2] || null));

const lastOf = (role) => path().filter(({ message }) => message.role === role).at(-1)?.message;
const shortcuts = {
  KeyN: fresh,
  KeyR: () => lastOf("assistant") && handlers.regenerate(lastOf("assistant")),
  ArrowUp: () => lastOf("user") && handlers.edit(lastOf("user")),
  Slash: () => $("help").open || $("help").showModal(),
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (state.running) stop();
    else if (document.body.classList.contains("sidebar-open")) {
      sidebar(false);
      $("sidebar-toggle").focus();
    }
  }
  if (event.altKey && !event.ctrlKey && !event.metaKey && shortcuts[event.code]) {
    event.preventDefault();
    shortcuts[event.code]();
  }
});

if (root.dataset.conversation) open(root.dataset.conversation);
else {
  show();
  list.refresh(null);
}
