// What ranking and demonstration pages share: leases, their time, skipping, progress.
import { call, complain, element, icon, rendered, stopwatch, toast } from "./common.js";

const RENEW_BELOW = 0.3; // of a lease's time
const GONE = [404, 409]; // whose text it shows has deleted it; or it isn't ours any more

// `show(task, place)` draws a task. Returns what its page may do with it.
export function worker(show) {
  const place = document.getElementById("work");
  const { campaign } = place.dataset;
  const watch = stopwatch();
  let task = null;
  let ends = 0;
  let span = 0;
  let active = false;

  function took(next) {
    task = next;
    span = next.seconds_left * 1000;
    ends = Date.now() + span;
  }

  async function lease() {
    place.setAttribute("aria-busy", "true");
    task = null;
    try {
      const [{ task: next }] = await Promise.all([call("POST", `/api/campaigns/${campaign}/lease`), progress()]);
      if (!next) {
        place.replaceChildren(element("p.empty", {}, "There is no task for you now. Thank you! ", element("a", { href: "/label" }, "Other campaigns")));
        return;
      }
      took(next);
      watch.restart();
      place.replaceChildren();
      show(next, place);
      scrollTo(0, 0);
    } catch (error) {
      complain(error);
      place.replaceChildren(element("p.note.bad", {}, error.message, " ", element("button.button.small", { type: "button", onclick: lease }, "Try again")));
    } finally {
      place.removeAttribute("aria-busy");
    }
  }

  async function progress() {
    const found = (await call("GET", "/api/campaigns")).find((one) => one.id === campaign);
    document.getElementById("progress").textContent = found ? `${found.judged} of ${found.wanted} judged` : "not open";
  }

  // Sends an answer and goes on to the next task; one that is gone is dropped.
  async function answer(what, body, thanks) {
    try {
      await call("POST", `/api/leases/${task.lease}/${what}`, body);
      toast(thanks);
      await lease();
    } catch (error) {
      complain(error);
      if (GONE.includes(error.status)) await lease();
    }
  }

  async function tick() {
    if (!task) return;
    const left = ends - Date.now();
    const timer = document.getElementById("timer");
    timer.textContent = left > 0 ? `${Math.floor(left / 60000)}:${String(Math.floor(left / 1000) % 60).padStart(2, "0")} left` : "time is over";
    if (active && left < span * RENEW_BELOW) {
      active = false;
      try {
        took((await call("POST", `/api/leases/${task.lease}/renew`)).task);
      } catch (error) {
        if (GONE.includes(error.status)) await lease();
      }
    }
  }
  setInterval(tick, 1000);
  for (const kind of ["pointerdown", "keydown", "scroll"]) addEventListener(kind, () => { active = true; }, { passive: true });

  const dialog = document.getElementById("skip-dialog");
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "skip") return;
    const data = new FormData(document.getElementById("skip-form"));
    dialog.returnValue = "";
    document.getElementById("skip-form").reset();
    answer("skip", { reason: data.get("reason"), note: data.get("note") }, "Skipped");
  });

  return { answer, lease, skip: () => dialog.showModal(), seconds: () => watch.seconds() };
}

export function conversation(prompt) {
  return prompt.map((message) => {
    const made = element(`div.turn.${message.role}`, {}, element("p.turn-role", {}, message.role));
    if (message.context) made.append(element("details.context", { open: message.context.length < 1500 }, element("summary", {}, icon("paper"), "Additional context"), element("p.plain-text", { tabindex: "0" }, message.context)));
    made.append(message.html ? rendered(message.html) : element("p.plain-text", {}, message.content));
    return made;
  });
}
