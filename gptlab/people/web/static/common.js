// What all pages share: requests, elements, messages, the theme and menus.

const csrf = document.querySelector('meta[name="csrf-token"]')?.content ?? "";

// An error that the server explains, or that the network made.
export class Failure extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

async function send(path, method, body, signal) {
  const headers = { "X-CSRF-Token": csrf };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure("The server can't be reached. Is the connection up?");
  }
  if (response.ok) return response;
  let message = response.status === 401 ? "You are signed out: reload the page." : "The server could not do that.";
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // No JSON: a proxy's page, say.
  }
  throw new Failure(message, response.status, Number(response.headers.get("Retry-After")) || 0);
}

export async function call(method, path, body) {
  const response = await send(path, method, body);
  return response.status === 204 ? null : response.json();
}

// Server-sent events of a POST: onEvent(name, data) for each. Throws an AbortError when `signal` ends it.
export async function follow(path, body, onEvent, signal) {
  const response = await send(path, "POST", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const name = /^event: (.*)$/m.exec(block)?.[1];
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (name && data) onEvent(name, JSON.parse(data));
    }
  }
}

// element("button.primary", {type: "button", onclick: f}, "text", child, ...). Text stays text.
export function element(what, properties = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(made.dataset, value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `/static/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

// HTML that the server has rendered from Markdown, and nothing else.
export function rendered(html, what = "div.prose") {
  const made = element(what);
  made.innerHTML = html;
  return made;
}

export function toast(message, kind = "") {
  const made = element(`p.toast${kind ? `.${kind}` : ""}`, {}, message);
  document.getElementById("toasts").append(made);
  setTimeout(() => made.remove(), kind === "bad" ? 9000 : 4000);
}

export function complain(error) {
  toast(error.message, "bad");
}

export function announce(text) {
  const place = document.getElementById("announce");
  if (place) place.textContent = text;
}

// Seconds that the page was looked at since `restart`.
export function stopwatch() {
  let spent = 0;
  let since = document.hidden ? null : performance.now();
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && since !== null) spent += performance.now() - since;
    since = document.hidden ? null : performance.now();
  });
  return {
    restart() {
      spent = 0;
      since = document.hidden ? null : performance.now();
    },
    seconds: () => (spent + (since === null ? 0 : performance.now() - since)) / 1000,
  };
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

document.querySelector("[data-theme-toggle]")?.addEventListener("click", () => {
  const next = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("theme", next);
  } catch {
    // Then it holds for this page.
  }
});

// On a phone the menu is wider than the screen: the place where one is comes into view.
const here = document.querySelector(".nav [aria-current]");
if (here) here.parentElement.scrollLeft = here.offsetLeft - here.parentElement.offsetLeft - 12;

document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details[data-menu][open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
});
document.addEventListener("keydown", (event) => {
  const menu = event.key === "Escape" && document.activeElement?.closest("details[data-menu][open]");
  if (menu) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});

for (const button of document.querySelectorAll("[data-consent]")) {
  button.addEventListener("click", async () => {
    try {
      await call("POST", "/api/consent", { scope: "training", given: button.dataset.consent === "yes" });
      document.getElementById("consent-banner").remove();
      toast("Saved. You can change it under 'Your data and consent'.");
      (document.getElementById("message") ?? document.getElementById("main")).focus();
    } catch (error) {
      complain(error);
    }
  });
}
